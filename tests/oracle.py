"""Recorded cases of the reference implementation: where they lie, and what is in them.

They stand beside the repository, not in it; a test that needs one is skipped where they are absent. What each array is
says the README beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from bundle.manifest import Packing

ORACLE = Path(__file__).resolve().parents[2] / "shared" / "oracle"
CASES = ("lora_7d", "lora_vel2_plus_grip", "frozen_nolora_7d", "fork2dof_patched", "fork2dof_stock")
# The fork's files do not say how their rows were packed; that these two differ in it is known from how they were made.
PACKINGS: dict[str, Packing] = {
    "fork2dof_patched": "upstream",
    "fork2dof_stock": "fork_overwrite",
}


@dataclass(frozen=True)
class OracleCase:
    """One recorded policy.

    Attributes:
        packing: to be stated when loading it.
        inputs, expected: arrays by name.
    """

    name: str
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return next(self.folder.glob("*.ckpt"))

    @property
    def packing(self) -> Packing | Literal["auto"]:
        return PACKINGS.get(self.name, "auto")

    @cached_property
    def inputs(self) -> dict[str, NDArray[Any]]:
        return dict(np.load(self.folder / "inputs.npz"))

    @cached_property
    def expected(self) -> dict[str, NDArray[Any]]:
        return dict(np.load(self.folder / "expected.npz"))

    def chunks(self, prefix: str, arm: str = "arm", gripper: str = "gripper_logit") -> NDArray[Any]:
        """Expected chunks [..., n, A] of `prefix`, the gripper's logit last where there is one."""
        values = self.expected[f"{prefix}.{arm}"]
        logit = self.expected.get(f"{prefix}.{gripper}")
        return values if logit is None else np.concatenate([values, logit], axis=-1)


def oracle_case(name: str) -> OracleCase:
    """The case, or a skipped test."""
    return OracleCase(name, oracle_path(name))


def oracle_path(name: str) -> Path:
    """A file or folder among the recorded cases, or a skipped test."""
    path = ORACLE / name
    if not path.exists():
        pytest.skip(f"the recorded reference cases are not here: no shared/oracle/{name} beside the repository")
    return path


def oracle_keys(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """(key, shape) of every line of a recorded key list, in its order."""
    lines = oracle_path(name).read_text().splitlines()
    fields = [line.split("\t") for line in lines if not line.startswith("#")]
    return [(field[0], tuple(int(size) for size in field[1].strip("()").split(",") if size)) for field in fields]
