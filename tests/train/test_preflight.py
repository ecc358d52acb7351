"""The plan of a run, what is checked on it, and how it reads."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from bundle.errors import ConfigError
from tests.ledgers import facts
from tests.train.test_run_config import config
from tests.training_data import LEFT, RIGHT, episode, write_v1
from train import preflight_checks as checks
from train.action_classes import NINE
from train.data_facts import axis_facts, class_facts, instruction_facts, part_facts
from train.ledger import Ledger
from train.load_config import LoadedConfig, Notes, load_run_config
from train.preflight import DiskFacts, Plan, preflight
from train.preflight_files import Problem, file_problems, refuse, require_files
from train.preflight_view import render
from train.run_setup import Gathered, gather
from train.synthetic import SyntheticFiles

TOML = """
name = "run"
[base]
model = "{base}"
[data]
sources = [{{files = ["episodes/*.h5"]}}]
[loop]
epochs = 3
accumulate = 2
"""


@pytest.fixture(scope="module")
def folder(fork: SyntheticFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, a base and eight episodes, half of them to the left."""
    root = tmp_path_factory.mktemp("run")
    (root / "episodes").mkdir()
    for index in range(8):
        write_v1(root / "episodes", f"e{index}.h5", length=10 + index, instruction=RIGHT if index % 2 else LEFT)
    (root / "run.toml").write_text(TOML.format(base=fork.base))
    return root


@pytest.fixture(scope="module")
def planned(folder: Path) -> tuple[LoadedConfig, Gathered, Plan]:
    loaded = load_run_config(folder / "run.toml")
    gathered = gather(loaded)
    return loaded, gathered, preflight(loaded, gathered, device="cpu")


@pytest.fixture
def plan(planned: tuple[LoadedConfig, Gathered, Plan]) -> Plan:
    return planned[2]


def text_of(problems: Iterable[Problem]) -> str:
    return "\n".join(f"{problem.severity}: {problem.what} | {problem.hint}" for problem in problems)


def shown(plan: Plan, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(render(plan))
    return capture.get()


class TestPlan:
    def test_counts(self, plan: Plan) -> None:
        assert (plan.train.episodes, plan.val.episodes) == (6, 2)
        assert plan.train.frames + plan.val.frames == sum(range(10, 18))
        assert plan.train.windows == plan.train.frames - 6 * 7
        assert plan.train.sides["left"] == plan.train.sides["right"] == 3
        assert plan.train.kinds == {"real": 6}

    def test_steps(self, plan: Plan) -> None:
        assert plan.steps_per_epoch == -(-plan.train.windows // 2)
        assert plan.steps == 3 * plan.steps_per_epoch

    def test_actions(self, planned: tuple[LoadedConfig, Gathered, Plan]) -> None:
        _, gathered, plan = planned
        actions = np.concatenate([each.actions for each in gathered.train])
        assert [axis.name for axis in plan.axes] == ["linear_x", "linear_y"]
        assert plan.axes[0].maximum == pytest.approx(actions[:, 0].max())
        assert plan.axes[1].mean == pytest.approx(actions[:, 1].mean())
        assert all(axis.clipped == 0 for axis in plan.axes)
        assert sum(plan.classes.values()) == plan.train.frames

    def test_instructions_are_tokenised(self, plan: Plan) -> None:
        assert {each.text for each in plan.instructions} == {LEFT, RIGHT}
        assert all(each.tokens > 10 and each.train == 3 and each.val == 1 for each in plan.instructions)

    def test_nothing_speaks_against_it(self, plan: Plan) -> None:
        assert plan.problems == ()

    def test_disk(self, planned: tuple[LoadedConfig, Gathered, Plan]) -> None:
        _, gathered, plan = planned
        (disk,) = plan.disk
        assert disk.items["resized frames"] == gathered.store.bytes_needed(gathered.episodes)
        assert disk.items["checkpoints"] == 5 * 4 * plan.parameters.trained
        assert "image tokens" not in disk.items
        assert disk.needed == sum(disk.items.values())

    def test_image_tokens_are_counted_where_they_are_cached(self, folder: Path) -> None:
        overrides = ["model.lora.targets=text", "augment.mirror=0.5", "output.lightning=true"]
        loaded = load_run_config(folder / "run.toml", overrides)
        plan = preflight(loaded, gather(loaded), device="cpu")
        (disk,) = plan.disk
        per_frame = disk.items["image tokens"] / (2 * plan.train.frames + plan.val.frames)
        assert per_frame == int(per_frame) > 0
        assert disk.items["checkpoint in RoboVLMs' layout"] == 4 * plan.parameters.total

    def test_plain_data(self, plan: Plan) -> None:
        plain = json.loads(json.dumps(plan.as_json()))
        assert plain["memory"]["total"] == plan.memory.total
        assert plain["disk"][0]["needed"] == plan.disk[0].needed
        assert plain["folder"] == str(plan.folder)
        assert plain["train"]["episodes"] == 6

    def test_all_errors_are_told_at_once(self, planned: tuple[LoadedConfig, Gathered, Plan], monkeypatch: Any) -> None:
        loaded, gathered, _ = planned
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1))
        with pytest.raises(ConfigError) as caught:
            preflight(loaded, gathered, device="cpu", processes=3)
        message = str(caught.value)
        assert "3 things stand in the way of the run run" in message
        assert "needs" in message
        assert "optimizer take" in message
        assert "3 processes" in message

    def test_an_earlier_run(self, planned: tuple[LoadedConfig, Gathered, Plan]) -> None:
        loaded, gathered, _ = planned
        ledger = Ledger.start(gathered.folder, **facts())
        ledger.stop("for a while")
        try:
            assert "warning: a run of this name exists" in text_of(preflight(loaded, gathered, device="cpu").problems)
            assert preflight(loaded, gathered, device="cpu", resume=True).problems == ()
            Ledger.resume(gathered.folder, **facts(), from_step=0).finish()
            with pytest.raises(ConfigError, match="is finished: 0 epochs"):
                preflight(loaded, gathered, device="cpu", resume=True)
            with pytest.raises(ConfigError, match="a run of this name exists"):
                preflight(loaded, gathered, device="cpu", resume=False)
        finally:
            shutil.rmtree(gathered.folder)
        with pytest.raises(ConfigError, match="there is no run to resume"):
            preflight(loaded, gathered, device="cpu", resume=True)


class TestView:
    def test_it_says_what_people_ask(self, plan: Plan) -> None:
        text = shown(plan)
        for part in ("run run", "run.toml", plan.base_sha256[:12], LEFT, "training", "linear_y"):
            assert part in text
        assert f"{plan.steps:,} ({plan.steps_per_epoch:,} in an epoch)" in text
        assert max(map(len, text.splitlines())) <= 100

    def test_notes_and_problems_stand_at_the_end(self, plan: Plan) -> None:
        notes = Notes(
            ignored=("optimizer", "tokenizer"), assumed=("packing: [right] layout",), unknown=("a: did you mean b?",)
        )
        problem = Problem("warning", "94% of [linear_x] is clipped", "a [hint]")
        error = Problem("error", "no disk", "buy one")  # with the other errors, by whoever ends
        text = shown(replace(plan, notes=notes, problems=(problem, error)))
        assert "no disk" not in text
        assert "- packing: [right] layout" in text
        assert "2 keys without effect, here as there" in text
        assert "optimizer, tokenizer" in " ".join(text.split())
        assert text.rstrip().endswith("warning: 94% of [linear_x] is clipped\n  a [hint]")

    def test_many_instructions_are_cut_short(self, plan: Plan) -> None:
        text = shown(replace(plan, instructions=plan.instructions * 6))
        assert "and 4 more" in text


class TestChecks:
    def test_another_base(self, plan: Plan) -> None:
        stated = config(base={"model": "x", "sha256": "0" * 64})
        assert "error: base.sha256 is 000000000000" in text_of(checks.check_base(plan, stated))
        same = config(base={"model": "x", "sha256": plan.base_sha256})
        assert not text_of(checks.check_base(plan, same))

    def test_rows_that_are_too_long(self, plan: Plan) -> None:
        full = replace(plan, positions=plan.memory.slots)
        assert not text_of(checks.check_rows(full, config()))
        assert "error: a row of" in text_of(checks.check_rows(replace(plan, positions=plan.memory.slots - 1), config()))

    def test_one_instruction_only(self, plan: Plan) -> None:
        one = replace(plan, instructions=plan.instructions[:1])
        assert "one instruction" in text_of(checks.check_words(one, config()))
        assert not text_of(checks.check_words(one, config(augment={"mirror": 0.5})))
        assert not text_of(checks.check_words(one, config(augment={"stop": 0.1})))  # there is something else to be told
        assert not text_of(checks.check_words(plan, config()))

    def test_words_that_are_invisible(self, plan: Plan) -> None:
        assert "will not see the words" in text_of(
            checks.check_packing(plan, config(model={"packing": "fork_overwrite"}))
        )
        assert not text_of(checks.check_packing(plan, config()))
        told = {"head": "classes", "packing": "fork_overwrite", "instruction_in_head": True}
        assert "but hear their mean in its head" in text_of(checks.check_packing(plan, config(model=told)))

    def test_axes(self, plan: Plan) -> None:
        still = replace(plan.axes[0], minimum=0.0, maximum=0.0)
        cut = replace(plan.axes[1], minimum=-1.15, maximum=1.15, clipped=0.06)
        text = text_of(checks.check_axes(replace(plan, axes=(still, cut), action_range=(-1.0, 1.0)), config()))
        assert "linear_x is 0 in every training frame" in text
        assert "6% of linear_y is clipped: it reaches -1.15 to 1.15, data.action_range is -1 to 1" in text
        few = replace(plan, axes=(replace(cut, clipped=0.05),))
        assert not text_of(checks.check_axes(few, config()))

    def test_classes(self, plan: Plan) -> None:
        absent = replace(plan, classes={"stop": 3, "backward": 0})
        assert "of class backward" in text_of(checks.check_classes(absent, config(model={"head": "classes"})))
        assert not text_of(checks.check_classes(absent, config()))
        told = config(model={"head": "classes"}, augment={"steer": 0.1, "turn_words": []})
        text = text_of(checks.check_classes(replace(plan, classes={"F": 3, "B": 0, "L": 0, "R": 0}), told))
        assert "no training frame is of class B |" in text  # windows that are told to go left and right are labelled so

    @pytest.mark.parametrize(
        ("left", "right", "mirror", "warned"),
        [
            (7, 3, 0.0, ""),
            (71, 29, 0.0, "71%"),
            (10, 0, 0.0, "100%"),
            (10, 0, 0.5, ""),
            (0, 10, 0.2, "80%"),
            (0, 0, 0.0, ""),
        ],
    )
    def test_sides(self, plan: Plan, left: int, right: int, mirror: float, warned: str) -> None:
        part = replace(plan.train, sides={"left": left, "right": right, "none": 5})
        text = text_of(checks.check_sides(replace(plan, train=part), config(augment={"mirror": mirror})))
        assert bool(text) == bool(warned)
        assert warned in text

    def test_short_episodes(self, plan: Plan) -> None:
        short = replace(plan, val=replace(plan.val, short=2))
        assert "2 of 2 validation episodes are shorter" in text_of(checks.check_lengths(short, config()))

    def test_a_warm_up_that_never_ends(self, plan: Plan) -> None:
        assert "warm-up" in text_of(checks.check_steps(replace(plan, warmup_steps=plan.steps), config()))
        assert not text_of(checks.check_steps(replace(plan, warmup_steps=plan.steps - 1), config()))

    def test_memory(self, plan: Plan) -> None:
        memory = plan.memory
        enough = replace(plan, memory_free=memory.total)
        tight = replace(plan, memory_free=memory.total - 1)
        too_little = replace(plan, memory_free=memory.counted - 1)
        assert not text_of(checks.check_memory(enough, config()))
        assert text_of(checks.check_memory(tight, config())).startswith("warning: training takes about")
        assert "gradient_checkpointing" in text_of(checks.check_memory(tight, config()))
        assert text_of(checks.check_memory(too_little, config())).startswith(
            "error: weights, gradients and optimizer take"
        )

    def test_disk(self, plan: Plan) -> None:
        full = DiskFacts(Path("/disk"), {"checkpoints": 1 << 30, "resized frames": 3 << 30}, free=(4 << 30) - 1)
        text = text_of(checks.check_disk(replace(plan, disk=(full,)), config()))
        assert "error: the run needs 4.0 GiB at /disk, most of it for resized frames" in text
        assert not text_of(checks.check_disk(replace(plan, disk=(replace(full, free=4 << 30),)), config()))

    def test_unknown_keys_of_a_lab(self, plan: Plan) -> None:
        noted = replace(plan, notes=Notes(unknown=("learnig_rate: did you mean learning_rate?",)))
        assert "warning: unknown key learnig_rate" in text_of(checks.check_notes(noted, config()))


class TestFiles:
    def problems(self, root: Path, **sections: Any) -> str:
        loaded = LoadedConfig(config(**sections), root)
        return "\n".join(problem.what for problem in file_problems(loaded))

    def test_a_run_that_has_everything(self, folder: Path) -> None:
        require_files(load_run_config(folder / "run.toml"), resume=False)

    def test_everything_that_is_missing_is_told_at_once(self, tmp_path: Path) -> None:
        loaded = LoadedConfig(config(base={"model": "no", "weights": "no.pt"}, data={"split": "no.json"}), tmp_path)
        with pytest.raises(ConfigError) as caught:
            require_files(loaded)
        message = str(caught.value)
        assert "4 things stand in the way" in message
        for part in (
            f"base.model does not exist: {tmp_path}/no",
            "base.weights does not exist",
            "no episodes match",
            "data.split",
        ):
            assert part in message

    def test_a_base_that_is_not_whole(self, tmp_path: Path) -> None:
        (tmp_path / "kosmos").mkdir()
        text = self.problems(tmp_path)
        assert all(
            f"base.model lacks {name}" in text for name in ("config.json", "tokenizer.json", "model.safetensors")
        )

    def test_pickled_weights_are_not_enough(self, tmp_path: Path) -> None:
        (tmp_path / "kosmos").mkdir()
        (tmp_path / "kosmos" / "pytorch_model.bin").touch()
        found = file_problems(LoadedConfig(config(), tmp_path))
        assert any("pickled" in problem.hint for problem in found)

    def test_weights_that_are_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "deepspeed").mkdir()
        assert "base.weights is a folder" in self.problems(tmp_path, base={"model": "x", "weights": "deepspeed"})

    def test_an_output_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        text = self.problems(tmp_path, output={"runs": "file/runs", "cache": "file"})
        assert "output.runs is below a file" in text
        assert "output.cache is below a file" in text

    def test_one_problem_speaks_for_itself(self) -> None:
        with pytest.raises(ConfigError, match=r"^what\n\nhint: mend it$"):
            refuse([Problem("error", "what", "mend it"), Problem("warning", "odd", "look")], name="run")
        refuse([Problem("warning", "odd", "look")], name="run")


class TestFacts:
    def test_parts(self) -> None:
        part = part_facts(
            [episode("a.h5", length=3), episode("b.h5", length=10, instruction=RIGHT, kind="sim")], window=8
        )
        assert (part.episodes, part.frames, part.windows, part.short) == (2, 13, 4, 1)
        assert (part.kinds, part.sides) == ({"real": 1, "sim": 1}, {"left": 1, "right": 1})

    def test_axes(self) -> None:
        actions = np.array([[0.0, -1.15], [1.0, 1.15], [0.5, 0.0], [0.5, 1.0]], np.float32)
        x, y = axis_facts([episode("a.h5", actions=actions)], ("linear_x", "linear_y"), (-1.0, 1.0))
        assert (x.minimum, x.maximum, x.mean, x.zero, x.clipped) == (0, 1, 0.5, 0.25, 0)
        assert (y.zero, y.clipped) == (0.25, 0.5)

    def test_values_on_the_edge_of_the_range_are_not_clipped(self) -> None:
        actions = np.full((4, 1), 1.15, np.float32)
        (axis,) = axis_facts([episode("a.h5", actions=actions, names=("linear_x",))], ("linear_x",), (-1.15, 1.15))
        assert axis.clipped == 0

    def test_classes(self) -> None:
        actions = np.array([[0, 0], [1, 0], [1, 0], [0, 1]], np.float32)
        counts = class_facts([episode("a.h5", actions=actions)], ("linear_x", "linear_y"), NINE)
        assert {name: count for name, count in counts.items() if count} == {"Stop": 1, "F": 2, "L": 1}
        assert len(counts) == 9

    def test_instructions(self) -> None:
        train, val = [episode("a.h5"), episode("b.h5"), episode("c.h5", instruction=RIGHT)], [episode("d.h5")]
        first, second = instruction_facts(train, val, {LEFT: [0, 3, 3, 2], RIGHT: [0, 5, 2]}, 3)
        assert (first.text, first.tokens, first.unknown, first.train, first.val) == (LEFT, 4, 2, 2, 1)
        assert (second.unknown, second.train, second.val) == (0, 1, 0)


def test_words_without_a_token_are_found(folder: Path, fork: SyntheticFiles, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(fork.base, base)
    words = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *LEFT.split()])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(base / "tokenizer.json"))
    loaded = load_run_config(folder / "run.toml", [f"base.model={base}", "data.prompt_template={instruction}"])

    plan = preflight(loaded, gather(loaded), device="cpu")

    assert {each.text: each.unknown for each in plan.instructions} == {LEFT: 0, RIGHT: 1}
    assert f"warning: the tokenizer does not know all of 1 instructions, e.g. '{RIGHT}'" in text_of(plan.problems)
