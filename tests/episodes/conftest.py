"""Small real episode files for the tests of `episodes`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from episodes.synthetic import SyntheticSchema, write_synthetic

HEIGHT, WIDTH, LENGTH = 24, 32, 6


@pytest.fixture
def synthetic(tmp_path: Path) -> Callable[[SyntheticSchema], Path]:
    """synthetic("v1") -> a 6-frame 24x32 episode with everything stored."""

    def make(schema: SyntheticSchema) -> Path:
        return write_synthetic(tmp_path, schema, side="left", seed=7, height=HEIGHT, width=WIDTH, length=LENGTH)

    return make


@pytest.fixture
def handmade(tmp_path: Path) -> Callable[..., Path]:
    """handmade({"images": array, ...}, {"attr": value}, name=...) -> an HDF5 file with exactly this content."""

    def make(datasets: dict[str, object], attributes: dict[str, object] | None = None, name: str = "plain.h5") -> Path:
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            for key, value in datasets.items():
                file[key] = value
            file.attrs.update(attributes or {})
        return path

    return make


@pytest.fixture
def noise() -> np.ndarray:
    """Three frames of incompressible pixels, uint8 [3, 24, 32, 3]."""
    return np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)
