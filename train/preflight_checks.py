"""Each check looks at one thing in a plan and yields what is wrong with it. A new check is a function of a few lines in CHECKS.

Errors are what would fail, or train on something else than the user thinks; everything that may be meant so is a warning, with numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from train.action_classes import classes_of_model
from train.memory import memory_savings
from train.preflight_files import Problem
from train.run_config import RunConfig
from train.told import told_classes, told_texts

if TYPE_CHECKING:
    from train.preflight import Plan

_CLIPPED = 0.05
_ONE_SIDED = 0.7
_GIB = 1 << 30


def _error(what: str, hint: str) -> Problem:
    return Problem("error", what, hint)


def _warning(what: str, hint: str) -> Problem:
    return Problem("warning", what, hint)


def check_base(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """The base is the one that the config states; where the checkpoint to start from is missing, nobody knows."""
    missing = config.base.weights is not None and plan.start.weights is None
    if not missing and config.base.sha256 not in (None, plan.base_sha256):
        yield _error(
            f"base.sha256 is {str(config.base.sha256)[:12]}..., the weights in {plan.base} are {plan.base_sha256[:12]}...",
            "point base.model to the right directory, or leave base.sha256 out.",
        )


def check_rows(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """The longest prompt fits the decoder."""
    if plan.memory.slots > plan.positions:
        longest = max(plan.instructions, key=lambda each: each.tokens)
        yield _error(
            f"a row of {plan.memory.slots} slots exceeds the decoder's {plan.positions} positions: {longest.text[:60]!r}",
            "shorten the instructions or data.prompt_template.",
        )


def check_words(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """The tokenizer knows the words, and there is more than one thing to be told."""
    unknown = [each for each in plan.instructions if each.unknown]
    if unknown:
        yield _warning(
            f"the tokenizer does not know all of {len(unknown)} instructions, e.g. {unknown[0].text[:60]!r} "
            f"({unknown[0].unknown} of {unknown[0].tokens} tokens)",
            "what it does not know all looks the same to the policy: say it in words of the base model.",
        )
    trained = [each for each in plan.instructions if each.train]
    if len(trained) == 1 and config.augment.mirror in (0.0, 1.0) and not told_texts(config.augment):
        yield _warning(
            "all training episodes have one instruction: the policy will not listen to words",
            "add episodes with another instruction, or set augment.mirror = 0.5.",
        )


def check_packing(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """The policy can see what it is told."""
    if config.model.packing == "fork_overwrite":
        told = config.model.instruction_in_head
        yield _warning(
            "model.packing fork_overwrite: the policy will not see the words of its instruction"
            + (", but hear their mean in its head" if told else ""),
            "leave model.packing out, unless this run is to reproduce one of the fork's.",
        )


def check_axes(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """Actions move, and are not cut off; a class head has its axes from its classes, and no scale."""
    if config.model.head == "classes":
        return
    low, high = plan.action_range
    for axis in plan.axes:
        if axis.minimum == axis.maximum == 0:
            yield _warning(
                f"{axis.name} is 0 in every training frame",
                "leave it out of data.actions, or add episodes that use it.",
            )
        if axis.clipped > _CLIPPED:
            yield _warning(
                f"{axis.clipped:.0%} of {axis.name} is clipped: it reaches {axis.minimum:g} to {axis.maximum:g}, "
                f"data.action_range is {low:g} to {high:g}",
                'data.action_range = "auto" takes the largest action of the training set.',
            )


def check_classes(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """A head of classes has seen each."""
    told = told_classes(config.augment, classes_of_model(config.model)) if config.model.head == "classes" else ()
    absent = [name for name, count in plan.classes.items() if count == 0 and name not in told]
    if config.model.head == "classes" and absent:
        yield _warning(
            f"no training frame is of class {', '.join(absent)}", "the policy will never choose what it has not seen."
        )


def check_sides(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """Left and right are balanced, as training sees them: mirrored views change sides."""
    left, right = plan.train.sides.get("left", 0), plan.train.sides.get("right", 0)
    if left + right == 0:
        return
    recorded, mirror = left / (left + right), config.augment.mirror
    seen = recorded * (1 - mirror) + (1 - recorded) * mirror
    if not 1 - _ONE_SIDED <= seen <= _ONE_SIDED:
        yield _warning(
            f"{max(seen, 1 - seen):.0%} of the training views go {'left' if seen > 0.5 else 'right'} "
            f"({left} episodes left, {right} right)",
            "augment.mirror = 0.5 balances the sides exactly.",
        )


def check_lengths(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """Episodes are as long as a window."""
    for part, facts in (("training", plan.train), ("validation", plan.val)):
        if facts.short:
            yield _warning(
                f"{facts.short} of {facts.episodes} {part} episodes are shorter than a window of {config.data.window} frames",
                "they give one window each, whose rest is masked; a smaller data.window would use them better.",
            )


def check_steps(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """There are steps to make, and the warm-up ends before they do."""
    if plan.warmup_steps >= plan.steps:
        yield _warning(
            f"the warm-up of {plan.warmup_steps} steps is not over when the run ends after {plan.steps}",
            "lower optimizer.warmup_steps, or train longer.",
        )
    if config.loop.accumulate % plan.processes:
        yield _error(
            f"loop.accumulate = {config.loop.accumulate} cannot be dealt evenly to {plan.processes} processes",
            "it is the number of micro-batches of a step over all processes: make it a multiple of them.",
        )


def check_memory(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """What is certain must fit; what is estimated should."""
    memory, free = plan.memory, plan.memory_free
    where = "the GPU" if plan.device == "cuda" else "this machine"
    if memory.counted > free:
        yield _error(
            f"weights, gradients and optimizer take {memory.counted / _GIB:.1f} GiB, {where} has {free / _GIB:.1f} GiB free",
            "train fewer parameters, or use a device with more memory.",
        )
    elif memory.total > free:
        savings = memory_savings(config)
        yield _warning(
            f"training takes about {memory.total / _GIB:.1f} GiB, {where} has {free / _GIB:.1f} GiB free",
            "; then ".join(savings[:3]) + "." if savings else "use a device with more memory.",
        )


def check_device(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """The machine that plans is one that can train."""
    if config.loop.precision == "fp16" and plan.device == "cpu":
        yield _warning(
            "loop.precision fp16 needs a GPU, and this machine has none: here is what the run takes, but it cannot start",
            "train on a machine with a GPU, or --set loop.precision=bf16.",
        )


def check_disk(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """What will be written fits."""
    for disk in plan.disk:
        if disk.needed > disk.free:
            largest = max(disk.items, key=disk.items.__getitem__)
            yield _error(
                f"the run needs {disk.needed / _GIB:.1f} GiB at {disk.folder}, most of it for {largest}; "
                f"{disk.free / _GIB:.1f} GiB are free",
                "free some space, or let output.runs or output.cache name another disk.",
            )


def check_earlier_run(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """Nothing is in the way."""
    if plan.exists:
        yield _warning(
            f"a run of this name exists: {plan.folder}", "--resume goes on with it; another `name` starts a new one."
        )


def check_notes(plan: Plan, config: RunConfig) -> Iterator[Problem]:
    """A lab's config holds no typing errors."""
    for text in plan.notes.unknown:
        yield _warning(f"unknown key {text}", "correct it, or remove it; it has no effect.")


CHECKS: tuple[Callable[[Plan, RunConfig], Iterator[Problem]], ...] = (
    check_base,
    check_rows,
    check_words,
    check_packing,
    check_axes,
    check_classes,
    check_sides,
    check_lengths,
    check_steps,
    check_memory,
    check_device,
    check_disk,
    check_earlier_run,
    check_notes,
)
