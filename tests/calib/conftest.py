"""Small policies, built once by export, and recordings to calibrate them on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bundle.manifest import FloatPrecision, HeadKind, Manifest
from calib.calibrate import How
from episodes.instruction import sentence
from episodes.synthetic import write_synthetic
from export.pipeline import BuildConfig, build
from tests.calib.made import Prepared, prepare, seen_frames
from tests.calib.quantizing import alike, config, quietly
from tests.export.builds import QUICK
from train.synthetic import SyntheticOptions, make_checkpoint

Built = Callable[..., Path]
Own = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """In child processes too."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Head and precision to a bundle; tests must not change it."""
    made: dict[tuple[HeadKind, FloatPrecision], Path] = {}

    def make(head: HeadKind = "velocities", precision: FloatPrecision = "fp32") -> Path:
        if (head, precision) not in made:
            folder = tmp_path_factory.mktemp("built")
            files = make_checkpoint(folder, SyntheticOptions(head=head))
            made[head, precision] = build(
                BuildConfig(
                    checkpoint=files.checkpoint,
                    out=folder / "policy.bundle",
                    precision=precision,
                    promote=False,
                    packing="upstream",
                    instruction=(sentence("v1", "left"), sentence("v1", "right")),
                    verify_frames=QUICK,
                )
            )
        return made[head, precision]

    return make


@pytest.fixture
def own(built: Built, tmp_path: Path) -> Own:
    """The same, as a copy of this test's own."""

    def copy(head: HeadKind = "velocities", precision: FloatPrecision = "fp32") -> Path:
        return Path(shutil.copytree(built(head, precision), tmp_path / "policy.bundle"))

    return copy


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six episodes of 18 frames, three for each side."""
    folder = tmp_path_factory.mktemp("recorded")
    for seed in range(6):
        write_synthetic(folder, "v1", side="right" if seed % 2 else "left", seed=seed, height=24, width=32)
    return folder


@pytest.fixture(scope="session")
def prepared(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    """Precision to a policy that was calibrated on a few frames, its integers written; tests must not change it."""
    made: dict[FloatPrecision, Prepared] = {}

    def make(precision: FloatPrecision = "fp32") -> Prepared:
        if precision not in made:
            folder = Path(shutil.copytree(built("velocities", precision), tmp_path_factory.mktemp("work") / "bundle"))
            made[precision] = prepare(folder, seen_frames(Manifest.load(folder), 4), How("mse", 0.5, 1, 1))
        return made[precision]

    return make


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen depends on no clock; `stage_times` itself is tested in test_trial.py."""
    monkeypatch.setattr("calib.selection.stage_times", alike)


@pytest.fixture
def driving_by_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions that a random policy changes its mind about are no reason to fail."""
    monkeypatch.setattr("calib.acceptance._EVENTS", 1.0)


@pytest.fixture(scope="session")
def quantized(built: Built, recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle with a variant, and the log of its making; tests must not change it."""
    bundle = Path(shutil.copytree(built(), tmp_path_factory.mktemp("quantized") / "policy.bundle"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib.acceptance._EVENTS", 1.0)
        patch.setattr("calib.selection.stage_times", alike)
        return bundle, quietly(config(bundle, recorded))


@pytest.fixture
def own_quantized(quantized: tuple[Path, str], tmp_path: Path) -> Path:
    """The same, as a copy of this test's own."""
    return Path(shutil.copytree(quantized[0], tmp_path / "policy.bundle"))


@pytest.fixture(scope="session")
def fp32(prepared: Callable[..., Prepared]) -> Prepared:
    return prepared("fp32")


@pytest.fixture(scope="session")
def fp16(prepared: Callable[..., Prepared]) -> Prepared:
    return prepared("fp16")
