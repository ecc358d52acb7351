"""A run on a real bundle: everything in the result, the reasons of a verdict, and what is left when it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import bench.outcome
import bench.session
from bench.ask import Ask
from bench.feed import drawn_feed, episode_feed
from bench.nvml import Nvml
from bench.outcome import fallbacks
from bench.results import Fact, Fingerprint, Loop, Plan, Result, Timing, read_result, write_result
from bench.session import run
from bench.verdict import judge
from bundle.errors import BackendError, ConfigError, EpisodeError
from bundle.manifest import Manifest
from episodes.synthetic import write_synthetic
from runtime.backends.fake_gpu import DESKTOP
from runtime.policy import Policy
from tests.bundles import Tiny, make_bundle
from tests.engines import fake_backend

KNOWN = "go to the basket on the left"


class Screen:
    def __init__(self) -> None:
        self.bars: dict[str, list[float]] = {}

    def phase(self, label: str, total: float) -> Callable[[float], None]:
        self.bars[label] = [total, 0.0]

        def advance(done: float) -> None:
            self.bars[label][1] += done

        return advance


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("session") / "tiny.bundle", Tiny())


@pytest.fixture
def policy(bundle: Path) -> Policy:
    return Policy.load(bundle, "ort:cpu", threads=1)


def ask(**changed: Any) -> Ask:
    usual: dict[str, Any] = {"threads": 1, "steps": 12, "warmup": 2, "ticks": 4, "rate": 50.0}
    return Ask(**(usual | changed))


def measured(bundle: Path, policy: Policy, **changed: Any) -> Result:
    return run(ask(**changed), bundle, policy, drawn_feed(policy.manifest, height=48, width=64), Screen())


def test_everything_is_in_the_result_and_survives_a_file(bundle: Path, policy: Policy, tmp_path: Path) -> None:
    episode = write_synthetic(tmp_path, "v1", side="left", seed=0, height=48, width=64, length=9)
    screen = Screen()
    plan = Plan(device="here", calibrated=False, stages={})
    result = run(
        ask(minutes=0.003), bundle, policy, episode_feed(episode, instruction=KNOWN), screen, plan=lambda *_: plan
    )
    assert list(result.sections) == ["preprocess", "vision", "language", "action_head", "glue", "total"]
    assert list(result.layers) == ["engine", "io", "step", "loop"]
    assert {timing.count for timing in result.sections.values()} == {12}
    p50 = [result.layers[name].p50 for name in ("engine", "io", "step")]
    assert p50 == sorted(p50)
    assert result.loop is not None
    assert result.loop.ticks == 4
    assert result.soak is not None
    assert result.memory is not None
    assert result.energy is not None
    assert result.energy.note or result.energy.sensor
    assert result.drive is not None
    assert np.shape(result.drive.predicted) == np.shape(result.drive.recorded) == (9, len(result.drive.axes))
    assert (result.settings.frame_size, result.partial, result.plan) == ((48, 64), False, plan)
    assert 0 < result.start.loaded_s <= result.start.first_action_s
    assert screen.bars["steps"] == [14, 14]
    assert screen.bars["episode"] == [9, 9]
    write_result(tmp_path / "latency.json", result)
    assert read_result(tmp_path / "latency.json") == result


def test_the_predictions_are_those_of_a_replay(bundle: Path, policy: Policy, tmp_path: Path) -> None:
    """Not of a policy that still remembers the frames before."""
    from episodes.reader import open_episode
    from runtime.replay import replay

    path = write_synthetic(tmp_path, "v1", side="left", seed=1, height=48, width=64, length=7)
    result = run(ask(), bundle, policy, episode_feed(path, instruction=KNOWN), Screen())
    with open_episode(path) as episode:
        expected = replay(policy, episode, instruction=KNOWN)
    assert result.drive is not None
    np.testing.assert_allclose(result.drive.predicted, expected.predicted, atol=1e-6)
    np.testing.assert_allclose(result.drive.recorded, expected.recorded)


def test_steps_are_as_many_as_fit(bundle: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.session, "_SHARE_S", 1e-9)
    assert measured(bundle, policy, steps=0).sections["total"].count == 30


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), BackendError("the device is lost", got="code 700", hint="restart")]
)
@pytest.mark.parametrize("at", [20, 25, 29])
def test_what_stops_a_run_leaves_a_partial_result(bundle: Path, policy: Policy, stop: BaseException, at: int) -> None:
    """In the steps, in the control loop, in the soak."""
    step, made = policy.step, [0]

    def counted(frame: Any) -> Any:
        made[0] += 1
        if made[0] == at:
            raise stop
        return step(frame)

    policy.step = counted  # type: ignore[method-assign, assignment]
    result = measured(bundle, policy, steps=17, minutes=1.0)
    assert result.partial
    assert result.stopped == ("interrupted" if isinstance(stop, KeyboardInterrupt) else "the device is lost (code 700)")
    assert result.sections["total"].count == min(17, at - 4)
    assert (result.loop is not None) == (at > 24)
    assert "stopped before its end: too few samples for the tail" in result.verdict.reasons
    msgspec.json.decode(msgspec.json.encode(result), type=Result)


def test_stopped_before_the_first_step_there_is_no_result(
    bundle: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.session, "measure_steps", stopped)
    with pytest.raises(BackendError, match=r"(?s)nothing was measured.*interrupted"):
        measured(bundle, policy)


def test_words_that_cannot_be_tokenised_are_no_obstacle_and_no_prediction(
    bundle: Path, policy: Policy, tmp_path: Path
) -> None:
    """Another prompt takes as long; but what it predicts must not pass for an answer to these words."""
    path = write_synthetic(tmp_path, "v1", side="left", seed=0, height=48, width=64, length=7)
    result = run(ask(), bundle, policy, episode_feed(path, instruction="words that nobody knows"), Screen())
    assert result.sections["total"].count == 12
    assert result.drive is None
    assert "cannot tokenise" in result.settings.instruction


def test_an_episode_without_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_synthetic(tmp_path, "v1", side="left", seed=0, height=48, width=64)
    monkeypatch.setattr("episodes.reader.Episode.__len__", lambda _: 0)
    with pytest.raises(EpisodeError, match="has no frames"):
        episode_feed(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": -1},
        {"rounds": 0},
        {"rate": 0},
        {"baselines": ("eager-fp23",)},
        {"deadline_ms": float("nan")},
        {"minutes": float("nan")},
    ],
)
def test_settings_that_make_no_sense(bundle: Path, policy: Policy, changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"too small|out of range|no baseline"):
        measured(bundle, policy, **changed)


def test_a_backend_that_fell_back_is_said(bundle: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fallbacks("ort:cpu", policy) == ()
    policy.failed_backends = ("ort:cuda: wrong numbers",)
    assert fallbacks("auto", policy) == ("ort:cpu runs because another backend failed: ort:cuda: wrong numbers",)
    policy.failed_backends = ()

    class Gpu:
        def __enter__(self) -> Nvml:
            return Nvml(name="NVIDIA L4")

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(bench.outcome, "open_nvml", Gpu)
    assert fallbacks("auto", policy) == ("ort:cpu runs although there is a GPU (NVIDIA L4)",)
    assert fallbacks("ort:cpu", policy) == ()  # asked for


def test_how_the_backend_computes_is_said_and_is_no_fault() -> None:
    found = verdict(remark="INT8 runs the slow way")
    assert found.outcome == "pass"
    assert found.reasons == ("INT8 runs the slow way",)


FINE = Fingerprint(machine={"cpu": Fact(value="x")}, software={}, before={}, after={})


def verdict(**changed: Any) -> Any:
    usual: dict[str, Any] = {
        "step": Timing.of([50.0] * 200),
        "loop": None,
        "deadline_ms": 200.0,
        "backend": "trt",
        "fallback": (),
        "fingerprint": FINE,
        "harness_ms": 0.01,
        "clock_jumps": (),
        "partial": False,
    }
    return judge(**(usual | changed))


def loop(decision: list[float], skipped: int = 0) -> Loop:
    late = sum(value > 200 for value in decision)
    timing = Timing.of(decision)
    return Loop(ticks=len(decision), misses=late, skipped=skipped, reaction=timing, decision=timing, period=None)


def test_verdicts() -> None:
    assert verdict().outcome == "pass"
    assert verdict().reasons == ()
    assert verdict(step=Timing.of([50.0] * 190 + [300.0] * 10)).outcome == "miss"
    assert verdict(loop=loop([50.0] * 199 + [300.0])).outcome == "pass"  # half a per cent
    assert verdict(loop=loop([50.0] * 195 + [300.0] * 5)).outcome == "miss"
    assert verdict(loop=loop([50.0] * 200, skipped=50)).outcome == "miss"
    wrong = verdict(fallback=("ort:cpu runs although there is a GPU",))
    assert wrong.outcome == "invalid"
    assert "Not valid" in wrong.line


def test_reasons() -> None:
    unlocked = Fingerprint(
        machine={"gpu clocks": Fact(value="306-918 MHz", note="not locked", warn=True)},
        software={},
        before={},
        after={},
    )
    found = verdict(fingerprint=unlocked, clock_jumps=(-3600.0, 1.0), harness_ms=0.5, step=Timing.of([50.0] * 20))
    assert found.reasons == (
        "gpu clocks: 306-918 MHz, not locked",
        "clocks jumped 2 times, by up to 3600.00 s",
        "the harness itself takes 0.50 ms a step",
        "p99 of 20 samples is close to their maximum: more --steps tell more about the tail",
    )


@pytest.mark.fake_gpu
def test_on_a_gpu_the_engines_are_timed_by_their_own_events(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "tiny.bundle", Tiny())
    backend, gpu = fake_backend(folder, DESKTOP, "10.3.0")
    policy = Policy(folder, Manifest.load(folder), backend)
    result = run(ask(), folder, policy, drawn_feed(policy.manifest, height=48, width=64), Screen(), backend="trt")
    stages = [result.sections[name].samples for name in ("vision", "language", "action_head")]
    np.testing.assert_allclose(result.layers["engine"].samples, np.sum(stages, axis=0))
    assert gpu.calls.count("elapsed_ms") >= 3 * 12
    assert result.bundle.backend == "trt"
