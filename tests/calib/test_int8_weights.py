"""Integers of weights and biases, and the file that they lie in."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from calib.int8_weights import DataFile, Ranges, add_site, external, quantize_weight, write_integers
from calib.smoothing import fold_norm, fold_weight
from calib.stage_graph import STAGES, Site
from tests.calib.made import Prepared

Floats = NDArray[np.float32]
PAGE = 4096

matrices = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(-(2.0**60), 2.0**60, width=32)
)


@given(weight=matrices)
def test_the_error_is_at_most_half_a_step(weight: Floats) -> None:
    integers, scales = quantize_weight(weight)
    assert integers.dtype == np.int8
    assert scales.dtype == np.float32
    assert integers.min() >= -127
    assert (scales > 0).all()
    assert np.isfinite(scales).all()
    restored = integers * scales.astype(np.float64)[:, None]
    assert (np.abs(restored - weight) <= 0.5 * scales[:, None] * (1 + 1e-5)).all()


@given(weight=matrices)
def test_every_row_uses_all_of_its_steps(weight: Floats) -> None:
    integers, scales = quantize_weight(weight)
    usual = np.abs(weight).max(axis=1) > 1e-30
    assert (np.abs(integers[usual]).max(axis=1) == 127).all()
    assert np.array_equal(
        np.sign(integers)[np.abs(weight) > scales[:, None]], np.sign(weight)[np.abs(weight) > scales[:, None]]
    )


@given(weight=matrices, row=st.integers(0, 8))
def test_rows_do_not_know_each_other(weight: Floats, row: int) -> None:
    row %= len(weight)
    integers, scales = quantize_weight(weight)
    alone, scale = quantize_weight(weight[row : row + 1])
    assert np.array_equal(alone[0], integers[row])
    assert scale[0] == scales[row]


def test_a_row_of_zeros() -> None:
    weight = np.zeros((3, 4), np.float32)
    weight[1, 2] = -254.0
    integers, scales = quantize_weight(weight)
    assert scales.tolist() == [1, 2, 1]
    assert integers.tolist() == [[0] * 4, [0, 0, -127, 0], [0] * 4]


# --- one site -----------------------------------------------------------------------------------------------------------------


def site_of(weight: Floats, *, bias: bool) -> Site:
    return Site("vision", "vision.0", "s", "x", "w", "b" if bias else None, None, weight.shape)


def written(folder: Path, weight: Floats, bias: Floats | None, activation: float) -> dict[str, NDArray[Any]]:
    """What add_site writes, by the last part of the name."""
    with DataFile(folder / "one.data") as file:
        add_site(file, site_of(weight, bias=bias is not None), weight, bias, activation)
    return {name.removeprefix("w."): array for name, array in read(file).items()}


def read(file: DataFile) -> dict[str, NDArray[Any]]:
    """Everything in the file, as onnx reads it."""
    protos = [external(name, tensor, file.path.name) for name, tensor in file.tensors.items()]
    return {proto.name: numpy_helper.to_array(proto, base_dir=str(file.path.parent)) for proto in protos}


def test_a_usual_site(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.05, (6, 8)).astype(np.float32)
    bias, activation = rng.normal(0, 1, 6).astype(np.float32), 0.02
    found = written(tmp_path, weight, bias, activation)

    integers, scales = quantize_weight(weight)
    assert set(found) == {"int8", "scale", "zero", "bias", "bias32"}
    assert np.array_equal(found["int8"], integers)
    assert np.array_equal(found["scale"], scales)
    assert found["zero"].dtype == np.int8
    assert found["zero"].tolist() == [0] * 6
    assert np.array_equal(found["bias"], bias)
    assert found["bias32"].dtype == np.int32
    steps = found["bias32"] * (scales.astype(np.float64) * activation)
    assert (np.abs(steps - bias) <= 0.5 * scales * activation * (1 + 1e-6)).all()


def test_a_site_without_a_bias(tmp_path: Path) -> None:
    assert set(written(tmp_path, np.ones((2, 3), np.float32), None, 0.1)) == {"int8", "scale", "zero"}


@given(
    exponents=st.lists(st.tuples(st.integers(-30, 3), st.integers(-30, 6)), min_size=1, max_size=5),
    activation=st.floats(1e-9, 1e6),
    inputs=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_no_bias_overflows_an_int32(
    exponents: list[tuple[int, int]],
    activation: float,
    inputs: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A large bias beside tiny weights: the row gets larger steps, and stays as exact as the bias asks for."""
    rng = np.random.default_rng(seed)
    powers = np.array(exponents, np.float64).T
    weight = (10 ** powers[0][:, None] * rng.uniform(-1, 1, (len(exponents), inputs))).astype(np.float32)
    bias = (10 ** powers[1] * rng.choice([-1, 1], len(exponents))).astype(np.float32)
    found = written(tmp_path_factory.getbasetemp(), weight, bias, activation)

    room = 2**31 - 1 - np.abs(found["bias32"].astype(np.int64))
    assert (
        room >= 2**30
    ).all()  # products of 8256 inputs fit beside it, and only that many steps of 255 * 127 ever add up
    steps = found["scale"].astype(np.float64) * activation
    assert (np.abs(found["bias32"] * steps - bias) <= 0.5 * steps + 1e-6 * np.abs(bias)).all()
    restored = found["int8"] * found["scale"].astype(np.float64)[:, None]
    assert (np.abs(restored - weight) <= 0.5 * found["scale"][:, None] * (1 + 1e-5)).all()


def test_a_large_bias_beside_tiny_weights(tmp_path: Path) -> None:
    """Row 0 would need 1e11 steps; row 1 is as ever."""
    weight = np.array([[1e-9, -1e-9], [0.5, 1.0]], np.float32)
    found = written(tmp_path, weight, np.array([100.0, 100.0], np.float32), 0.01)
    _, scales = quantize_weight(weight)
    assert found["scale"][0] > 1000 * scales[0]
    assert found["scale"][1] == scales[1]
    assert found["int8"].tolist()[0] == [0, 0]
    assert found["bias32"] * found["scale"] * 0.01 == pytest.approx([100, 100], rel=1e-5)


# --- the file -----------------------------------------------------------------------------------------------------------------


def test_a_file_is_aligned_and_hashed(tmp_path: Path) -> None:
    arrays_in: dict[str, NDArray[Any]] = {
        "one": np.arange(5, dtype=np.int8),
        "two": np.arange(3000, dtype=np.float32).reshape(30, 100),
        "none": np.zeros((0, 4), np.float32),
        "turned": np.arange(12, dtype=np.int32).reshape(3, 4).T,
    }
    with DataFile(tmp_path / "some.data") as file:
        for name, array in arrays_in.items():
            file.add(name, array)
        file.add("one", np.zeros(5, np.int8))  # it is there already

    raw = file.path.read_bytes()
    assert file.bytes == len(raw)
    assert file.sha256 == hashlib.sha256(raw).hexdigest()
    found = read(file)
    for name, array in arrays_in.items():
        assert file.tensors[name].offset % PAGE == 0
        assert np.array_equal(found[name], array)
        assert found[name].dtype == array.dtype


@pytest.mark.parametrize("stage", STAGES)
def test_the_file_of_a_stage(fp32: Prepared, stage: str, tmp_path: Path) -> None:
    graph, found = fp32.graphs[fp32.first(stage)], fp32.found[stage]
    seen: list[int] = []
    tensors = write_integers(graph, Ranges(found.scales, found.smoothing), tmp_path / "a.data", seen.append).tensors

    assert seen == [site.shape[0] * site.shape[1] for site in graph.sites]
    spans = sorted((tensor.offset, tensor.offset + tensor.length) for tensor in tensors.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(start % PAGE == 0 for start, _ in spans)
    assert spans[-1][1] == (tmp_path / "a.data").stat().st_size
    norms = {node.name: node for node in graph.model.graph.node}
    arrays_in = {
        name: numpy_helper.to_array(external(name, tensor, "a.data"), base_dir=str(tmp_path))
        for name, tensor in tensors.items()
    }
    for site in graph.sites:
        s = found.smoothing.get(site.norm or "")
        weight = graph.array(site.weight).astype(np.float32)
        if s is not None:
            weight = fold_weight(weight, s)
            for name in norms[site.norm or ""].input[1:]:
                assert np.array_equal(arrays_in[f"{name}.smooth"], fold_norm(graph.array(name), s))
        restored = arrays_in[f"{site.weight}.int8"] * arrays_in[f"{site.weight}.scale"][:, None]
        assert np.abs(restored - weight).max() <= 0.51 * arrays_in[f"{site.weight}.scale"].max()
    assert len(tensors) == sum(5 if site.bias else 3 for site in graph.sites) + 2 * len(found.smoothing)


def test_an_external_initializer_says_where_it_lies(tmp_path: Path) -> None:
    with DataFile(tmp_path / "x.data") as file:
        file.add("first", np.zeros(1, np.int8))
        file.add("second", np.ones((2, 3), np.float16))
    proto = external("second", file.tensors["second"], "x.data")
    assert proto.data_type == TensorProto.FLOAT16
    assert list(proto.dims) == [2, 3]
    assert {entry.key: entry.value for entry in proto.external_data} == {
        "location": "x.data",
        "offset": str(PAGE),
        "length": "12",
    }
