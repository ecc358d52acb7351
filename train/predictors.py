"""A checkpoint and a bundle behind one protocol: an instruction, then frame by frame, as on the robot.

The bundle runs the runtime itself, the checkpoint torch's reference forward with the same resize, prompt and scaling. This is the one
place in train/ that imports the runtime: both must be judged by one ruler.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bundle.errors import ConfigError
from bundle.manifest import MANIFEST_NAME, Action, Packing
from bundle.tokenization import tokenize
from episodes.reader import CAMERAS
from episodes.resize import squash
from runtime.actions import denormalize
from runtime.policy import Policy
from train.action_classes import classes_of_action
from train.action_meaning import action_of
from train.checkpoint import LoadedPolicy, load
from train.policy import CLIP_MEAN, CLIP_STD, ReferenceStream

_NO_NORM = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_SAME_RATE = 1.2


@dataclass(frozen=True)
class Stated:
    """What the user states about a checkpoint that does not record it: build_engines.py's options of the same names.

    What is stated goes before what the checkpoint records, and that before the default. A bundle knows all of it.

    Attributes:
        base: Kosmos-2 directory.
        config: RoboVLMs training JSON, if neither in the checkpoint nor beside it.
        tokenizer: tokenizer.json, if it is not in the base directory.
        packing: how training laid out a row.
        x_attn_causal: the resampler was trained causal.
        resize: filter of the training data.
        pixel_norm: CLIP's mean and std, or none.
        action_range: physical values of -1 and +1.
        action_names: columns of the action.
        classes: a class head's classes in order, names or `name=vx,vy[,wz]`.
        class_speed: linear speed of classes without numbers, in m/s.
        prompt_template: text around an instruction.
        pad_prompt_to: tokens that every prompt is padded to; 0 leaves its length.
    """

    base: Path | None = None
    config: Path | None = None
    tokenizer: Path | None = None
    packing: Packing | Literal["auto"] = "auto"
    x_attn_causal: bool | None = None
    resize: Literal["bicubic", "bilinear", "letterbox", "auto"] = "auto"
    pixel_norm: Literal["clip", "none", "auto"] = "auto"
    action_range: tuple[float, float] | None = None
    action_names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    class_speed: float | None = None
    prompt_template: str | None = None
    pad_prompt_to: int | None = None


class Predictor(Protocol):
    """What is judged.

    Attributes:
        action: names, units and scaling of its commands.
        template: text around an instruction.
        description: what it is, for people.
        cameras: that it sees, in its order.
    """

    action: Action
    template: str
    description: str
    cameras: tuple[str, ...]

    def reset(self, instruction: str) -> None:
        """Start an episode."""

    def predict(self, frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """A frame uint8 [H, W, 3] RGB of each camera to commands [n, A] in physical units; row 0 is for now."""

    def check_rate(self, fps: float | None) -> None:
        """Warn where an episode runs at another rate than training did."""


def open_predictor(path: Path, stated: Stated, *, backend: str = "auto") -> Predictor:
    """A bundle (a folder with a manifest), or a checkpoint.

    Raises:
        ConfigError: something stated about a bundle.
        BundleError, BackendError, CheckpointError, BaseWeightsError: it cannot be loaded.
    """
    if (path / MANIFEST_NAME).exists() or path.is_dir():
        if stated != Stated():
            raise ConfigError(
                f"{path} is a bundle, which records how it was trained",
                got=", ".join(name for name, value in vars(stated).items() if value != getattr(Stated(), name)),
                expected="no such option",
                hint="leave the option out, or evaluate the checkpoint.",
            )
        return BundlePredictor(path, backend)
    return CheckpointPredictor(path, stated)


class BundlePredictor:
    """The bundle on a backend, as on the robot."""

    def __init__(self, path: Path, backend: str) -> None:
        self._policy = Policy.load(path, backend=backend)
        manifest = self._policy.manifest
        self.cameras: tuple[str, ...] = manifest.preprocessing.cameras
        self._fps = manifest.fps
        self.action, self.template = manifest.action, manifest.prompt.template
        self.description = f"bundle {path.name}, {manifest.precision} on {self._policy.backend}"

    def reset(self, instruction: str) -> None:
        self._policy.reset(instruction)

    def predict(self, frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        views = dict(zip(self.cameras, frames, strict=True))
        return self._policy.step(views["static"], hand=views.get("hand")).values

    def check_rate(self, fps: float | None) -> None:
        _check_rate(self._fps, fps)


class CheckpointPredictor:
    """The checkpoint in torch, in adapter form, fp32."""

    def __init__(self, path: Path, stated: Stated) -> None:
        loaded = load(
            path,
            base=stated.base,
            config=stated.config,
            packing=stated.packing,
            x_attn_causal=stated.x_attn_causal,
            prompt_template=stated.prompt_template,
            pad_prompt_to=stated.pad_prompt_to,
        )
        facts, spec = loaded.facts, loaded.policy.spec
        self.cameras: tuple[str, ...] = CAMERAS if spec.hand_camera else ("static",)
        self._loaded = loaded
        self._tokenizer = _tokenizer(loaded, stated.tokenizer)
        self._stream: ReferenceStream | None = None
        self._size = loaded.base.kosmos.vision_config.image_size
        otherwise = "default" if facts is None else "recorded"
        self._resize: Literal["bicubic", "bilinear", "letterbox"]
        if stated.resize == "auto":
            self._resize, resize_source = loaded.policy.spec.resize if facts is None else facts.resize, otherwise
        else:
            self._resize, resize_source = stated.resize, "stated"
        if stated.pixel_norm == "auto":
            norm, norm_source = "clip" if facts is None else facts.pixel_norm, otherwise
        else:
            norm, norm_source = stated.pixel_norm, "stated"
        self._mean, self._std = (CLIP_MEAN, CLIP_STD) if norm == "clip" else _NO_NORM
        self._fps = None if facts is None else facts.fps
        self.action = action_of(
            spec,
            facts,
            action_range=stated.action_range,
            names=stated.action_names,
            classes=stated.classes,
            class_speed=stated.class_speed,
        )
        conventions = loaded.policy.conventions
        self.template = spec.prompt_template
        self.description = (
            f"checkpoint {path.name}, fp32 in torch, packing {conventions.packing} ({conventions.packing_source}), "
            f"prompt {self.template!r}{f' padded to {spec.pad_to}' if spec.pad_to else ''} ({spec.prompt_source}), "
            f"resize {self._resize} ({resize_source}), pixel norm {norm} ({norm_source}), {_scale(self.action, stated, otherwise)}"
        )

    def reset(self, instruction: str) -> None:
        policy = self._loaded.policy
        ids, mask = policy.padded(torch.tensor(tokenize(instruction, self.template, self._tokenizer)))
        self._stream = ReferenceStream(policy, ids.numpy(), mask.numpy(), mean=self._mean, std=self._std)

    def predict(self, frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        assert self._stream is not None, "reset comes first"
        step = self._stream.step(np.stack([squash(frame, self._size, self._resize) for frame in frames]))
        return denormalize(step.action, self.action)

    def check_rate(self, fps: float | None) -> None:
        _check_rate(self._fps, fps)


def _check_rate(trained: float | None, fps: float | None) -> None:
    if fps is not None and trained is not None and max(fps / trained, trained / fps) > _SAME_RATE:
        warnings.warn(
            f"an episode has {fps:.1f} frames per second, the policy was trained at {trained:.1f}: its window and chunk mean other "
            "times there",
            UserWarning,
            stacklevel=3,
        )


def _scale(action: Action, stated: Stated, otherwise: str) -> str:
    """What turns the head's numbers into commands, and who says so; a range that is not stated stands in the training config."""
    if action.head == "classes":
        return f"classes {' '.join(classes_of_action(action).spelled())} ({action.classes_source})"
    if not action.normalized:
        return "actions not scaled (config)"
    source = "config" if stated.action_range is None else "stated"
    return f"action range {action.minimum:g} to {action.maximum:g} ({source})"


def _tokenizer(loaded: LoadedPolicy, stated: Path | None) -> Path:
    found = stated or loaded.base.tokenizer
    if found is None or not found.exists():
        raise ConfigError(
            f"{stated} does not exist" if stated else "the base model has no tokenizer.json",
            got=None if stated else str(loaded.base.folder),
            expected="a tokenizer.json",
            hint="pass it with --tokenizer FILE, or a Kosmos-2 directory that has one with --base DIR.",
        )
    return found
