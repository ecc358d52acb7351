"""Quantizations for tests: made quietly, of policies with random weights, and looked into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from calib.acceptance import Acceptance
from calib.config import QuantizeConfig
from calib.pipeline import STEPS, quantize
from calib.publish import REPORT, Report
from calib.stage_graph import STAGES
from export.console import Reporter
from runtime.policy import Policy

BLOCKS = ("vision.0-2", "projection", "language.0-1", "action_head")
# Random weights drive by noise: what is left of the commands is no measure here.
GENEROUS = 2.0


class Enough(Exception):
    """Stops a quantization where a test has seen what it wanted."""


def enough(*_: object) -> None:
    raise Enough


def alike(policies: Sequence[Policy], *_: object) -> list[dict[str, float]]:
    """In place of `stage_times`: nothing is faster than anything, so that no test depends on a clock, and the most INT8 is chosen."""
    return [dict.fromkeys(STAGES, 1.0) for _ in policies]


def config(bundle: Path, recorded: Path | None, **options: Any) -> QuantizeConfig:
    own = {"max_action_error": GENEROUS, "frames": 16, "held_out": 12, "threads": 1, "backend": "ort:cpu"}
    episodes = () if recorded is None else (str(recorded),)
    return QuantizeConfig(bundle, **{"episodes": episodes, **own, **options})


def quietly(config: QuantizeConfig) -> str:
    """Quantize; the log."""
    reporter = Reporter(STEPS, quiet=True)
    assert quantize(config, reporter) == config.bundle
    return reporter.log


def report_of(bundle: Path) -> Report:
    return msgspec.json.decode((bundle / REPORT).read_bytes(), type=Report)


def accepted(bundle: Path) -> Acceptance:
    return report_of(bundle).acceptances["ort:cpu"]
