"""What a RoboVLMs config says about the policy, typed, checked, and with every refusal by name.

RoboVLMs configs hold some hundred keys, many of them ignored by the code that wrote them. Here stand those that decide what the
network computes, and what the numbers it gives mean. Knows nothing about weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.errors import ConfigError, UnsupportedPolicyError
from bundle.manifest import HeadKind

HEADS: dict[str, HeadKind] = {
    "LSTMDecoder": "actions_gripper",
    "MobileVLALSTMDecoder": "velocities",
    "MobileVLAClassificationDecoder": "classes",
}
_PROMPT_TEMPLATE = "<grounding>An image of a robot {instruction}"
_MU_DEFAULT = 255.0


@dataclass(frozen=True)
class HeadSpec:
    """The LSTM action head. `outputs` is the width of one chunk step: velocities (+ gripper logit), or classes."""

    kind: HeadKind
    outputs: int
    hidden: int
    layers: int
    latent: int
    pooling: bool


@dataclass(frozen=True)
class LoraSpec:
    """Adapters: W += (alpha / r) B A on each adapted Linear."""

    r: int
    alpha: float

    @property
    def scaling(self) -> float:
        return self.alpha / self.r


@dataclass(frozen=True)
class PolicySpec:
    """Everything in a config that decides what the policy computes and means.

    `normalized` says that actions were scaled from [minimum, maximum] to [-1, 1] in training; `mu` is set for mu-law companding.
    `fork` marks the 2-DoF fork's trainer or heads, for which the packing must be asked.
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
    prompt_template: str


def read_json(path: Path) -> dict[str, Any]:
    """A config file with its `parent` chain resolved; a child's keys win, nested objects are merged.

    Raises:
        ConfigError: a file of the chain is missing or not a JSON object, or the chain is a circle.
    """
    merged: dict[str, Any] = {}
    seen: list[Path] = []
    current: Path | None = path
    while current is not None:
        if current.resolve() in seen:
            raise ConfigError(
                f"{path} inherits from itself",
                got=" -> ".join(map(str, seen)),
                hint="remove one `parent` from the circle.",
            )
        seen.append(current.resolve())
        child = _read_object(current, first=path)
        merged = _merge(child, merged)
        parent = child.get("parent")
        current = _locate(parent, current.parent) if parent else None
    merged["parent"] = None
    return merged


def policy_spec(config: dict[str, Any]) -> PolicySpec:
    """Interpret a RoboVLMs config.

    Raises:
        ConfigError: a key is missing or has a value of the wrong type.
        UnsupportedPolicyError: a variant that jetvla knows by name and does not build.
    """
    _refuse_rare(config)
    act = _section(config, "act_head")
    head_type = _get(act, "type", str, "act_head.type")
    if head_type not in HEADS:
        raise UnsupportedPolicyError(
            f"unknown action head {head_type!r}",
            expected=", ".join(HEADS),
            hint="only LSTM heads are built; FCDecoder, GPTDecoder and diffusion heads are not.",
        )
    kind = HEADS[head_type]
    outputs = (
        int(act.get("num_classes", 6)) if kind == "classes" else _get(act, "action_dim", int, "act_head.action_dim")
    )
    head = HeadSpec(
        kind=kind,
        outputs=outputs,
        hidden=int(act.get("hidden_size", 1024)),
        layers=int(act.get("num_layers", 4)),
        latent=int(act.get("latent", 1)),
        pooling=act.get("down_sample", "none") == "pooling",
    )
    setup = _section(config, "train_setup")
    lora = None
    if setup.get("lora_enable", False):
        lora = LoraSpec(
            r=_get(setup, "lora_r", int, "train_setup.lora_r"),
            alpha=float(_get(setup, "lora_alpha", (int, float), "train_setup.lora_alpha")),
        )
    vlm = config.get("vlm") if isinstance(config.get("vlm"), dict) else {}
    assert isinstance(vlm, dict)
    return PolicySpec(
        head=head,
        lora=lora,
        window=_get(config, "window_size", int, "window_size"),
        chunk=_get(config, "fwd_pred_next_n", int, "fwd_pred_next_n"),
        image_size=int(config.get("image_size", 224)),
        hand_camera=bool(config.get("use_hand_rgb", False)),
        normalized=bool(config.get("norm_action", False)),
        minimum=float(config.get("norm_min", -1.0)),
        maximum=float(config.get("norm_max", 1.0)),
        mu=float(config.get("mu_val", _MU_DEFAULT)) if config.get("use_mu_law", False) else None,
        fork=head_type.startswith("MobileVLA") or str(config.get("trainer_type", "")).startswith("MobileVLA"),
        base_path=vlm.get("pretrained_model_name_or_path"),
        prompt_template=_PROMPT_TEMPLATE,
    )


def _refuse_rare(config: dict[str, Any]) -> None:
    act = config.get("act_head") if isinstance(config.get("act_head"), dict) else {}
    assert isinstance(act, dict)
    rare = {
        "model": config.get("model", "kosmos") != "kosmos",
        "use_vision_resampler": bool(config.get("use_vision_resampler", False)),
        "fwd_head": config.get("fwd_head") is not None,
        "use_state": bool(config.get("use_state", False)),
        "act_head.history_type": act.get("history_type", "post") != "post",
        "act_head.action_space": act.get("action_space", "continuous") != "continuous",
        "act_head.down_sample": act.get("down_sample", "none") not in ("none", "pooling"),
        "act_head.fill_zero": bool(act.get("fill_zero", False)),
        "act_head.instr_in_features": act.get("instr_in_features") is not None,
        "act_head.text_in_features": act.get("text_in_features") is not None,
    }
    for key, refused in rare.items():
        if refused:
            section, _, leaf = key.rpartition(".")
            value = act.get(leaf) if section else config.get(leaf)
            raise UnsupportedPolicyError(
                f"this policy uses {key} = {value!r}, which jetvla does not build",
                expected="frozen or LoRA Kosmos-2, `post` history, continuous actions, LSTM head",
                hint="open an issue with the config if you need it; nothing was written.",
            )


def _read_object(path: Path, *, first: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist", got=f"named by {first}" if path != first else None, hint="correct the path."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not JSON", got=error, hint="pass the RoboVLMs training config (.json).") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} is not a config", got=type(value).__name__, expected="a JSON object", hint="see above."
        )
    return value


def _locate(parent: object, folder: Path) -> Path:
    """The parent's path: as written, else beside the child (checkpoints travel, absolute paths do not)."""
    written = Path(str(parent))
    for candidate in (written, folder / written, folder / written.name):
        if candidate.exists():
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


def _get(section: dict[str, Any], key: str, kind: Any, path: str) -> Any:
    value = section.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__
        raise ConfigError(
            f"the training config lacks a usable `{path}`",
            got=repr(value),
            expected=wanted,
            hint="pass the config that the run was trained with: --config CONFIG.json",
        )
    return value
