"""Variants of RoboVLMs' policies that are not built: each is refused by its own name, with what it would take.

Facts about RoboVLMs (8adc1d2), its 2-DoF fork (8d65987) and the lab's navigation package on top of it. Values that ask for nothing pass,
and so do keys that the code of these policies never comes to. Knows nothing about weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bundle.errors import UnsupportedPolicyError
from train.robovlms_classes import dataset_of, is_v5, reads_hdf5

_BUILT = "frozen or LoRA Kosmos-2, `post` history, continuous actions, LSTM head"
# The names under which RoboVLMs and the lab's package have the Kosmos-2 backbone.
KOSMOS_BACKBONES = ("RoboKosMos", "RoboVLM-Nav")

_MLP_ONLY = (
    "an action head without states, of one MLP a frame; its policies look at one frame, so nothing else would change"
)
_HEADS = {
    "FCDecoder": _MLP_ONLY,
    "GPTDecoder": "an action head that keeps the features of the window and runs a GPT-2 over them at every tick",
    "DiscreteDecoder": "the LM head and a cache of keys and values in the language stage, which would run once for each number of the "
    "action instead of once a frame",
    "HybridActionHead": "an order of its two directions; RoboVLMs' own trainer cannot build it, since its constructor does not take the "
    "arguments that heads are given",
}


def unknown_head(kind: str, known: Mapping[str, object]) -> UnsupportedPolicyError:
    """The error for a head that is not one of the known LSTM heads."""
    if kind in _HEADS:
        return UnsupportedPolicyError(
            f"this policy uses act_head.type = {kind!r}, which jetvla does not build",
            expected=", ".join(known),
            hint=f"it would take {_HEADS[kind]}. Nothing was written.",
        )
    return UnsupportedPolicyError(
        f"unknown action head {kind!r}",
        expected=", ".join(known),
        hint="only LSTM heads are built; FCDecoder, GPTDecoder and diffusion heads are not.",
    )


@dataclass(frozen=True)
class _Variant:
    """A key that may ask for another policy.

    Attributes:
        key: dotted path.
        plain: whether a value that is there asks, in its config, for nothing.
        takes: what it would take to build what it asks for, or that for a value.
    """

    key: str
    plain: Callable[[Any, Mapping[str, Any]], bool]
    takes: str | Callable[[Any], str]


def _off(value: Any, config: Mapping[str, Any]) -> bool:
    return not value


def _absent(value: Any, config: Mapping[str, Any]) -> bool:
    return value is None


def _one_of(*values: object) -> Callable[[Any, Mapping[str, Any]], bool]:
    return lambda value, config: value in values


def names_kosmos(value: Any, config: Mapping[str, Any]) -> bool:
    """Whether `model` means Kosmos-2.

    Another Kosmos than `kosmos` is a name of folders only, where `robovlm_name` says the backbone and the loader wraps the instruction by
    itself. RoboVLMs' loaders of other data choose the text around it by this key.
    """
    if value == "kosmos":
        return True
    return (
        isinstance(value, str)
        and value.startswith("kosmos")
        and config.get("robovlm_name") in KOSMOS_BACKBONES
        and reads_hdf5(dataset_of(config))
    )


def _other_model(value: Any) -> str:
    if str(value).startswith("kosmos"):
        return (
            "the text that RoboVLMs' loader puts around an instruction under this name; without effect it is with robovlm_name RoboKosMos "
            "and a train_dataset.type of NavDataset or MobileVLAH5Dataset"
        )
    return "that backbone's own stages and prompt"


def _other_space(value: Any) -> str:
    if value == "discrete":
        return (
            "the LM head and one run of the language stage for each number of the action. RoboVLMs gives heads the vocabulary's logits "
            "then, which no LSTM head takes, and learns no action token: a file with `action_token` is of another run, whose config says "
            "continuous"
        )
    return "the decoder's last layer for all slots, and a head that pools them"


def _learns_actions(value: Any, config: Mapping[str, Any]) -> bool:
    """Whether the head was trained. The trainer of the lab's package, which came with its loader of V5, does not ask."""
    return bool(value) or is_v5(dataset_of(config))


_VARIANTS = (
    _Variant("model", names_kosmos, _other_model),
    _Variant("robovlm_name", _one_of(*KOSMOS_BACKBONES), "that backbone's own stages and prompt"),
    _Variant(
        "fwd_head",
        _absent,
        "code that predicts images, which RoboVLMs has not published: its trainer cannot be started with this key",
    ),
    _Variant(
        "tcp_rel",
        _off,
        "the tool's pose at every tick, to turn actions from its frame into the robot's; RoboVLMs' own evaluation fails there",
    ),
    _Variant(
        "regular_action",
        _off,
        "the inverse of x_mean and x_std behind the head, which RoboVLMs' own evaluation does not have either",
    ),
    _Variant(
        "train_setup.predict_action",
        _learns_actions,
        "a head that has learned something: RoboVLMs' trainer learns no action under this key",
    ),
    _Variant(
        "act_head.history_type",
        _one_of("post"),
        "a language stage over all frames of the window at once (`pre`), or over their pictures in one row (`video`), with keys and values "
        "kept from tick to tick",
    ),
    _Variant("act_head.action_space", _one_of("continuous"), _other_space),
    _Variant(
        "act_head.down_sample",
        _one_of("none", "pooling"),
        "a resampler of action tokens, which RoboVLMs' LSTM heads do not have either",
    ),
    _Variant(
        "act_head.fill_zero",
        _off,
        "a mask in the language stage: the action tokens then see neither themselves nor each other",
    ),
    _Variant(
        "act_head.text_in_features",
        _absent,
        "an attention from the LSTM's output to all tokens of the prompt, padding included, whose keys and values an action head would be "
        "given at every reset",
    ),
)


def refuse_variants(config: Mapping[str, Any]) -> None:
    """Refuse a config that asks for a policy that is not built.

    Raises:
        UnsupportedPolicyError: names the key, its value, and what it would take.
    """
    for variant in _VARIANTS:
        section, _, leaf = variant.key.rpartition(".")
        values = config.get(section) if section else config
        if not isinstance(values, Mapping) or leaf not in values:
            continue
        value = values[leaf]
        if not variant.plain(value, config):
            takes = variant.takes if isinstance(variant.takes, str) else variant.takes(value)
            raise UnsupportedPolicyError(
                f"this policy uses {variant.key} = {value!r}, which jetvla does not build",
                expected=_BUILT,
                hint=f"it would take {takes}. Nothing was written.",
            )
