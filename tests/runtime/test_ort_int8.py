"""INT8 on CPUs without VNNI: weights become unsigned integers when a graph is loaded, and every sum is exact."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bundle.manifest import Graph, Tensor
from runtime.backends.ort import UNSIGNED, OrtBackend
from runtime.policy import Policy
from runtime.precision import int8_notes
from tests.bundles import GO_LEFT, add_int8, make_bundle, random_frames
from tests.int8 import signed_saturate
from tests.runtime.onnx_files import GraphWriter

ROWS, INNER, OUT = 5, 96, 24
GRAPH = Graph(
    file="product.onnx",
    form="ort-cpu",
    sequence=None,
    nodes=1,
    inputs=(Tensor(name="x", dtype="uint8", shape=(ROWS, INNER)),),
    outputs=(Tensor(name="y", dtype="float32", shape=(ROWS, OUT)),),
)


def activations() -> NDArray[np.uint8]:
    """The largest, the smallest, and everything between."""
    x = np.random.default_rng(0).integers(0, 256, (ROWS, INNER)).astype(np.uint8)
    x[0], x[1], x[2, ::2] = 255, 0, 255
    return x


def weights() -> NDArray[np.int8]:
    w = np.random.default_rng(1).integers(-127, 128, (OUT, INNER)).astype(np.int8)
    w[0], w[1], w[2, 1::2] = 127, -127, -127
    return w


BIAS = np.arange(OUT, dtype=np.int32) * 1000 - 9000


def sums() -> NDArray[np.int64]:
    found: NDArray[np.int64] = (activations().astype(np.int64) - 128) @ weights().astype(np.int64).T + BIAS
    return found


def write_product(folder: Path, *, inside: bool = False) -> Path:
    """A QGemm as INT8 stages have it, with its weights in a file of their own or inside."""
    data = None if inside else folder / "product.data"
    writer = GraphWriter()
    scale, zero = writer.constant(np.array(np.float32(1))), writer.constant(np.array(np.uint8(128)))
    stored = [weights(), np.ones(OUT, np.float32), np.zeros(OUT, np.int8), BIAS]
    names = [writer.constant(value, data) for value in stored]
    writer.add("QGemm", "x", scale, zero, *names, out="y", domain="com.microsoft", transB=1)
    path = folder / GRAPH.file
    path.write_bytes(writer.model(GRAPH.inputs, GRAPH.outputs))
    return path


@pytest.mark.parametrize("inside", [False, True])
def test_unsigned_sums_are_exact_on_every_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    pytest.importorskip("onnxruntime")
    write_product(tmp_path, inside=inside)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    backend = OrtBackend("ort:cpu", threads=1)
    monkeypatch.setattr(backend, "_unsigned", True)
    got = backend.load(tmp_path, GRAPH).run({"x": activations()})["y"]
    assert np.array_equal(got, sums().astype(np.float32))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_onnx_runtime_is_asked_for_unsigned_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs with VNNI give the right sums in both ways, so there the option itself is looked for."""
    onnxruntime = pytest.importorskip("onnxruntime")
    asked: list[str] = []

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_session_config_entry(self, key: str, value: str) -> None:
            asked.append(f"{key}={value}")
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    backend = OrtBackend("ort:cpu", threads=1)
    for unsigned in (False, True):
        asked.clear()
        monkeypatch.setattr(backend, "_unsigned", unsigned)
        backend._session(str(write_product(tmp_path)), GRAPH)
        assert ("session.x64quantprecision=1" in asked) == unsigned


def test_what_the_backend_chooses_is_exact(tmp_path: Path) -> None:
    """Whichever form this CPU needs."""
    pytest.importorskip("onnxruntime")
    write_product(tmp_path)
    backend = OrtBackend("ort:cpu", threads=1)
    backend.find_exact_products()
    got = backend.load(tmp_path, GRAPH).run({"x": activations()})["y"]
    assert np.array_equal(got, sums().astype(np.float32))
    assert (backend.remark == UNSIGNED) == backend._unsigned


def test_a_cpu_whose_signed_products_saturate_takes_unsigned_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    folder = make_bundle(tmp_path / "tiny.bundle")
    add_int8(folder)
    signed_saturate(monkeypatch)
    policy = Policy.load(folder, "ort:cpu", threads=1)
    assert policy.manifest.precision == "int8"
    assert int8_notes(policy, "auto")[0] == policy.remark == UNSIGNED
    policy.reset(GO_LEFT)
    policy.step_resized(random_frames(1)[0])
    policy = Policy.load(folder, "ort:cpu", precision="float", threads=1)
    assert policy.remark == ""


_COMPUTE = """
import sys
from pathlib import Path
import numpy as np
from bundle.manifest import Manifest
from runtime.backends.ort import OrtBackend
from tests.runtime.test_ort_int8 import GRAPH, activations
backend = OrtBackend("ort:cpu", threads=1)
backend.open(Path(sys.argv[1]), Manifest.load(sys.argv[1]).int8("ort-cpu"))
print(backend.remark)
np.save(sys.argv[2], backend.load(Path(sys.argv[3]), GRAPH).run({"x": activations()})["y"])
"""


def test_onnx_runtime_on_a_cpu_without_vnni(tmp_path: Path) -> None:
    """QEMU's largest x86 CPU has AVX2 and no VNNI. The bundle opens in INT8 there, and its sums are the same."""
    pytest.importorskip("onnxruntime")
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if emulator is None or platform.machine() != "x86_64":
        pytest.skip("qemu-x86_64 is not installed; the tests above force the same form on this CPU")
    folder = make_bundle(tmp_path / "tiny.bundle")
    add_int8(folder)
    write_product(tmp_path)
    done = subprocess.run(
        [emulator, "-cpu", "max", sys.executable, "-c", _COMPUTE, folder, tmp_path / "y.npy", tmp_path],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.stdout.strip() == UNSIGNED, done.stderr
    assert np.array_equal(np.load(tmp_path / "y.npy"), sums().astype(np.float32))
