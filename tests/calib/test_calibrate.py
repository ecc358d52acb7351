"""What calibration observes, against numpy and against the policy itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bundle.errors import CalibrationError
from bundle.manifest import Manifest
from calib.calibrate import How, Seen, StageCalibration, calibrate_stage, runs
from calib.frames import random_sample
from calib.stage_graph import STAGES, read_stage
from runtime.instruction import load_embedding, prompt_tensors
from runtime.policy import Policy
from tests.calib.conftest import Built
from tests.calib.made import Feeds, Prepared, run

Floats = NDArray[np.float32]
MINMAX = How("minmax", 0.5, 1, 1)
SHORT = "Navigate to the gray basket on the left"
# As many words as the smaller bucket cannot hold.
LONG = " ".join(["go to the left of the basket"] * 7)


def calibrated(
    folder: Path, seen: list[Seen], how: How = MINMAX, stages: tuple[str, ...] = STAGES
) -> dict[str, StageCalibration]:
    found: dict[str, StageCalibration] = {}
    before = None
    for stage in stages:
        found[stage] = calibrate_stage(stage, folder, Manifest.load(folder), seen, before, how, lambda: None)
        before = found[stage].outputs
    return found


def frames_of(folder: Path, told: list[tuple[str, str]], *, seed: int = 0) -> list[Seen]:
    """Made-up frames with (instruction, episode)."""
    pictures = random_sample(Manifest.load(folder), frames=len(told), seed=seed)
    return [Seen(picture, *each) for picture, each in zip(pictures, told, strict=True)]


@pytest.fixture(scope="module")
def mixed(built: Built) -> list[Seen]:
    """Two instructions of different buckets, in turns, and two episodes one after the other."""
    told = [(SHORT, "a"), (LONG, "a"), (SHORT, "a"), (LONG, "b"), (SHORT, "b")]
    return frames_of(built(), told)


@pytest.fixture(scope="module")
def found(built: Built, mixed: list[Seen]) -> dict[str, StageCalibration]:
    return calibrated(built(), mixed)


def inputs_of(
    folder: Path, stage: str, seen: list[Seen], found: dict[str, StageCalibration]
) -> list[tuple[int | None, Feeds]]:
    """Bucket and feeds of every frame, put together here; not of the action head."""
    manifest = Manifest.load(folder)
    embedding = load_embedding(folder)
    feeds: list[tuple[int | None, Feeds]] = []
    for each, tokens in zip(seen, found["vision"].outputs, strict=True):
        if stage == "vision":
            feeds.append((None, {"frames": each.frame}))
            continue
        prompt = prompt_tensors(folder, manifest, embedding, manifest.prompt.buckets, instruction=each.instruction)
        feeds.append(
            (
                prompt.bucket,
                {
                    "image_tokens": tokens.reshape(1, -1, manifest.dimensions.embed_dim),
                    "prompt": prompt.prompt,
                    "image_index": prompt.image_index,
                    "action_index": prompt.action_index,
                },
            )
        )
    return feeds


@pytest.mark.parametrize("stage", ["vision", "language"])
def test_peaks_are_the_largest_magnitudes_of_each_channel(
    built: Built, mixed: list[Seen], found: dict[str, StageCalibration], stage: str
) -> None:
    """Over all frames and both buckets, with graphs that are tapped here."""
    folder, manifest = built(), Manifest.load(built())
    expected: dict[str, Floats] = {}
    buckets = set()
    for bucket, feeds in inputs_of(folder, stage, mixed, found):
        graph = read_stage(folder, manifest, stage, sequence=bucket, layers_per_block=1)
        values = run(folder / manifest.graph(stage, bucket).file, feeds, [site.source for site in graph.sites])
        buckets.add(bucket)
        for site in graph.sites:
            peak = np.abs(values[site.source].reshape(-1, site.shape[1])).max(axis=0)
            expected[site.key] = np.maximum(expected.get(site.key, 0), peak)
    assert len(buckets) == (2 if stage == "language" else 1)
    assert found[stage].peaks.keys() == expected.keys()
    for key, peak in expected.items():
        assert found[stage].peaks[key].shape == peak.shape
        assert np.allclose(found[stage].peaks[key], peak, rtol=1e-4, atol=1e-6)


def test_minmax_scales_are_the_smoothed_peaks(found: dict[str, StageCalibration]) -> None:
    for stage in STAGES:
        for key, peak in found[stage].peaks.items():
            smooth = found[stage].factors_of(key)
            top = float((peak if smooth is None else peak / smooth).max())
            assert found[stage].scales[key] == pytest.approx(top / 127, rel=1e-5)
        assert bool(found[stage].smoothing) == (stage != "action_head")
        assert set(found[stage].norms.values()) == set(found[stage].smoothing)


def test_outputs_are_the_features_of_the_policy(
    built: Built, mixed: list[Seen], found: dict[str, StageCalibration]
) -> None:
    """Each frame's at its own place, though frames of one bucket are run together."""
    policy = Policy.load(built(), "ort:cpu", threads=1)
    for index, each in enumerate(mixed):
        policy.reset(each.instruction)
        chunk = policy.step_resized(each.frame)
        assert np.allclose(found["language"].outputs[index], chunk.feature, atol=1e-5)
    policy.close()


def test_the_head_is_run_until_its_memory_is_full_of_each_frame(
    built: Built, mixed: list[Seen], found: dict[str, StageCalibration]
) -> None:
    """Window times from a reset, on every frame alone: frames drawn here and there are no stream."""
    policy = Policy.load(built(), "ort:cpu", threads=1)
    features = found["language"].outputs
    expected: list[list[Floats]] = []
    for feature in features:
        policy.reset(SHORT)
        times = policy.manifest.dimensions.window
        expected.append([policy.run_action_head(feature[None])[0].ravel().copy() for _ in range(times)])
    policy.close()
    assert np.allclose(found["action_head"].outputs, np.stack([runs[-1] for runs in expected]), atol=1e-5)
    assert all(np.abs(runs[-1] - runs[0]).max() > 1e-3 for runs in expected)  # the memory tells

    turned = calibrated_head(built(), mixed[::-1], features[::-1])
    assert np.array_equal(turned.outputs, found["action_head"].outputs[::-1])
    assert turned.scales == pytest.approx(found["action_head"].scales, rel=1e-6)


def test_the_head_is_observed_in_all_of_these_runs(
    built: Built, mixed: list[Seen], found: dict[str, StageCalibration]
) -> None:
    """Its states are inputs of its products: what the first step sees of them is nothing."""
    folder, manifest = built(), Manifest.load(built())
    graph = read_stage(folder, manifest, "action_head", sequence=None, layers_per_block=1)
    path = folder / manifest.graph("action_head").file
    dims = manifest.dimensions
    shape = (dims.window, dims.lstm_layers, dims.latent * dims.lstm_hidden)
    expected: dict[str, Floats] = {}
    first: dict[str, Floats] = {}
    for feature in found["language"].outputs:
        states = {name: np.zeros(shape, np.float32) for name in ("h", "c")}
        for step in range(dims.window):
            values = run(path, {"feature": feature[None], **states}, [site.source for site in graph.sites])
            states = {name: values[f"next_{name}"] for name in ("h", "c")}
            for site in graph.sites:
                peak = np.abs(values[site.source].reshape(-1, site.shape[1])).max(axis=0)
                for peaks in (expected, first) if step == 0 else (expected,):
                    peaks[site.key] = np.maximum(peaks.get(site.key, 0), peak)
    assert found["action_head"].peaks.keys() == expected.keys()
    for key, peak in expected.items():
        assert np.allclose(found["action_head"].peaks[key], peak, rtol=1e-4, atol=1e-6)
    assert any((peak > 1.1 * first[key] + 1e-3).any() for key, peak in expected.items())


def calibrated_head(folder: Path, seen: list[Seen], features: Floats) -> StageCalibration:
    return calibrate_stage("action_head", folder, Manifest.load(folder), seen, features, MINMAX, lambda: None)


def test_more_frames_than_histograms_take(built: Built) -> None:
    """Every frame counts for peaks, some for histograms, and each run is told."""
    seen = frames_of(built(), [(SHORT, str(index)) for index in range(20)])
    told: list[int] = []
    whole = calibrate_stage("vision", built(), Manifest.load(built()), seen, None, MINMAX, lambda: told.append(1))
    assert len(told) == runs(20) == 36
    assert runs(5) == 10
    assert len(whole.outputs) == 20
    first = calibrate_stage("vision", built(), Manifest.load(built()), seen[:10], None, MINMAX, lambda: None)
    assert all((whole.peaks[key] >= peak).all() for key, peak in first.peaks.items())
    assert any((whole.peaks[key] > peak).any() for key, peak in first.peaks.items())


def test_strength_0_smooths_nothing(built: Built, mixed: list[Seen], found: dict[str, StageCalibration]) -> None:
    plain = calibrated(built(), mixed, How("minmax", 0.0, 1, 1), ("vision",))["vision"]
    assert plain.smoothing == plain.norms == {}
    for key, peak in plain.peaks.items():
        assert np.array_equal(peak, found["vision"].peaks[key])
        assert plain.scales[key] == pytest.approx(float(peak.max()) / 127, rel=1e-6)


def test_ranges_are_those_that_were_asked_for(built: Built, mixed: list[Seen]) -> None:
    scales = {
        ranges: calibrated(built(), mixed, How(ranges, 0.5, 1, 1), ("vision",))["vision"].scales
        for ranges in ("minmax", "percentile", "mse")
    }
    for other in ("percentile", "mse"):
        assert all(scales[other][key] <= scale * (1 + 1e-6) for key, scale in scales["minmax"].items())
        assert any(scales[other][key] < 0.95 * scale for key, scale in scales["minmax"].items())


def test_fp16_sees_what_fp32_does(fp32: Prepared, fp16: Prepared) -> None:
    for stage in STAGES:
        single, half = fp32.found[stage], fp16.found[stage]
        assert half.outputs.dtype == np.float32
        assert single.peaks.keys() == half.peaks.keys()
        for key, peak in single.peaks.items():
            assert half.peaks[key].dtype == np.float32
            assert np.abs(half.peaks[key] - peak).max() <= 0.02 * peak.max()
            assert half.scales[key] == pytest.approx(single.scales[key], rel=0.1)


def test_nothing_is_left_behind(built: Built) -> None:
    before = sorted(path.name for path in built().iterdir())
    calibrated(built(), frames_of(built(), [(SHORT, "a")]))
    assert sorted(path.name for path in built().iterdir()) == before


def test_a_policy_that_computes_no_numbers_is_not_calibrated(
    built: Built, mixed: list[Seen], found: dict[str, StageCalibration]
) -> None:
    features = found["language"].outputs.copy()
    features[2, 5] = np.nan
    with pytest.raises(CalibrationError, match="action_head stage gives numbers that are not finite"):
        calibrated_head(built(), mixed, features)
