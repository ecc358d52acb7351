"""Finds out packing, resampler masking and the prompt's text from a training episode: only the right ones make the policy predict it.

No checkpoint records them (docs/decisions/0004-unrecorded-conventions.md), and all combinations load without an error. But a
trained policy reproduces the actions it was trained on, and under a wrong layout it does not. So each hypothesis plays the episode
through the reference, and one is taken only if it predicts clearly better than the others and than a constant. A policy may hardly care
for its prompt; an episode that tells the layout but not the text leaves the text at what the config says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bundle.errors import ConfigError, PromptError
from bundle.manifest import Action, Packing
from bundle.prompt_template import TEMPLATES, fill, takes_words
from bundle.tokenization import tokenize
from export.action_spec import action_spec
from export.config import BuildConfig
from export.console import Reporter, plain_table
from export.plan import preprocessing_of, tokenizer_of
from runtime.actions import denormalize
from runtime.prompt import Layout, layout
from runtime.replay import ResizedEpisode, read_resized
from runtime.tokenizer import TOKENIZER_NAME
from train.action_classes import classes_of_action
from train.checkpoint import LoadedPolicy
from train.config import PolicySpec
from train.policy import Conventions, KosmosPolicy, normalize_frames
from train.robovlms_prompt import NAV_PAD_TO

# The best hypothesis must have at most this share of the error of the next one, and of the constant prediction.
_CLEAR = 0.8


@dataclass(frozen=True)
class Hypothesis:
    """How a policy may have been trained."""

    conventions: Conventions
    template: str
    pad_to: int | None

    @property
    def prompt(self) -> tuple[str, int | None]:
        return self.template, self.pad_to


@dataclass(frozen=True)
class _Recorded:
    """What an episode expects of a policy.

    Attributes:
        action: the policy's.
        columns: of its commands that are compared.
        commands: float32 [T, len(columns)].
        labels: int64 [T] of a class head, else None.
    """

    action: Action
    columns: list[int]
    commands: NDArray[np.float32]
    labels: NDArray[np.int64] | None

    def error(self, heads: Sequence[NDArray[np.float32]]) -> float:
        """Of the head's numbers [n, A] for each frame: RMSE of the command for now, or for classes the mean surprise, in nats."""
        if self.labels is None:
            predicted = np.array([denormalize(head, self.action)[0, self.columns] for head in heads])
            return float(np.sqrt(np.mean((predicted - self.commands) ** 2)))
        logits = np.array([head[0] for head in heads], np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        surprise = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), self.labels]
        return float(surprise.mean())

    @property
    def constant(self) -> float:
        """The error of the best constant prediction."""
        if self.labels is None:
            return float(np.sqrt(np.mean((self.commands - self.commands.mean(axis=0)) ** 2)))
        shares = np.bincount(self.labels) / len(self.labels)
        return float(-np.sum(shares[shares > 0] * np.log(shares[shares > 0])))


def provisional_packing(config: BuildConfig) -> Packing | Literal["auto"]:
    """The packing to load with: any will do if an episode is going to decide."""
    return "upstream" if config.packing == "auto" and config.infer_from is not None else config.packing


def infer_conventions(config: BuildConfig, loaded: LoadedPolicy, reporter: Reporter) -> None:
    """Set the policy's conventions and prompt to those that predict `config.infer_from`; what the user stated stays.

    Raises:
        ConfigError: no hypothesis is clearly better, or the episode has none of the policy's actions.
        PromptError: no instruction, or no tokenizer.
        EpisodeError: the episode cannot be read.
    """
    assert config.infer_from is not None
    policy = loaded.policy
    preprocessing = preprocessing_of(config, loaded)
    episode = read_resized(config.infer_from, preprocessing, loaded.base.kosmos.vision_config.image_size)
    spec = policy.spec
    told = episode.instruction if takes_words(spec.prompt_template) else ""
    if told is None:
        raise PromptError(f"{config.infer_from} has no instruction", hint="choose a training episode that has one.")
    recorded = _recorded(config, loaded, episode)
    candidates = _distinct(_hypotheses(config, spec, told), told, config, loaded)
    images: dict[tuple[bool, bool], Tensor] = {}
    errors = []
    with reporter.count_bar("inferring conventions", len(candidates)) as advance, torch.inference_mode():
        for hypothesis, slots, ids in candidates:
            policy.conventions = hypothesis.conventions
            seen = hypothesis.conventions.x_attn_causal, policy.resamples
            if seen not in images:
                images[seen] = torch.stack(
                    [
                        policy.image_tokens(normalize_frames(frames, preprocessing.mean, preprocessing.std)).flatten(
                            0, 1
                        )
                        for frames in episode.frames
                    ]
                )
            errors.append(recorded.error(_play(policy, images[seen], slots, ids)))
            advance()
    hypotheses = [hypothesis for hypothesis, *_ in candidates]
    _show(hypotheses, errors, recorded, reporter)
    _decide(config, loaded, hypotheses, errors, recorded.constant, reporter)


def _play(policy: KosmosPolicy, images: Tensor, slots: Layout, ids: Sequence[int]) -> list[NDArray[np.float32]]:
    """The head's numbers [n, A] for each frame, as from a reset. Masked slots are not computed: what stays keeps its position.

    Args:
        images: image tokens [T, N, D].
        ids: the prompt, padding included.
    """
    text = policy.backbone.text_model.model
    words = text.embed_tokens(torch.from_numpy(np.maximum(slots.token, 0)))
    words[slots.token < 0] = policy.action_token
    shown = slots.image >= 0
    positions = torch.from_numpy(slots.position)[None] + text.embed_positions.padding_idx + 1
    features = []
    for image in images:
        row = words.clone()
        row[shown] = image[slots.image[shown]]
        hidden = text(inputs_embeds=row[None], position_ids=positions, use_cache=False).last_hidden_state
        feature = policy.act_head.reduce(hidden[:, -slots.latent :])
        features.append(policy.act_head.tell(feature, text.embed_tokens(torch.tensor([list(ids)])))[0])
    window = policy.spec.window
    return [
        policy.act_head(torch.stack(features[max(0, end - window) : end])[None])[0, -1].numpy()
        for end in range(1, len(features) + 1)
    ]


def _recorded(config: BuildConfig, loaded: LoadedPolicy, episode: ResizedEpisode) -> _Recorded:
    """The episode's actions in the policy's column order, clipped to what it can express, as training clips them."""
    action = action_spec(loaded.policy.spec, config, loaded.facts)
    columns = [action.names.index(name) for name in episode.action_names if name in action.names]
    if not columns:
        raise ConfigError(
            f"{config.infer_from} and the policy have no action in common",
            got=", ".join(episode.action_names),
            expected=", ".join(action.names),
            hint="name the policy's axes: --action-names linear_x linear_y",
        )
    taken = [episode.action_names.index(action.names[column]) for column in columns]
    commands = episode.actions[:, taken]
    if action.normalized:
        commands = np.clip(commands, action.minimum, action.maximum)
    labels = None
    if action.head == "classes":
        labels = classes_of_action(action).labels(episode.actions, episode.action_names)
    return _Recorded(action, columns, commands, labels)


def _hypotheses(config: BuildConfig, spec: PolicySpec, told: str) -> list[Hypothesis]:
    """All combinations of what is not stated, what the config says first."""
    packings = get_args(Packing) if config.packing == "auto" else (config.packing,)
    if spec.hand_camera or spec.head.latent > 1:
        packings = ("upstream",)
    masks = (False, True) if config.x_attn_causal is None else (config.x_attn_causal,)
    name = config.infer_from.name if config.infer_from is not None else ""
    sources = {True: f"inferred from {name}", False: "stated by the user"}
    conventions = [
        Conventions(packing, sources[config.packing == "auto"], mask, sources[config.x_attn_causal is None])
        for packing, mask in product(packings, masks)
    ]
    return [Hypothesis(each, *prompt) for each, prompt in product(conventions, _prompts(config, spec, told))]


def _prompts(config: BuildConfig, spec: PolicySpec, told: str) -> list[tuple[str, int | None]]:
    """Text and padding; those that the instruction does not go into cannot be meant."""
    open_text = (
        config.prompt_template is None and spec.prompt_source != "recorded" and takes_words(spec.prompt_template)
    )
    open_padding = config.pad_prompt_to is None and spec.prompt_source != "recorded"
    texts = (spec.prompt_template, *TEMPLATES) if open_text else (spec.prompt_template,)
    lengths = (spec.pad_to, None, NAV_PAD_TO) if open_padding else (spec.pad_to,)
    return [(text, length) for text, length in dict.fromkeys(product(texts, lengths)) if _goes_into(text, told)]


def _goes_into(template: str, told: str) -> bool:
    try:
        fill(template, told)
    except PromptError:
        return False
    return True


def _distinct(
    hypotheses: Sequence[Hypothesis], told: str, config: BuildConfig, loaded: LoadedPolicy
) -> list[tuple[Hypothesis, Layout, tuple[int, ...]]]:
    """Those that the policy can tell apart, with their rows and token ids; under fork_overwrite many texts look alike.

    Raises:
        PromptError: no tokenizer.
    """
    tokenizer = tokenizer_of(config, loaded) or Path(TOKENIZER_NAME)
    kosmos, spec = loaded.base.kosmos, loaded.policy.spec
    pad_id = kosmos.text_config.pad_token_id
    found: dict[object, tuple[Hypothesis, Layout, tuple[int, ...]]] = {}
    if not hypotheses:  # the config's own text refuses the instruction: say why
        fill(spec.prompt_template, told)
    for hypothesis in hypotheses:
        ids = tokenize(told, hypothesis.template, tokenizer)
        if hypothesis.pad_to is not None and len(ids) > hypothesis.pad_to:
            continue
        padded = (*ids, *[pad_id] * ((hypothesis.pad_to or 0) - len(ids)))
        slots = layout(
            padded,
            packing=hypothesis.conventions.packing,
            image_tokens=kosmos.latent_query_num * (2 if spec.hand_camera else 1),
            latent=spec.head.latent,
            pad_id=pad_id,
        )
        row = (slots.token.tobytes(), slots.image.tobytes(), slots.position.tobytes())
        heard = padded if spec.head.told else ()
        found.setdefault((hypothesis.conventions, row, heard), (hypothesis, slots, padded))
    return list(found.values())


def _show(hypotheses: Sequence[Hypothesis], errors: Sequence[float], recorded: _Recorded, reporter: Reporter) -> None:
    measure = "RMSE" if recorded.labels is None else "surprise"
    table = plain_table("packing", "x_attn_causal", "prompt", "padded to", f"{measure} on the episode")
    for each, error in zip(hypotheses, errors, strict=True):
        padded = "" if each.pad_to is None else str(each.pad_to)
        table.add_row(
            each.conventions.packing, str(each.conventions.x_attn_causal), each.template, padded, f"{error:.4f}"
        )
    table.add_row("a constant", "", "", "", f"{recorded.constant:.4f}")
    reporter.table(table)


def _decide(
    config: BuildConfig,
    loaded: LoadedPolicy,
    hypotheses: Sequence[Hypothesis],
    errors: Sequence[float],
    constant: float,
    reporter: Reporter,
) -> None:
    """Take the best, if its conventions are clearly better than others; and its prompt, if that is."""
    policy = loaded.policy
    best, least = hypotheses[int(np.argmin(errors))], min(errors)

    def next_error(others: Callable[[Hypothesis], bool]) -> float:
        return min((error for each, error in zip(hypotheses, errors, strict=True) if others(each)), default=math.inf)

    rival = min(constant, next_error(lambda each: each.conventions != best.conventions))
    if least > _CLEAR * rival:
        raise ConfigError(
            f"{config.infer_from} does not tell how the policy was trained",
            got=f"best error {least:.4f}, next {rival:.4f}",
            expected=f"the best below {_CLEAR:.0%} of the next and of a constant",
            hint="use an episode of the training set, state --action-range, or state --packing and --x-attn-causal yourself.",
        )
    policy.conventions = best.conventions
    rival = next_error(lambda each: each.conventions == best.conventions and each.prompt != best.prompt)
    if rival == math.inf:
        return
    spec = policy.spec
    if least <= _CLEAR * rival:
        source = f"inferred from {config.infer_from.name}" if config.infer_from is not None else ""
        policy.spec = replace(spec, prompt_template=best.template, pad_to=best.pad_to, prompt_source=source)
    else:
        reporter.warn(
            f"the episode does not tell the text of the prompt (errors {least:.4f} and {rival:.4f}); {spec.prompt_template!r} is kept "
            f"({spec.prompt_source}). --prompt-template and --pad-prompt-to state it."
        )
