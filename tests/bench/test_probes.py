"""Probes: the graphs compute what they are counted as, and what is measured ends up where it belongs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bench import probe_graphs, probes
from bench.calibration import Machine
from bench.probe_graphs import REPEATS, ProbeGraph
from bench.probes import machine_of, measure, unprobed
from bench.roofline import Precision
from bench.workload import Op
from bundle.errors import BackendError

LINEAR = Op("fc", "linear", 2, m=6, n=16, k=8, moved=10, weights=(128, 16))
SCORES = Op("scores", "attention", m=5, n=7, k=4, batch=3)
NORM = Op("norm", "norm", 4, moved_island=4096)
SMALL = 2**12  # bytes of weights that a test's probe streams


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_STREAMED", 2**25)
    monkeypatch.setattr(probes, "_SAMPLE_S", 0.0)


def run(probe: ProbeGraph, tmp_path: Path) -> np.ndarray:
    """The output of a probe, through the backend that runs policies."""
    pytest.importorskip("onnxruntime")
    from runtime.backends.ort import OrtBackend

    (tmp_path / probe.graph.file).write_bytes(probe.model)
    return np.array(OrtBackend("ort:cpu", threads=1).load(tmp_path, probe.graph).run(probe.feeds)["y"])


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_product_probe_multiplies_by_different_weights(precision: Precision, tmp_path: Path) -> None:
    probe = probe_graphs.linear(6, 16, 8, precision, cold_bytes=SMALL)
    copies = SMALL // (16 * 8 * {"fp32": 4, "fp16": 2, "int8": 1}[precision])
    assert probe.work == 2 * 6 * 16 * 8 * copies
    assert probe.glue == 2 * copies
    values = sum(range(1, copies + 1)) * (1 if precision == "int8" else 1e-3)
    np.testing.assert_allclose(run(probe, tmp_path), [[8 * values]], rtol=1e-2)


def test_a_stage_probe_has_all_products_of_the_stage(tmp_path: Path) -> None:
    probe = probe_graphs.linears(((2, 16, 8, 3), (1, 4, 16, 1)), "fp32")
    assert probe.work == 2 * (2 * 16 * 8 * 3 + 4 * 16)
    assert {name: array.shape for name, array in probe.feeds.items()} == {"x0": (2, 8), "x1": (1, 16)}
    np.testing.assert_allclose(run(probe, tmp_path), [[8 * (1 + 2 + 3) * 1e-3 + 16 * 2e-3]], rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_attention_probe_goes_to_and_fro(precision: Precision, tmp_path: Path) -> None:
    probe = probe_graphs.attention(5, 7, 4, 3, precision)
    x, keys, values = (probe.feeds[name].astype(np.float64) for name in ("x", "keys", "values"))
    for _ in range(REPEATS):
        x = x @ keys @ values
    assert probe.work == REPEATS * 2 * 2 * 3 * 5 * 7 * 4
    np.testing.assert_allclose(run(probe, tmp_path), x, rtol=0.05, atol=0.05 * np.abs(x).max())


@pytest.mark.parametrize("kind", ["norm", "softmax", "gelu", "quick_gelu", "move"])
def test_pointwise_probes_run(kind: str, tmp_path: Path) -> None:
    probe = probe_graphs.pointwise(kind, 4, 16)
    assert probe.work == REPEATS * 4 * 16 * 4 * (3 if kind == "move" else 2)
    output = run(probe, tmp_path)
    assert output.shape == (4, 16)
    assert np.isfinite(output).all()
    if kind == "move":
        np.testing.assert_allclose(output, (REPEATS + 1) * probe.feeds["x"], rtol=1e-5)


def test_an_empty_chain_has_its_nodes(tmp_path: Path) -> None:
    probe = probe_graphs.chain(9)
    assert (probe.graph.nodes, probe.work) == (10, 9)  # and the one that names the output
    assert not run(probe, tmp_path).any()


def test_the_files_are_valid_onnx() -> None:
    onnx = pytest.importorskip("onnx")
    for probe in (
        probe_graphs.chain(2),
        probe_graphs.pointwise("gelu", 2, 4),
        probe_graphs.attention(2, 3, 4, 1, "fp16"),
    ):
        onnx.checker.check_model(onnx.load_from_string(probe.model), full_check=True)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("backend", ["ort:cpu", "numpy"])
def test_measuring_gives_a_rate_for_every_shape(backend: str) -> None:
    if backend == "ort:cpu":
        pytest.importorskip("onnxruntime")
    machine = Machine(processor="this one", threads=1, backend=backend, version="x")
    seen: list[str] = []
    found = measure(machine, [((LINEAR, SCORES, NORM), "fp32"), ((LINEAR,), "fp32")], advance=seen.append)
    assert {(product.m, product.n, product.k, product.batch, product.cold) for product in found.products} == {
        (6, 16, 8, 1, True),
        (5, 7, 4, 3, False),
    }
    assert all(product.flops > 0 for product in found.products)
    assert set(found.pointwise) == {"norm"}
    assert found.bandwidth > 0
    assert found.machine == machine
    expected = [((6, 16, 8, 2),)] if backend == "ort:cpu" else []
    assert [short.shapes for short in found.shorts if len(short.shapes) == 1] == expected
    assert seen[0] == "nodes"
    assert sum("6 x 16 x 8" in name for name in seen) == 1


@pytest.mark.usefixtures("_quick")
def test_known_shapes_are_not_probed_again_and_a_budget_ends_probing() -> None:
    machine = Machine(processor="this one", threads=1, backend="numpy", version="x")
    first = measure(machine, [((LINEAR,), "fp32")])
    other = dataclasses.replace(LINEAR, m=7)
    seen: list[str] = []
    both = measure(machine, [((LINEAR, other), "fp32")], known=first, advance=seen.append)
    assert both.products[0] == first.products[0]
    assert len(both.products) == 2
    assert not any("6 x 16" in name for name in seen)
    assert len(measure(machine, [((LINEAR, other), "fp32")], budget_s=-1.0).products) == 1


def test_what_takes_longest_is_probed_first() -> None:
    big, many = dataclasses.replace(LINEAR, m=60), dataclasses.replace(LINEAR, m=7, count=1000)
    stages = (((LINEAR, big, NORM), "fp32"), ((many,), "fp32"), ((LINEAR, SCORES), "int8"))
    wanted = unprobed(stages, "ort:cpu", None)  # type: ignore[arg-type]
    assert [(want.op.m, want.precision) for want in wanted] == [
        (7, "fp32"), (60, "fp32"), (6, "fp32"), (6, "int8"), (5, "fp32"),
    ]  # fmt: skip


def test_the_machine_is_known_by_its_cpu_and_versions() -> None:
    pytest.importorskip("onnxruntime")
    machine = machine_of("ort:cpu", 2)
    assert (machine.backend, machine.threads) == ("ort:cpu", 2)
    assert machine.processor
    assert machine.version[0].isdigit()


def test_int8_is_timed_in_the_form_that_is_exact_here(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    from runtime.backends.ort import OrtBackend

    found: list[str] = []
    monkeypatch.setattr(OrtBackend, "find_exact_products", lambda backend: found.append(backend.name))
    probes._Prober(machine_of("ort:cpu", 1))
    assert found == ["ort:cpu"]


def test_without_onnxruntime_numpy_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_version", lambda package: None)
    machine = machine_of("ort:cuda", 1)
    assert (machine.backend, machine.version) == ("numpy", np.__version__)


def test_a_backend_that_is_not_there_is_an_error() -> None:
    pytest.importorskip("onnxruntime")
    machine = Machine(processor="x", threads=1, backend="ort:cuda", version="x")
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        measure(machine, [((LINEAR,), "fp32")])
