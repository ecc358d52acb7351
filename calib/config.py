"""What to quantize and how, checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from bundle.errors import ConfigError
from calib.ranges import Method

Backend = Literal["auto", "ort:cpu", "ort:openvino"]


@dataclass(frozen=True)
class QuantizeConfig:
    """Add an INT8 variant to a bundle.

    Attributes:
        bundle: directory made by export/build_engines.py.
        episodes: recordings of the robot: H5 files, folders of them, globs, LeRobot datasets.
        max_action_error: largest difference of any command of the INT8 policy on held-out frames, in the head's range of -1 to 1.
        frames: calibration frames.
        held_out: frames that choose the assignment, and as many others that judge it.
        instruction: what the policy was told, for recordings that do not say.
        ranges: of activations: mse (least square error), percentile (clips 0.01 %), minmax (clips nothing).
        smoothing: share of the activations' outliers that moves into the weights (SmoothQuant's alpha); 0 leaves them where they are.
        layers_per_block: transformer layers that the search moves together.
        backend: on which accuracy and latency are measured; auto measures all that are installed and takes the fastest.
        keep_float: block that stays in floating point whatever the search says. Repeatable.
        allow_random: calibrate on made-up pictures when there are no recordings: to try speed and memory, not accuracy.
        threads: CPU threads; 0 takes all.
        seed: of the choice of frames.
        force: do it again though the bundle has this variant.
        dry_run: choose frames and say what would be done; write nothing.
        json: machine-readable result on stdout.
    """

    bundle: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    episodes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="EPISODES")] = ()
    max_action_error: float = 0.01
    frames: int = 64
    held_out: int = 48
    instruction: str | None = None
    ranges: Method = "mse"
    smoothing: float = 0.5
    layers_per_block: int = 6
    backend: Backend = "auto"
    keep_float: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    allow_random: bool = False
    threads: int = 0
    seed: int = 0
    force: bool = False
    dry_run: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_action_error", float(self.max_action_error))  # 2 and 2.0 are one request
        _at_least("frames", self.frames, 1)
        _at_least("held_out", self.held_out, 1)
        _at_least("layers_per_block", self.layers_per_block, 1)
        _at_least("threads", self.threads, 0)
        for name, value, known in (
            ("ranges", self.ranges, get_args(Method)),
            ("backend", self.backend, get_args(Backend)),
        ):
            if value not in known:
                raise ConfigError(f"unknown {name}", got=value, expected=", ".join(known), hint=f"correct --{name}.")
        if not (math.isfinite(self.max_action_error) and self.max_action_error > 0):
            raise ConfigError(
                "the budget is not one",
                got=self.max_action_error,
                expected="a positive number, in the head's range of -1 to 1",
                hint="0.01 is 1 % of the largest command.",
            )
        if not 0 <= self.smoothing <= 1:
            raise ConfigError("smoothing is a share", got=self.smoothing, expected="0 to 1", hint="0.5 suits most.")
        if not self.episodes and not self.allow_random:
            raise ConfigError(
                "nothing to calibrate on",
                got="no episodes",
                expected="recordings of the robot that will run the policy",
                hint="python calib/quantize.py BUNDLE recordings/ ; --allow-random is for trying speed and memory only.",
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag} is too small", got=value, expected=f"at least {least}", hint=f"correct --{flag}.")
