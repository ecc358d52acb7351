"""Finds out packing and resampler masking from a training episode: only the right ones make the policy predict it.

No checkpoint records either (docs/decisions/0004-unrecorded-conventions.md), and all combinations load without an error. But a
trained policy reproduces the actions it was trained on, and under a wrong layout it does not. So each hypothesis plays the episode
through the reference, and one is taken only if it predicts clearly better than the others and than a constant.
"""

from __future__ import annotations

from itertools import product
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bundle.errors import ConfigError, PromptError
from bundle.manifest import Action, Packing
from export.action_spec import action_spec
from export.config import BuildConfig
from export.console import Reporter, plain_table
from export.plan import preprocessing_of, tokens_of
from runtime.actions import denormalize
from runtime.replay import ResizedEpisode, read_resized
from train.checkpoint import LoadedPolicy
from train.policy import Conventions, ReferenceStream

# The best hypothesis must have at most this share of the error of the next one, and of the constant prediction.
_CLEAR = 0.8


def provisional_packing(config: BuildConfig) -> Packing | Literal["auto"]:
    """The packing to load with: any will do if an episode is going to decide."""
    return "upstream" if config.packing == "auto" and config.infer_from is not None else config.packing


def infer_conventions(config: BuildConfig, loaded: LoadedPolicy, reporter: Reporter) -> None:
    """Set the policy's conventions to those that predict `config.infer_from`; what the user stated stays.

    Raises:
        ConfigError: no hypothesis is clearly better, or the episode has none of the policy's actions.
        PromptError: no instruction, or no tokenizer.
        EpisodeError: the episode cannot be read.
    """
    assert config.infer_from is not None
    policy = loaded.policy
    preprocessing = preprocessing_of(config, loaded)
    episode = read_resized(config.infer_from, preprocessing, loaded.base.kosmos.vision_config.image_size)
    if episode.instruction is None:
        raise PromptError(f"{config.infer_from} has no instruction", hint="choose a training episode that has one.")
    ids = np.array(tokens_of(episode.instruction, config, loaded))
    action = action_spec(policy.spec, config, loaded.facts)
    columns = [action.names.index(name) for name in episode.action_names if name in action.names]
    if not columns:
        raise ConfigError(
            f"{config.infer_from} and the policy have no action in common",
            got=", ".join(episode.action_names),
            expected=", ".join(action.names),
            hint="name the policy's axes: --action-names linear_x linear_y",
        )
    recorded = _as_trained(episode, action, columns)
    hypotheses = _hypotheses(config, loaded)
    errors = []
    with reporter.count_bar("inferring conventions", len(hypotheses) * len(episode.frames)) as advance:
        for hypothesis in hypotheses:
            policy.conventions = hypothesis
            stream = ReferenceStream(policy, ids, np.ones_like(ids), mean=preprocessing.mean, std=preprocessing.std)
            predicted = []
            for frames in episode.frames:
                predicted.append(denormalize(stream.step(frames).action, action)[0, columns])
                advance()
            errors.append(float(np.sqrt(np.mean((np.array(predicted) - recorded) ** 2))))
    constant = float(np.sqrt(np.mean((recorded - recorded.mean(axis=0)) ** 2)))
    table = plain_table("packing", "x_attn_causal", "RMSE on the episode")
    for hypothesis, error in zip(hypotheses, errors, strict=True):
        table.add_row(hypothesis.packing, str(hypothesis.x_attn_causal), f"{error:.4f}")
    table.add_row("a constant", "", f"{constant:.4f}")
    reporter.table(table)
    order = np.argsort(errors)
    rivals = [constant] + [errors[index] for index in order[1:2]]
    if errors[order[0]] > _CLEAR * min(rivals):
        raise ConfigError(
            f"{config.infer_from} does not tell how the policy was trained",
            got=f"best RMSE {errors[order[0]]:.4f}, next {min(rivals):.4f}",
            expected=f"the best below {_CLEAR:.0%} of the next and of a constant",
            hint="use an episode of the training set, state --action-range, or state --packing and --x-attn-causal yourself.",
        )
    policy.conventions = hypotheses[order[0]]


def _hypotheses(config: BuildConfig, loaded: LoadedPolicy) -> list[Conventions]:
    """All combinations of what is not stated."""
    spec = loaded.policy.spec
    packings = get_args(Packing) if config.packing == "auto" else (config.packing,)
    if spec.hand_camera or spec.head.latent > 1:
        packings = ("upstream",)
    masks = (False, True) if config.x_attn_causal is None else (config.x_attn_causal,)
    name = config.infer_from.name if config.infer_from is not None else ""
    sources = {True: f"inferred from {name}", False: "stated by the user"}
    return [
        Conventions(packing, sources[config.packing == "auto"], mask, sources[config.x_attn_causal is None])
        for packing, mask in product(packings, masks)
    ]


def _as_trained(episode: ResizedEpisode, action: Action, columns: list[int]) -> NDArray[np.float32]:
    """The recorded actions in the policy's column order, clipped to what it can express, as training clips them."""
    taken = [episode.action_names.index(action.names[column]) for column in columns]
    recorded = episode.actions[:, taken]
    return np.clip(recorded, action.minimum, action.maximum) if action.normalized else recorded
