"""The arithmetic of floors and expectations."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.roofline import PRECISIONS, Derated, Peak, Precision, floor, moved_bytes, weight_bytes
from bench.workload import FULL, STAGES, Op, io_bytes, stage_ops

PEAK = Peak(flops={"fp32": 1e12, "fp16": 8e12, "int8": 16e12}, bandwidth=1e11, companion="fp16")
PRODUCT = Op("fc", "linear", 3, m=10, n=20, k=30, moved=500, weights=(600, 20))
NORM = Op("norm", "norm", 3, moved_island=1000, island_weights=(10, 10))
rates = st.floats(1e9, 1e16)


def test_a_floor_is_the_longer_of_work_and_traffic() -> None:
    bound = floor([PRODUCT, NORM], PEAK, "fp32", 100)
    assert PRODUCT.flops == 2 * 10 * 20 * 30 * 3
    assert bound.compute_ms == pytest.approx(36000 / 1e12 * 1e3)
    assert bound.memory_ms == pytest.approx((3 * 620 * 4 + 3 * 20 * 4 + 100) / 1e11 * 1e3)
    assert (bound.ms, bound.bottleneck) == (bound.memory_ms, "memory")
    assert floor([PRODUCT], dataclasses.replace(PEAK, bandwidth=1e15), "fp32", 0).bottleneck == "compute"


def test_int8_is_for_products_with_weights_only() -> None:
    scores = Op("scores", "attention", m=8, n=8, k=8, batch=2, moved=256, weights=(64,))
    assert floor([scores], PEAK, "int8", 0) == floor([scores], PEAK, "fp16", 0)
    assert weight_bytes(PRODUCT, "int8", "fp16") == 3 * 620
    assert weight_bytes(NORM, "int8", "fp16") == 3 * 20 * 4
    assert moved_bytes(PRODUCT, "int8", "fp16") == 3 * 500 * 2
    assert moved_bytes(NORM, "fp16", "fp16") == 3 * 1000 * 4


def test_an_expectation_adds_up_operations_and_their_starts() -> None:
    derated = Derated(PEAK, compute=0.5, memory=0.25, start_us=2.0)
    move = Op("split", "move", 5, moved=10**9)
    work = PRODUCT.flops / (8e12 * 0.5)
    traffic = 3 * 620 * 2 / (1e11 * 0.25)
    norm = (3 * 20 * 4 + 3 * 1000 * 4) / (1e11 * 0.25)
    assert derated.stage_ms([PRODUCT, NORM, move], "fp16", 0) == pytest.approx(
        (max(work, traffic) + norm) * 1e3 + 6 * 2e-3
    )


@given(flops=rates, bandwidth=rates, factor=st.floats(1.01, 100), precision=st.sampled_from(PRECISIONS))
def test_faster_machines_are_never_slower(flops: float, bandwidth: float, factor: float, precision: Precision) -> None:
    slow = Peak(dict.fromkeys(PRECISIONS, flops), bandwidth, "fp16")
    quicker = dataclasses.replace(slow, flops=dict.fromkeys(PRECISIONS, flops * factor))
    wider = dataclasses.replace(slow, bandwidth=bandwidth * factor)
    for stage in STAGES:
        ops, io = stage_ops(FULL, stage, 88), io_bytes(FULL, stage, 88)
        base = floor(ops, slow, precision, io)
        for peak in (quicker, wider):
            better = floor(ops, peak, precision, io)
            assert better.ms <= base.ms
            assert (better.compute_ms < base.compute_ms) == (peak is quicker)
            assert (better.memory_ms < base.memory_ms) == (peak is wider)
            assert Derated(peak, 0.5, 0.5, 1.0).stage_ms(ops, precision, 0) <= Derated(slow, 0.5, 0.5, 1.0).stage_ms(
                ops, precision, 0
            )


@given(
    compute=st.floats(0.05, 1),
    memory=st.floats(0.05, 1),
    start_us=st.floats(0, 50),
    precision=st.sampled_from(PRECISIONS),
)
def test_no_expectation_is_below_its_floor(
    compute: float, memory: float, start_us: float, precision: Precision
) -> None:
    for stage in STAGES:
        ops = stage_ops(FULL, stage, 88)
        bound = floor(ops, PEAK, precision, 0)
        assert Derated(PEAK, compute, memory, start_us).stage_ms(ops, precision, 0) >= bound.ms * (1 - 1e-9)


@given(shorter=st.integers(1, 500), longer=st.integers(1, 500))
def test_more_slots_cost_more(shorter: int, longer: int) -> None:
    if shorter < longer:
        a, b = (floor(stage_ops(FULL, "language", slots), PEAK, "fp32", 0) for slots in (shorter, longer))
        assert a.compute_ms < b.compute_ms
        assert a.memory_ms < b.memory_ms


def test_fewer_bits_are_fewer_bytes() -> None:
    for stage in ("vision", "language"):
        ops = stage_ops(FULL, stage, 88)
        sizes = [sum(weight_bytes(op, precision, "fp16") for op in ops) for precision in PRECISIONS]
        assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.01)
        assert sizes[1] / sizes[2] == pytest.approx(2, rel=0.01)
