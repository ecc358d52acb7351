"""Measured rates: which one is taken for an operation, and how they are kept."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from bench.calibration import Measured, Short, load_calibration, save_calibration, short_shapes
from bench.workload import Op
from bundle.errors import StorageError
from tests.bench.plans import MACHINE, calibration, product


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def linear(m: int, n: int, k: int) -> Op:
    return Op("fc", "linear", 2, m=m, n=n, k=k, weights=(n * k,))


def test_the_rate_of_the_very_shape_is_taken() -> None:
    rates = Measured(
        calibration(product(88, 2048, 2048, 1e11), product(88, 8192, 2048, 2e11), product(88, 2048, 8192, 3e11))
    )
    for op, rate in ((linear(88, 2048, 2048), 1e11), (linear(88, 8192, 2048), 2e11), (linear(88, 2048, 8192), 3e11)):
        assert rates._op_ms(op, "fp32") == pytest.approx(op.flops / rate * 1e3)


def test_the_nearest_shape_stands_for_one_that_was_not_probed() -> None:
    rates = Measured(calibration(product(88, 2048, 2048, 1e11), product(8, 2048, 2048, 1e10)))
    near, few = linear(96, 2048, 2048), linear(10, 2048, 2048)
    assert rates._op_ms(near, "fp32") == pytest.approx(near.flops / 1e11 * 1e3)
    assert rates._op_ms(few, "fp32") == pytest.approx(few.flops / 1e10 * 1e3)


def test_far_shapes_get_the_roofline_of_the_machine() -> None:
    rates = Measured(calibration(product(88, 2048, 2048, 1e11)))
    single = linear(1, 2048, 2048)  # one row: its weights take longer than its work
    assert rates._op_ms(single, "fp32") == pytest.approx(2 * 4 * 2048 * 2048 / 1e10 * 1e3)
    huge = linear(5000, 2048, 2048)
    assert rates._op_ms(huge, "fp32") == pytest.approx(huge.flops / 1e11 * 1e3)


def test_products_of_activations_and_other_types_are_another_matter() -> None:
    rates = Measured(
        calibration(
            product(88, 88, 64, 4e10, batch=32, cold=False),
            product(88, 88, 64, 1e9),
            product(88, 88, 64, 5e11, precision="int8"),
        )
    )
    scores = Op("scores", "attention", m=88, n=88, k=64, batch=32)
    assert rates._op_ms(scores, "fp32") == pytest.approx(scores.flops / 4e10 * 1e3)
    assert rates._op_ms(scores, "int8") == rates._op_ms(scores, "fp32")  # on a CPU attention is fp32 beside INT8
    assert rates._op_ms(linear(88, 88, 64), "int8") == pytest.approx(linear(88, 88, 64).flops / 5e11 * 1e3)


def test_pointwise_operations_cost_their_bytes_and_nodes_their_start() -> None:
    rates = Measured(calibration())
    norm = Op("norm", "norm", 3, moved_island=1000)
    bytes_ms = 3 * 4000 / 1e9 * 1e3
    assert rates.stage_ms([norm], "fp32", 500) == pytest.approx(bytes_ms + 0.5)
    assert rates.stage_ms([norm], "fp32", 0) == pytest.approx(bytes_ms + 0.003)


def test_weights_cross_the_memory_however_fast_a_probe_was() -> None:
    rates = Measured(calibration(product(8, 2048, 2048, 1e15)))
    op = linear(8, 2048, 2048)
    assert rates._op_ms(op, "fp32") == pytest.approx(2 * 4 * 2048 * 2048 / 1e10 * 1e3)


def test_a_short_stage_costs_what_it_cost_as_a_whole() -> None:
    ops = [linear(1, 64, 64), linear(8, 64, 128), Op("cell", "quick_gelu", 1, moved_island=1000)]
    shapes = ((1, 64, 64, 2), (8, 64, 128, 2))
    assert short_shapes(ops) == shapes
    short = Short(shapes=shapes, precision="fp32", ms=7.0)
    rates = Measured(msgspec.structs.replace(calibration(), shorts=(short,)))
    assert rates.stage_ms(ops, "fp32", 0) == pytest.approx(7 + 4000 / 1e9 * 1e3 + 0.005)
    assert rates.stage_ms(ops, "fp16", 0) < 1
    assert rates.stage_ms(ops[:2], "fp32", 0) == pytest.approx(7 + 0.004)
    assert rates.stage_ms(ops[:1], "fp32", 0) < 1
    assert short_shapes([linear(88, 8192, 2048)]) is None


def test_a_calibration_comes_back_and_belongs_to_its_machine() -> None:
    assert load_calibration(MACHINE) is None
    made = calibration(product(1, 2, 3, 4.0), product(5, 6, 7, 8.0, batch=9, cold=False))
    path = save_calibration(made)
    assert path.name.startswith("probes-")
    assert path.parent == Path(os.environ["XDG_CACHE_HOME"]) / "jetvla"
    assert load_calibration(MACHINE) == made
    for other in ({"threads": 3}, {"processor": "x"}, {"version": "2"}, {"backend": "numpy"}):
        assert load_calibration(msgspec.structs.replace(MACHINE, **other)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b"[1]", b'{"schema": 1}'])
def test_a_damaged_or_foreign_file_is_none(damage: bytes) -> None:
    path = save_calibration(calibration())
    path.write_bytes(damage)
    assert load_calibration(MACHINE) is None


def test_another_schema_is_none() -> None:
    path = save_calibration(calibration())
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(calibration(), schema=2)))
    assert load_calibration(MACHINE) is None


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot make"):
        save_calibration(calibration())


def test_only_a_quiet_machine_is_steady() -> None:
    assert calibration().steady
    for disturbed in ({"drift": 0.8}, {"drift": 1.2}, {"share": 0.5}):
        assert not calibration(**disturbed).steady  # type: ignore[arg-type]


def test_the_peak_is_the_fastest_product() -> None:
    peak = calibration(product(1, 1, 1, 5.0), product(2, 2, 2, 7.0), product(1, 1, 1, 9.0, precision="int8")).peak()
    assert peak.flops == {"fp32": 7.0, "fp16": 7.0, "int8": 9.0}
    assert (peak.bandwidth, peak.companion) == (1e10, "fp32")
