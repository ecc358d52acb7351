"""What a RoboVLMs config says about the policy, typed, checked, and with every refusal by name.

RoboVLMs configs hold some hundred keys, many of them ignored by the code that wrote them. Here stand those that decide what the
network computes, and what the numbers it gives mean. Knows nothing about weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.errors import ConfigError, UnsupportedPolicyError
from bundle.manifest import HeadKind
from bundle.prompt_template import UPSTREAM
from bundle.reading_limits import is_there
from bundle.reading_limits import read_json as limited_json
from episodes.resize import ResizeFilter
from train.robovlms_classes import class_order, lab_resize
from train.robovlms_prompt import lab_prompt
from train.robovlms_variants import refuse_variants, unknown_head

HEADS: dict[str, HeadKind] = {
    "LSTMDecoder": "actions_gripper",
    "MobileVLALSTMDecoder": "velocities",
    "MobileVLAClassificationDecoder": "classes",
    # The lab's names for the same two.
    "NavPolicyRegression": "velocities",
    "NavPolicy": "classes",
}
_MU_DEFAULT = 255.0
_MOST_PARENTS = 16
# Sizes far beyond every policy's; building the outline of a larger one would take for ever.
_MOST = 1 << 16
_MOST_BY_KEY = {
    "num_layers": 64,
    "latent": 1 << 10,
    "window_size": 1 << 12,
    "fwd_pred_next_n": 1 << 12,
    "image_size": 1 << 13,
}


@dataclass(frozen=True)
class HeadSpec:
    """The LSTM action head. `outputs` is the width of one chunk step: velocities (+ gripper logit), or classes.

    `told` says that the head hears the instruction beside the feature: the mean of the prompt's word embeddings, projected, is added to it.
    """

    kind: HeadKind
    outputs: int
    hidden: int
    layers: int
    latent: int
    pooling: bool
    told: bool = False


@dataclass(frozen=True)
class LoraSpec:
    """Adapters: W += (alpha / r) B A on each adapted Linear; dropout on A's input acts in training only."""

    r: int
    alpha: float
    dropout: float = 0.0

    @property
    def scaling(self) -> float:
        return self.alpha / self.r


@dataclass(frozen=True)
class PolicySpec:
    """Everything in a config that decides what the policy computes and means.

    `normalized` says that actions were scaled from [minimum, maximum] to [-1, 1] in training; `mu` is set for mu-law companding.
    `fork` marks the 2-DoF fork's trainer or heads, for which the packing must be asked. `pad_to` is the length of every prompt in tokens,
    None where it has its own; `prompt_source` says where text and length are from. `classes` are those of a class head in order, empty
    where they must be stated; `classes_source` says where the order is from, or why there is none. `resize` is how the loader that the
    config names resized frames; `vision_resampler` says that RoboVLMs' own resampler stands behind Kosmos-2's.
    """

    head: HeadSpec
    lora: LoraSpec | None
    window: int
    chunk: int
    image_size: int
    hand_camera: bool
    normalized: bool
    minimum: float
    maximum: float
    mu: float | None
    fork: bool
    base_path: str | None
    prompt_template: str = UPSTREAM
    pad_to: int | None = None
    prompt_source: str = ""
    classes: tuple[str, ...] = ()
    classes_source: str = ""
    resize: ResizeFilter = "bicubic"
    vision_resampler: bool = False


def read_json(path: Path) -> dict[str, Any]:
    """A config file with its `parent` chain resolved; see `read_chain`."""
    return read_chain(path)[0]


def read_chain(path: Path) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """A config file with its `parent` chain resolved, and the files of the chain; a child's keys win, nested objects are merged.

    Raises:
        ConfigError: a file of the chain is missing or not a JSON object, or the chain is a circle.
    """
    merged: dict[str, Any] = {}
    seen: list[Path] = []
    current: Path | None = path
    while current is not None:
        if seen and not is_there(current):
            raise ConfigError(
                f"{ascii(str(current))[1:-1]} does not exist", got=f"named by {path}", hint="correct the path."
            )
        if current.resolve() in seen:
            raise ConfigError(
                f"{path} inherits from itself",
                got=" -> ".join(map(str, seen)),
                hint="remove one `parent` from the circle.",
            )
        if len(seen) >= _MOST_PARENTS:
            raise ConfigError(
                f"{path} inherits from too many configs",
                got=f"{current} after {len(seen)} others",
                expected=f"at most {_MOST_PARENTS} in a chain",
                hint="write what the run used into one file.",
            )
        seen.append(current.resolve())
        child = _read_object(current)
        merged = _merge(child, merged)
        parent = child.get("parent")
        current = _locate(parent, current.parent) if parent else None
    merged["parent"] = None
    return merged, tuple(seen)


def policy_spec(config: dict[str, Any]) -> PolicySpec:
    """Interpret a RoboVLMs config.

    Raises:
        ConfigError: a key is missing or has a value of the wrong type.
        UnsupportedPolicyError: a variant that jetvla knows by name and does not build.
    """
    refuse_variants(config)
    _refuse_magnitudes(config)
    act = _section(config, "act_head")
    head_type = _get(act, "type", str, "act_head.type")
    if head_type not in HEADS:
        raise unknown_head(head_type, HEADS)
    kind = HEADS[head_type]
    classes = kind == "classes"
    head = HeadSpec(
        kind=kind,
        outputs=_size(act, "num_classes", "act_head.", 6) if classes else _size(act, "action_dim", "act_head."),
        hidden=_size(act, "hidden_size", "act_head.", 1024),
        layers=_size(act, "num_layers", "act_head.", 4),
        latent=_size(act, "latent", "act_head.", 1),
        pooling=act.get("down_sample", "none") == "pooling",
        # The lab's class heads read the key, the others take any and look at none.
        told=classes and act.get("instr_in_features") is not None,
    )
    if kind == "actions_gripper" and head.outputs < 2:
        raise ConfigError(
            "act_head.action_dim leaves no arm action",
            got=head.outputs,
            expected="at least 2: arm columns and the gripper",
            hint="velocity policies of the fork have act_head.type MobileVLALSTMDecoder.",
        )
    setup = _section(config, "train_setup")
    lora = None
    if setup.get("lora_enable", False):
        lora = LoraSpec(
            r=_size(setup, "lora_r", "train_setup."),
            alpha=_number(setup, "lora_alpha", "train_setup."),
            dropout=_number(setup, "lora_dropout", "train_setup.", 0.0),
        )
    vlm = config.get("vlm")
    base_path = vlm.get("pretrained_model_name_or_path") if isinstance(vlm, dict) else None
    minimum, maximum = _number(config, "norm_min", default=-1.0), _number(config, "norm_max", default=1.0)
    if not minimum < maximum:
        raise ConfigError(
            "the config's action range is empty",
            got=f"norm_min {minimum}, norm_max {maximum}",
            expected="norm_min < norm_max",
            hint="pass the config that the run was trained with: --config CONFIG.json",
        )
    prompt, order = lab_prompt(config), class_order(config, head.outputs)
    return PolicySpec(
        head=head,
        lora=lora,
        window=_size(config, "window_size"),
        chunk=_size(config, "fwd_pred_next_n"),
        image_size=_size(config, "image_size", default=224),
        hand_camera=bool(config.get("use_hand_rgb", False)),
        normalized=bool(config.get("norm_action", False)),
        minimum=minimum,
        maximum=maximum,
        mu=_mu(config) if config.get("use_mu_law", False) else None,
        fork=head_type != "LSTMDecoder" or str(config.get("trainer_type", "")).startswith("MobileVLA"),
        base_path=base_path if isinstance(base_path, str) else None,
        prompt_template=prompt.template,
        pad_to=prompt.pad_to,
        prompt_source=prompt.source,
        classes=order.names if classes else (),
        classes_source=order.source if classes else "",
        resize=lab_resize(config),
        vision_resampler=bool(config.get("use_vision_resampler", False)),
    )


def _refuse_magnitudes(config: dict[str, Any]) -> None:
    """Velocities of which only the size was learned would drive to one side whatever the words say."""
    datasets = config.get("train_dataset")
    several = isinstance(datasets, list)
    for index, dataset in enumerate(datasets if isinstance(datasets, list) else [datasets]):
        if isinstance(dataset, dict) and dataset.get("abs_action", False):
            key = f"train_dataset[{index}].abs_action" if several else "train_dataset.abs_action"
            raise UnsupportedPolicyError(
                f"this policy uses {key} = {dataset['abs_action']!r}, which jetvla does not build",
                expected="linear_y with its sign: under this key its size alone is learned, and the fork's own scripts give it the side "
                "that the instruction names; it would take such a rule in every bundle",
                hint="train without the key; augment.mirror helps against one-sided data. Nothing was written.",
            )


def _read_object(path: Path) -> dict[str, Any]:
    value = limited_json(path, error=ConfigError, hint="pass the RoboVLMs training config (.json).")
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} is not a config", got=type(value).__name__, expected="a JSON object", hint="see above."
        )
    return value


def _locate(parent: object, folder: Path) -> Path:
    """The parent's path: as written, else beside the child (checkpoints travel, absolute paths do not)."""
    written = Path(str(parent))
    for candidate in (written, folder / written, folder / written.name):
        if is_there(candidate):
            return candidate
    return written


def _merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value: dict[str, Any] = _get(config, key, dict, key)
    return value


def _size(section: dict[str, Any], key: str, prefix: str = "", default: int | None = None) -> int:
    """A whole number of at least 1, and at most what a policy may have."""
    value, most = section.get(key, default), _MOST_BY_KEY.get(key, _MOST)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _unusable(prefix + key, value, "a whole number, at least 1")
    if value > most:
        raise _unusable(prefix + key, value, f"a whole number, at most {most}")
    return value


def _number(section: dict[str, Any], key: str, prefix: str = "", default: float | None = None) -> float:
    """A finite number."""
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _unusable(prefix + key, value, "a finite number")
    return float(value)


def _mu(config: dict[str, Any]) -> float:
    value = _number(config, "mu_val", default=_MU_DEFAULT)
    if value <= 0:
        raise _unusable("mu_val", value, "a number above 0")
    return value


def _get(section: dict[str, Any], key: str, kind: type, path: str) -> Any:
    value = section.get(key)
    if not isinstance(value, kind):
        raise _unusable(path, value, kind.__name__)
    return value


def _unusable(path: str, value: object, expected: str) -> ConfigError:
    return ConfigError(
        f"the training config lacks a usable `{path}`",
        got=repr(value),
        expected=expected,
        hint="pass the config that the run was trained with: --config CONFIG.json",
    )
