"""Smoothing factors, and that folding them into LayerNorms and weights leaves a stage as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from calib.calibrate import smoothing_factors
from calib.folding import fold
from calib.smoothing import factors, fold_norm, fold_weight
from calib.stage_graph import StageGraph
from tests.calib.made import Prepared, run_model

Floats = NDArray[np.float32]
Stage = Literal["vision", "language"]
STAGES: tuple[Stage, ...] = ("vision", "language")


def folded(
    graph: StageGraph, factors_of: Mapping[str, Floats], *, parameters: tuple[int, ...] = (1, 2)
) -> onnx.ModelProto:
    """The graph with factors by LayerNorm moved into its weights; of LayerNorms, these inputs take part."""
    nodes = {node.name: node for node in graph.model.graph.node}
    left = {nodes[norm].input[index] for norm in factors_of for index in {1, 2} - set(parameters)}
    changed = {name: value for name, value in fold(graph, factors_of).items() if name not in left}
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for proto in model.graph.initializer:
        if proto.name in changed:
            proto.CopyFrom(numpy_helper.from_array(changed[proto.name], proto.name))
    uses = [name for node in model.graph.node for name in node.input if name in changed]
    assert len(uses) == len(set(uses)) == len(changed)
    return model


def drawn_factors(graph: StageGraph, *, decades: float = 0.0, powers_of_two: int = 0) -> dict[str, Floats]:
    """For every foldable LayerNorm: over so many decades up and down, or 2 to integers up to that."""
    rng = np.random.default_rng(0)
    found = {}
    for site in graph.sites:
        if site.norm is not None and site.norm not in found:
            spread = rng.uniform(-decades, decades, site.shape[1])
            found[site.norm] = np.exp2(rng.integers(-powers_of_two, powers_of_two + 1, site.shape[1])).astype(
                np.float32
            ) * (10**spread).astype(np.float32)
    assert found
    return found


def outputs(fp32: Prepared, stage: Stage, model: onnx.ModelProto) -> Floats:
    key = fp32.first(stage)
    (output,) = run_model(model, fp32.folder, fp32.feeds[key]).values()
    value: Floats = output
    return value


@pytest.mark.parametrize("decades", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_folding_changes_rounding_only(fp32: Prepared, stage: Stage, decades: int) -> None:
    graph = fp32.graphs[fp32.first(stage)]
    before = outputs(fp32, stage, graph.model)

    after = outputs(fp32, stage, folded(graph, drawn_factors(graph, decades=decades)))

    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    assert not np.array_equal(after, before)  # something was folded


@pytest.mark.parametrize("stage", STAGES)
def test_folding_powers_of_two_changes_no_bit(fp32: Prepared, stage: Stage) -> None:
    graph = fp32.graphs[fp32.first(stage)]
    after = outputs(fp32, stage, folded(graph, drawn_factors(graph, powers_of_two=12)))
    assert np.array_equal(after, outputs(fp32, stage, graph.model))


@pytest.mark.parametrize("stage", STAGES)
def test_half_of_it_would_be_noticed(fp32: Prepared, stage: Stage) -> None:
    graph = fp32.graphs[fp32.first(stage)]
    before = outputs(fp32, stage, graph.model)
    for parameters in ((), (1,), (2,)):
        after = outputs(fp32, stage, folded(graph, drawn_factors(graph, decades=1), parameters=parameters))
        assert np.abs(after - before).max() > 1e-3 * np.abs(before).max()


@pytest.mark.parametrize("stage", STAGES)
def test_the_factors_of_a_calibration_fold_too(fp32: Prepared, stage: Stage) -> None:
    graph, found = fp32.graphs[fp32.first(stage)], fp32.found[stage]
    assert set(found.smoothing) == {site.norm for site in graph.sites} - {None}
    before, after = (outputs(fp32, stage, model) for model in (graph.model, folded(graph, found.smoothing)))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("stage", STAGES)
def test_strength_0_folds_nothing(fp32: Prepared, stage: Stage) -> None:
    graph, found = fp32.graphs[fp32.first(stage)], fp32.found[stage]
    assert smoothing_factors(graph, found.peaks, 0.0) == {}
    assert smoothing_factors(graph, found.peaks, 0.1) != {}


def test_all_sites_of_a_norm_decide_together(fp32: Prepared) -> None:
    """The query of the last layer and its keys: one LayerNorm, two weights, two activations."""
    graph, found = fp32.graphs[fp32.first("language")], fp32.found["language"]
    sites = [site for site in graph.sites if site.norm == "layers.1/norm1"]
    assert len(sites) == 2
    weights = np.concatenate([graph.array(site.weight) for site in sites])
    peaks = np.maximum(*(found.peaks[site.key] for site in sites))
    assert np.allclose(found.smoothing["layers.1/norm1"], factors(peaks, [weights], 0.5))


# --- the factors themselves ---------------------------------------------------------------------------------------------------


def channels(seed: int, count: int = 32, rows: int = 8) -> tuple[Floats, Floats]:
    """Peaks of an activation with outliers, and a weight."""
    rng = np.random.default_rng(seed)
    peaks = np.exp(rng.normal(0, 2, count)).astype(np.float32)
    return peaks, rng.normal(0, 0.1, (rows, count)).astype(np.float32)


@given(seed=st.integers(0, 99), strength=st.floats(0.05, 1))
def test_factors_are_those_of_the_paper_up_to_a_common_one(seed: int, strength: float) -> None:
    peaks, weight = channels(seed)
    s = factors(peaks, [weight], strength).astype(np.float64)
    expected = peaks.astype(np.float64) ** strength / np.abs(weight).max(axis=0).astype(np.float64) ** (1 - strength)
    assert s / expected == pytest.approx(np.full(len(s), s[0] / expected[0]), rel=1e-5)
    assert np.exp(np.log(s).mean()) == pytest.approx(1, rel=1e-4)


def test_full_strength_evens_the_activations_out() -> None:
    peaks, weight = channels(0)
    smooth = peaks / factors(peaks, [weight], 1.0)
    assert smooth == pytest.approx(np.full(len(peaks), smooth[0]), rel=1e-5)


def test_half_strength_gives_activations_and_weights_the_same_peaks() -> None:
    peaks, weight = channels(0)
    s = factors(peaks, [weight], 0.5)
    ratio = (peaks / s) / np.abs(fold_weight(weight, s)).max(axis=0)
    assert ratio == pytest.approx(np.full(len(s), ratio[0]), rel=1e-4)


def test_several_weights_are_as_one() -> None:
    peaks, weight = channels(0, rows=12)
    assert np.array_equal(factors(peaks, [weight[:5], weight[5:]], 0.5), factors(peaks, [weight], 0.5))


@pytest.mark.parametrize("half", [np.float16, np.float32])
def test_dead_channels_stay_as_they_are(half: type[np.floating]) -> None:
    peaks, drawn = channels(0)
    weight = drawn.astype(half)
    alive = factors(peaks, [weight], 0.5)
    peaks[3], weight[:, 5] = 0, 0
    s = factors(peaks, [weight], 0.5)
    assert s[3] == s[5] == 1
    rest = np.delete(s / alive, [3, 5])
    assert rest == pytest.approx(np.full(len(rest), rest[0]), rel=1e-4)
    assert np.array_equal(factors(np.zeros(4, np.float32), [np.ones((2, 4), np.float32)], 0.5), np.ones(4))


def test_factors_have_limits() -> None:
    """What a gamma in fp16 can hold."""
    peaks = np.array([1e-12, 1, 1, 1e12], np.float32)
    s = factors(peaks, [np.ones((2, 4), np.float32)], 1.0)
    assert s.tolist() == pytest.approx([1e-4, 1, 1, 1e4])


@given(seed=st.integers(0, 99), strength=st.floats(0.05, 1))
def test_a_product_stays_the_same(seed: int, strength: float) -> None:
    peaks, weight = channels(seed)
    x = (np.random.default_rng(seed).uniform(-1, 1, (6, len(peaks))) * peaks).astype(np.float32)
    s = factors(peaks, [weight], strength)
    got = fold_norm(x, s).astype(np.float64) @ fold_weight(weight, s).T.astype(np.float64)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(weight).T.astype(np.float64)
    assert (np.abs(got - expected) <= 1e-6 * size).all()
