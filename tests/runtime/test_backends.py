"""A backend runs what the manifest says, or says why it cannot; it never falls back in silence."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bundle.errors import BackendError, ConfigError
from bundle.manifest import Graph, Measured, Quantized, Tensor
from runtime.backends.base import Feeds
from runtime.backends.fake import FakeBackend
from runtime.backends.ort import PROVIDERS, OrtBackend
from runtime.backends.ort_plugins import PLUGINS
from runtime.backends.select import NAMES, candidates, open_backend
from tests.runtime.onnx_files import GraphWriter


def tensor(name: str, dtype: str, *shape: int) -> Tensor:
    return Tensor(name=name, dtype=dtype, shape=shape)


X, INDEX = tensor("x", "float32", 2, 3), tensor("index", "int64", 2)
Y, TWICE = tensor("y", "float32", 2, 3), tensor("twice", "float32", 2, 3)
GRAPH = Graph(file="g.onnx", form="portable", sequence=None, nodes=2, inputs=(X, INDEX), outputs=(Y, TWICE))


def feeds(*indices: int, seed: int = 0) -> Feeds:
    return {"x": np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32), "index": np.array(indices)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """y = rows `index` of x; twice = y + y. An index that is not there makes the run fail."""
    writer = GraphWriter()
    writer.add("Gather", "x", "index", out="y", axis=0)
    writer.add("Add", "y", "y", out="twice")
    (tmp_path / "g.onnx").write_bytes(writer.model(GRAPH.inputs, GRAPH.outputs))
    return tmp_path


@pytest.fixture
def onnxruntime() -> ModuleType:
    module: ModuleType = pytest.importorskip("onnxruntime")
    return module


def quantized(**changes: Any) -> Quantized:
    fields: dict[str, Any] = {
        "stages": {},
        "calibration_sha256": "",
        "calibration_frames": 1,
        "random": False,
        "method": "",
        "assignment": {},
        "budget": 0.0,
        "action_error": 0.0,
        "frames": 1,
        "verdict": "PASS",
        "golden_cosine": 1.0,
        "golden_error": 0.0,
        "machine": "",
        "measured": (),
    }
    return Quantized(**fields | changes)


# --- names ------------------------------------------------------------------------------------------------------------------


UNTRUSTED = (None, quantized(random=True), quantized(verdict="FAIL"))


@pytest.mark.parametrize("variant", [*UNTRUSTED, quantized()])
def test_candidates_in_floating_point(variant: Quantized | None) -> None:
    """Also by default, unless there is a variant that may be run without being named."""
    for precision in ("float", *(("auto",) if variant in UNTRUSTED else ())):
        tried = functools.partial(names_tried, precision=precision, variant=variant)
        assert tried("ort") == ("ort:tensorrt", "ort:tensorrt-rtx", "ort:cuda", "ort:cpu")
        assert tried("auto") == ("trt", *tried("ort"))
        for name in set(NAMES) - {"auto", "ort"}:
            assert tried(name) == (name,)
        assert "ort:openvino" not in tried("auto")  # bf16's errors are the user's to accept
    assert set(NAMES) == {"auto", "trt", "ort", "fake", *PROVIDERS}


def names_tried(name: str, precision: Any, variant: Quantized | None) -> tuple[str, ...]:
    tried = candidates(name, precision, variant)
    assert {kind for _, kind in tried} == {"float"}
    return tuple(name for name, _ in tried)


GPU_ENGINES = [("trt", "int8"), ("trt", "float")]
GPU = [("ort:tensorrt", "float"), ("ort:tensorrt-rtx", "float"), ("ort:cuda", "float")]
INT8, VINO, FLOAT = ("ort:cpu", "int8"), ("ort:openvino", "int8"), ("ort:cpu", "float")
VINO_FLOAT = ("ort:openvino", "float")


@pytest.mark.parametrize(
    ("name", "measured", "tried"),
    [
        ("auto", [INT8, FLOAT], [*GPU_ENGINES, *GPU, INT8, FLOAT]),
        ("auto", [VINO, INT8, FLOAT], [*GPU_ENGINES, *GPU, VINO, INT8, FLOAT]),
        ("auto", [FLOAT, INT8], [*GPU_ENGINES, *GPU, FLOAT, INT8]),
        ("auto", [], [*GPU_ENGINES, *GPU, FLOAT]),
        ("auto", [FLOAT], [*GPU_ENGINES, *GPU, FLOAT]),
        ("auto", [INT8], [*GPU_ENGINES, *GPU, INT8, FLOAT]),
        ("auto", [("ort:openvino", "float"), ("trt", "int8"), VINO], [*GPU_ENGINES, *GPU, VINO, FLOAT]),
        ("ort", [VINO, INT8, FLOAT], [*GPU, VINO, INT8, FLOAT]),
        ("trt", [VINO], [("trt", "int8"), ("trt", "float")]),
        ("trt", [], [("trt", "int8"), ("trt", "float")]),
        ("ort:cpu", [INT8, FLOAT], [INT8, FLOAT]),
        ("ort:cpu", [INT8], [INT8, FLOAT]),
        ("ort:cpu", [FLOAT, INT8], [FLOAT]),
        ("ort:cpu", [VINO, FLOAT], [FLOAT]),
        ("ort:cpu", [VINO, INT8, FLOAT], [INT8, FLOAT]),
        ("ort:cpu", [], [FLOAT]),
        ("ort:openvino", [VINO, INT8, FLOAT], [VINO, VINO_FLOAT]),
        (
            "ort:openvino",
            [FLOAT, VINO],
            [VINO, VINO_FLOAT],
        ),  # another backend's floating point is not what was asked for
        ("ort:openvino", [VINO_FLOAT, VINO], [VINO_FLOAT]),
        ("ort:openvino", [INT8, FLOAT], [VINO_FLOAT]),
        ("ort:cuda", [VINO], [("ort:cuda", "float")]),
        ("ort:tensorrt", [VINO], [("ort:tensorrt", "float")]),
        ("ort:tensorrt-rtx", [VINO], [("ort:tensorrt-rtx", "float")]),
        ("fake", [VINO], [("fake", "float")]),
    ],
)
def test_candidates_with_an_int8_variant(name: str, measured: Any, tried: Any) -> None:
    variant = quantized(
        measured=tuple(
            Measured(backend=backend, precision="int8" if kind == "int8" else "fp32", step_ms=float(index))
            for index, (backend, kind) in enumerate(measured)
        )
    )
    assert candidates(name, "auto", variant) == tuple(tried)


@pytest.mark.parametrize("variant", [quantized(), quantized(random=True), quantized(verdict="FAIL")])
@pytest.mark.parametrize(
    ("name", "tried"),
    [
        ("auto", [("trt", "int8"), INT8]),
        ("ort", [INT8]),
        *((name, [(name, "int8")]) for name in ("trt", "fake", *PROVIDERS)),
    ],
)
def test_int8_that_is_asked_for(name: str, tried: Any, variant: Quantized) -> None:
    assert candidates(name, "int8", variant) == tuple(tried)


def test_an_unknown_precision() -> None:
    with pytest.raises(ConfigError, match=r"unknown precision 'fp16'\n  expected: auto, int8, float"):
        candidates("auto", "fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "cuda", "ort:", "ort:tpu", "FAKE"])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(
        BackendError, match=rf"unknown backend '{name}'\n  expected: auto, trt, ort, (?s:.*)hint: --backend"
    ):
        candidates(name)


def test_the_fake_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert open_backend("fake").name == "fake"


@pytest.mark.parametrize("name", PROVIDERS)
def test_onnxruntime_is_not_installed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"ONNX Runtime is not installed(?s:.*)pip install 'jetvla\[ort\]'"):
        open_backend(name)


@pytest.mark.usefixtures("onnxruntime")
def test_the_name_is_the_one_asked_for() -> None:
    backend = open_backend("ort:cpu", threads=1)
    assert isinstance(backend, OrtBackend)
    assert backend.name == "ort:cpu"


# --- fake -------------------------------------------------------------------------------------------------------------------


def test_the_fake_is_a_function_of_its_inputs() -> None:
    first, second = (FakeBackend().load(Path(), GRAPH) for _ in range(2))
    outputs = first.run(feeds(0, 1))
    assert {name: (array.dtype, array.shape) for name, array in outputs.items()} == {
        "y": (np.float32, (2, 3)),
        "twice": (np.float32, (2, 3)),
    }
    assert all(np.abs(array).max() <= 1 for array in outputs.values())  # type: ignore[type-var]
    assert (outputs["y"] != outputs["twice"]).all()
    again = second.run(feeds(0, 1))
    for name in outputs:
        np.testing.assert_array_equal(outputs[name], again[name])
    for changed in (feeds(1, 0), feeds(0, 1, seed=1)):
        assert (second.run(changed)["y"] != outputs["y"]).all()


def test_the_fake_does_not_care_how_arrays_lie_in_memory() -> None:
    stage = FakeBackend().load(Path(), GRAPH)
    given = feeds(0, 1)
    fortran = {name: np.asfortranarray(array) for name, array in given.items()}
    np.testing.assert_array_equal(stage.run(given)["y"], stage.run(fortran)["y"])


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("x", np.zeros((2, 4), np.float32), r"float32\[2, 4\]"),
        ("x", np.zeros((2, 3), np.float64), r"float64\[2, 3\]"),
        ("index", np.zeros((1, 2), np.int64), r"int64\[1, 2\]"),
    ],
)
def test_the_fake_is_strict(name: str, value: np.ndarray, got: str) -> None:
    with pytest.raises(BackendError, match=rf"wrong input {name}\n  got:      {got}\n  expected: "):
        FakeBackend().load(Path(), GRAPH).run({**feeds(0, 1), name: value})


def test_the_fake_fails_when_planned() -> None:
    backend = FakeBackend(fail_at=2)
    stage = backend.load(Path(), GRAPH)
    stage.run(feeds(0, 1))
    with pytest.raises(BackendError, match=r"g\.onnx failed while running\n  got:      planned failure"):
        stage.run(feeds(0, 1))
    stage.run(feeds(0, 1))
    assert backend.runs == {"g.onnx": 3}


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("onnxruntime")
def test_ort_computes(folder: Path) -> None:
    stage = OrtBackend(threads=1).load(folder, GRAPH)
    for seed in range(3):
        given = feeds(1, 0, seed=seed)
        outputs = stage.run(given)
        np.testing.assert_array_equal(outputs["y"], given["x"][[1, 0]])
        np.testing.assert_array_equal(outputs["twice"], 2 * given["x"][[1, 0]])


@pytest.mark.usefixtures("onnxruntime")
def test_ort_allocates_once(folder: Path) -> None:
    stage = OrtBackend(threads=1).load(folder, GRAPH)
    first = stage.run(feeds(0, 0))
    assert stage.run(feeds(1, 1))["y"] is first["y"]


@pytest.mark.usefixtures("onnxruntime")
def test_ort_copies_what_it_is_fed(folder: Path) -> None:
    stage = OrtBackend(threads=1).load(folder, GRAPH)
    given = feeds(0, 1)
    expected = given["x"].copy()
    outputs = stage.run({name: np.asfortranarray(array) for name, array in given.items()})
    given["x"][:] = 0
    np.testing.assert_array_equal(outputs["y"], expected)


@pytest.mark.usefixtures("onnxruntime")
def test_ort_fails_while_running_and_recovers(folder: Path) -> None:
    stage = OrtBackend(threads=1).load(folder, GRAPH)
    with pytest.raises(
        BackendError, match=r"g\.onnx failed while running\n  got:      \w+: .*out of data bounds(?s:.*)--check"
    ):
        stage.run(feeds(0, 7))
    given = feeds(1, 1)
    np.testing.assert_array_equal(stage.run(given)["y"], given["x"][[1, 1]])


@pytest.mark.usefixtures("onnxruntime")
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"not a graph", lambda data: data[:-20]])
def test_ort_refuses_a_broken_graph(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    (folder / "g.onnx").write_bytes(damage((folder / "g.onnx").read_bytes()))
    with pytest.raises(BackendError, match=r"ort:cpu cannot load g\.onnx\n  got:      \w+: ") as caught:
        OrtBackend(threads=1).load(folder, GRAPH)
    assert caught.value.__cause__ is not None


@pytest.mark.usefixtures("onnxruntime")
def test_ort_misses_a_graph(folder: Path) -> None:
    (folder / "g.onnx").unlink()
    with pytest.raises(BackendError, match=r"cannot load g\.onnx\n  got:      NoSuchFile"):
        OrtBackend(threads=1).load(folder, GRAPH)


@pytest.mark.usefixtures("onnxruntime")
def test_weights_that_are_a_link_are_named(tmp_path: Path) -> None:
    """As caches and mirrors of files keep them. ONNX Runtime reads a graph's weights beside it only; what is a link as a whole is fine."""
    folder, store = tmp_path / "folder", tmp_path / "store"
    folder.mkdir()
    store.mkdir()
    writer, value = GraphWriter(), np.arange(8, dtype=np.float32)
    x, y = tensor("x", "float32", 8), tensor("y", "float32", 8)
    writer.add("Add", "x", writer.constant(value, store / "g.onnx.data"), out="y")
    (store / "g.onnx").write_bytes(writer.model([x], [y]))
    graph = Graph(file="g.onnx", form="portable", sequence=None, nodes=1, inputs=(x,), outputs=(y,))
    for name in ("g.onnx", "g.onnx.data"):
        (folder / name).symlink_to(store / name)
    (tmp_path / "link").symlink_to(store)
    for good in (store, folder, tmp_path / "link"):
        stage = _of_one_graph(OrtBackend(threads=1)).load(good, graph)
        np.testing.assert_array_equal(stage.run({"x": value})["y"], 2 * value)
    (folder / "g.onnx").unlink()
    (folder / "g.onnx").write_bytes((store / "g.onnx").read_bytes())
    try:
        stage = _of_one_graph(OrtBackend(threads=1)).load(folder, graph)
    except BackendError as error:
        assert error.hint == f"g.onnx.data may not be a link: cp -rL {folder} COPY, and use the copy."  # noqa: PT017
    else:  # as versions of before 1.24 read it
        np.testing.assert_array_equal(stage.run({"x": value})["y"], 2 * value)


def _of_one_graph(backend: OrtBackend) -> OrtBackend:
    """As a bundle that is opened tells it."""
    backend._weights = {"g.onnx": "g.onnx.data"}
    return backend


def test_a_provider_that_is_not_installed(onnxruntime: ModuleType) -> None:
    missing = {
        name: provider for name, provider in PROVIDERS.items() if provider not in onnxruntime.get_available_providers()
    }
    for name in missing.keys() - PLUGINS.keys():
        with pytest.raises(
            BackendError, match=rf"ONNX Runtime has no {missing[name]}(?s:.*)CPUExecutionProvider"
        ) as no:
            open_backend(name)
        assert no.value.absent


def test_a_provider_that_is_listed_and_does_not_come_up(
    onnxruntime: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with onnxruntime-gpu on a machine without CUDA: ONNX Runtime warns and takes the CPU."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    listed = ["CUDAExecutionProvider", *onnxruntime.get_available_providers()]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with (
        pytest.warns(UserWarning, match="'CUDAExecutionProvider' is not in available provider names"),
        pytest.raises(BackendError) as caught,
    ):
        OrtBackend("ort:cuda", threads=1)
    assert str(caught.value) == (
        "ort:cuda fell back silently for the probe\n  got:      CPUExecutionProvider\n"
        "  expected: CUDAExecutionProvider\n\n"
        "hint: the provider's libraries are missing or do not fit the driver; --backend ort:cpu works everywhere."
    )


@pytest.mark.usefixtures("onnxruntime")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", np.zeros((1, 3), np.float32)),  # would be broadcast: one camera's picture for two cameras
        ("x", np.zeros((3, 3), np.float32)),
        ("x", np.zeros((2, 3), np.float64)),
    ],
)
def test_ort_is_as_strict_as_the_fake(folder: Path, name: str, value: np.ndarray) -> None:
    with pytest.raises(BackendError, match=f"wrong input {name}"):
        OrtBackend(threads=1).load(folder, GRAPH).run({**feeds(0, 1), name: value})
