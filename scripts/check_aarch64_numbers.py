#!/usr/bin/env python3
"""Command line: the numbers that scripts/check_aarch64 takes on both machines, and their comparison.

    python scripts/check_aarch64_numbers.py record --bundle BUNDLE --episode EPISODE.h5 --precision int8 --out arm.int8.npz
    python scripts/check_aarch64_numbers.py products
    python scripts/check_aarch64_numbers.py compare --folder FOLDER --here x86 --there arm
    python scripts/check_aarch64_numbers.py same --one arm.float.npz --other served.npz

Exit codes: 0 ok, 3 the numbers differ by more than they may.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnxruntime
import tyro
from numpy.typing import NDArray

from bundle.manifest import Tensor
from runtime.policy import Policy
from runtime.replay import read_resized
from runtime.service.client import RemotePolicy
from tests.runtime.onnx_files import GraphWriter

# fp32 sums are added in another order and exp and erf are other code: a few units in the last of 24 bits.
MOST_FP32 = 1e-5
# Of the products: sums stay below 2**24, where fp32 holds every integer.
DEPTH, COLUMNS = 256, 64


def record(bundle: Path, episode: Path, precision: Literal["float", "int8"], out: Path, url: str | None = None) -> int:
    """Write what the policy sees and says of every frame; with `url`, what a service of that bundle says."""
    policy: Policy | RemotePolicy
    if url is None:
        policy = Policy.load(bundle, "ort:cpu", precision=precision)
    else:
        policy = RemotePolicy(url, timeout_s=60, reset_timeout_s=60, load_timeout_s=60)
    manifest = policy.manifest
    seen = read_resized(episode, manifest.preprocessing, manifest.dimensions.image_size)
    assert seen.instruction is not None, "synthetic episodes have one"
    policy.reset(seen.instruction)
    chunks = [policy.step(frames[0]) for frames in seen.frames]
    policy.close()
    features, actions = [chunk.feature for chunk in chunks], [chunk.normalized for chunk in chunks]
    np.savez(out, pictures=seen.frames, features=features, actions=actions)
    return 0


def compare(folder: Path, here: str, there: str) -> int:
    """Print the largest differences between two machines, and judge them.

    In fp32, MOST_FP32. In INT8 the sums are equal (`products`), but what lies between them is fp32: a number next to the middle of two
    integers may be rounded to the other one, and the policy goes on from there, for as long as its window remembers. That must be smaller
    than what INT8 itself costs, and some frames must be free of it: a wrong kernel would spoil them all.
    """
    taken = {(name, p): _load(folder / f"{name}.{p}.npz") for name in (here, there) for p in ("float", "int8")}
    pictures = all(np.array_equal(one["pictures"], taken[here, "float"]["pictures"]) for one in taken.values())
    cost = _differences(taken[here, "float"], taken[here, "int8"])
    print(f"pictures after decoding and resizing: {'equal to the bit' if pictures else 'DIFFERENT'}")
    print(f"{here} fp32 to {here} INT8: features {cost[0].max():.1e}, actions {cost[1].max():.1e}")
    good = pictures
    for precision, label in (("float", "fp32"), ("int8", "INT8")):
        features, actions = _differences(taken[here, precision], taken[there, precision])
        alike = int((features <= MOST_FP32).sum())
        print(
            f"{here} to {there} in {label}: features {features.max():.1e}, actions {actions.max():.1e}; "
            f"features of {alike} of {len(features)} frames within {MOST_FP32:g}, "
            f"actions of {int((actions <= MOST_FP32).sum())}"
        )
        if precision == "float":
            good &= bool(max(features.max(), actions.max()) <= MOST_FP32)
        else:
            good &= bool(features.max() < cost[0].max() and actions.max() < cost[1].max() and alike > 0)
    return 0 if good else 3


def same(one: Path, other: Path) -> int:
    """Whether two policies answered the same, to the bit. Features are not compared: they stay with a service."""
    equal = np.array_equal(_load(one)["actions"], _load(other)["actions"])
    print(f"actions of {one.name} and {other.name}: {'equal to the bit' if equal else 'DIFFERENT'}")
    return 0 if equal else 3


def products() -> int:
    """ONNX Runtime's QGemm on uint8 activations (zero point 128), against int64, exactly."""
    print(f"{platform.machine()}, Python {platform.python_version()}, ", end="")
    print(f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}")
    good = True
    for weights, zero in (("int8", 0), ("uint8", 128)):
        for smallest in (-127, -128):
            wrong = [name for name, a, w in _extremes(smallest) if not _is_exact(a, w, weights, zero)]
            print(f"  uint8 x {weights}, weights from {smallest}: {', '.join(wrong) or 'exact'}")
            # No weight of ours is -128, where kernels without SDOT overflow.
            good &= not wrong or (weights, smallest) == ("int8", -128)
    return 0 if good else 3


def _extremes(smallest: int) -> list[tuple[str, NDArray[np.int64], NDArray[np.int64]]]:
    """Activations in 0..255 [16, DEPTH] and weights in `smallest`..127 [COLUMNS, DEPTH]."""
    rng = np.random.default_rng(0)
    shapes = (16, DEPTH), (COLUMNS, DEPTH)
    constant = [(f"{a} x {w}", np.full(shapes[0], a), np.full(shapes[1], w)) for a in (0, 255) for w in (smallest, 127)]
    corners = ("corners", rng.choice([0, 255], shapes[0]), rng.choice([smallest, 127], shapes[1]))
    return [*constant, corners, ("random", rng.integers(0, 256, shapes[0]), rng.integers(smallest, 128, shapes[1]))]


def _is_exact(a: NDArray[np.int64], w: NDArray[np.int64], weights: str, zero: int) -> bool:
    writer = GraphWriter()
    scales = writer.constant(np.array(1, np.float32)), writer.constant(np.ones(COLUMNS, np.float32))
    zeros = writer.constant(np.array(128, np.uint8)), writer.constant(np.full(COLUMNS, zero, weights))
    weight = writer.constant((w + zero).astype(weights))
    writer.add(
        "QGemm", "x", scales[0], zeros[0], weight, scales[1], zeros[1], out="y", domain="com.microsoft", transB=1
    )
    x = Tensor(name="x", dtype="uint8", shape=a.shape)
    model = writer.model([x], [Tensor(name="y", dtype="float32", shape=(len(a), COLUMNS))])
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.array_equal(session.run(None, {"x": a.astype(np.uint8)})[0], (a - 128) @ w.T)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _differences(
    one: dict[str, NDArray[Any]], other: dict[str, NDArray[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The largest of each frame: of the features and of the actions."""
    features, actions = (
        np.abs(one[name].astype(np.float64) - other[name]).reshape(len(one[name]), -1).max(axis=1)
        for name in ("features", "actions")
    )
    return features, actions


if __name__ == "__main__":
    commands: dict[str, Callable[..., Any]] = {"record": record, "compare": compare, "same": same, "products": products}
    sys.exit(tyro.extras.subcommand_cli_from_dict(commands, description=__doc__))
