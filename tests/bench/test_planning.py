"""Plans: precisions, memory, verdicts, and the short word that a latency result keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import planning, targets
from bench.calibration import Calibration, save_calibration
from bench.planning import label, make_plan, parse_precisions, plan_here
from bench.targets import here, probed_target, table_target, wanted
from bench.workload import FULL
from bundle.errors import BackendError, ConfigError
from tests.bench.plans import MACHINE, calibration, manifest_of, product

FP16 = {"vision": "fp16", "language": "fp16", "action_head": "fp32"}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(planning, "machine_of", lambda backend, threads: MACHINE)
    monkeypatch.setattr(targets, "machine_of", lambda backend, threads: MACHINE)


def test_the_floor_of_the_reference_robot_is_the_known_one() -> None:
    target = table_target("orin-nx-16gb-super", None)
    fp16, int8 = (
        make_plan(FULL, 88, mixture, target, 200)
        for mixture in parse_precisions("fp16,vision=fp16,language=int8", None)
    )
    assert fp16.floor_ms == pytest.approx(33, abs=1)
    assert int8.floor_ms == pytest.approx(21, abs=1)
    assert [stage.bottleneck for stage in fp16.stages] == ["compute", "memory", "memory"]
    assert (fp16.outcome, int8.outcome) == ("meets", "meets")
    assert fp16.stages[1].weights_mb == pytest.approx(2420, rel=0.001)


@pytest.mark.parametrize(
    ("device", "power", "precision", "deadline_ms", "outcome"),
    [
        ("orin-nx-16gb", "15W", "fp16", 200, "meets"),
        ("orin-nx-16gb", "15W", "fp16", 100, "misses"),
        ("orin-nx-16gb", "15W", "fp16", 50, "impossible"),
        ("orin-nano-4gb", None, "fp16", 1000, "does not fit"),
    ],
)
def test_the_verdict(device: str, power: str | None, precision: str, deadline_ms: float, outcome: str) -> None:
    (mixture,) = parse_precisions(precision, None)
    assert make_plan(FULL, 88, mixture, table_target(device, power), deadline_ms).outcome == outcome


def test_memory_is_near_what_was_measured() -> None:
    # docs/performance.md: 6.6 GB of a loaded fp32 policy on a CPU, 5.6 GB of the process that builds the fp16 language engine.
    cpu = make_plan(FULL, 88, dict.fromkeys(FP16, "fp32"), table_target("core-i7-12700", None), 200)
    assert cpu.memory.run == pytest.approx(6.6, rel=0.1)
    jetson = make_plan(FULL, 88, FP16, table_target("orin-nx-16gb", None), 200)
    assert jetson.memory.build == pytest.approx(5.6, rel=0.1)
    assert jetson.memory.usable == pytest.approx(14.5)


def test_precisions_are_named_singly_or_mixed() -> None:
    assert parse_precisions("fp16", None) == (FP16,)
    assert [label(mixture) for mixture in parse_precisions(" fp32 ,int8,language=int8", None)] == [
        "fp32",
        "int8",
        "vision fp16, language int8",
    ]
    assert parse_precisions("action_head=fp16", None) == ({**FP16, "action_head": "fp16"},)
    assert label({**FP16, "action_head": "fp16"}) == "fp16, action_head fp16"
    assert [label(mixture) for mixture in parse_precisions(None, None)] == ["fp16", "vision fp16, language int8"]


def test_a_bundle_says_what_was_not_named() -> None:
    manifest = manifest_of(FULL, "fp32")
    assert [label(mixture) for mixture in parse_precisions(None, manifest)] == ["fp32"]
    assert parse_precisions("language=int8", manifest) == (
        {"vision": "fp32", "language": "int8", "action_head": "fp32"},
    )


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("fp8", "unknown precision", "did you mean fp"),
        ("fp16,", "unknown precision", "take one of these"),
        ("FP16", "unknown precision", "did you mean fp16?"),
        ("vison=fp16", "unknown stage", "did you mean vision?"),
        ("vision=", "unknown precision", "take one of these"),
        ("language=int4", "unknown precision", "did you mean int8?"),
    ],
)
def test_an_unknown_precision_or_stage_is_answered_with_the_nearest(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_precisions(text, None)
    assert caught.value.hint.startswith(hint)


def complete() -> Calibration:
    """A rate for all that the full size has."""
    stages = wanted(FULL, 88, (dict.fromkeys(FP16, "fp32"),))  # type: ignore[arg-type]
    ops = [op for ops, _ in stages for op in ops]
    return calibration(
        *(product(op.m, op.n, op.k, 1e11, batch=op.batch, cold=op.kind == "linear") for op in ops if op.flops)
    )


def test_a_saved_calibration_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    save_calibration(complete())
    monkeypatch.setattr(planning, "measure", None)
    plan = plan_here(manifest_of(FULL), 88, threads=2, backend="ort:cpu")
    assert plan.calibrated
    assert plan.device == "Test CPU, 2 threads"
    assert list(plan.stages) == ["vision", "language", "action_head"]
    language = plan.stages["language"]
    assert language.gflop == pytest.approx(206.8, rel=0.001)
    assert language.mbytes > 4836
    assert language.expected_ms >= language.floor_ms == pytest.approx(2068, rel=0.001)
    assert language.bottleneck == "compute"


@pytest.mark.parametrize("steady", [True, False])
def test_without_one_this_machine_is_probed_and_a_quiet_outcome_kept(
    steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calibration(*complete().products, share=1.0 if steady else 0.4)
    asked = {}

    def measure(machine: object, ops: object, **options: object) -> Calibration:
        asked.update(options)
        return made

    monkeypatch.setattr(planning, "measure", measure)
    plan = plan_here(manifest_of(FULL), 88, threads=2, backend="ort:cpu")
    assert plan.calibrated
    assert 0 < float(str(asked["budget_s"])) <= 10
    assert ("busy" in plan.note) != steady
    monkeypatch.setattr(planning, "measure", measure if not steady else None)
    assert plan_here(manifest_of(FULL), 88, threads=2, backend="ort:cpu").stages


@pytest.mark.parametrize(
    "error",
    [BackendError("no such thing", hint="-"), OSError("disk"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_a_machine_that_cannot_be_probed_has_a_reason_and_no_stages(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(planning, "measure", fail)
    plan = plan_here(manifest_of(FULL), 88, threads=0, backend="ort:cpu")
    assert (plan.stages, plan.calibrated) == ({}, False)
    assert plan.note.startswith("this machine could not be probed: ")
    assert not plan.note.endswith(": ")


@pytest.mark.parametrize("backend", ["fake", "trt"])
def test_backends_without_probes_have_a_reason(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "recognised", lambda: None)
    plan = plan_here(manifest_of(FULL), 88, threads=0, backend=backend)
    assert plan.stages == {}
    assert f"no probes for {backend}" in plan.note


def test_a_known_gpu_is_planned_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "recognised", lambda: table_target("h200", None))
    plan = plan_here(manifest_of(FULL, "fp16"), 88, threads=0, backend="trt")
    assert (plan.device, plan.calibrated) == ("H200", False)
    assert plan.stages["language"].floor_ms < 1


def test_this_machine_without_probes_is_what_it_says_of_itself() -> None:
    target, new = here(FULL, 88, (FP16,), backend="ort:cpu", threads=2, calibrate=False)  # type: ignore[arg-type]
    assert new is None
    assert not target.calibrated
    assert "assumed" in target.basis
    assert "--calibrate" in target.notes[0]
    assert target.peak.flops["fp32"] > 1e9
    save_calibration(calibration())
    target, new = here(FULL, 88, (FP16,), backend="ort:cpu", threads=2, calibrate=False)  # type: ignore[arg-type]
    assert new is None
    assert target.calibrated


def test_a_busy_calibration_says_so_whenever_it_is_used() -> None:
    save_calibration(calibration(drift=0.7, share=0.5))
    target, _ = here(FULL, 88, (FP16,), backend="ort:cpu", threads=2, calibrate=False)  # type: ignore[arg-type]
    assert "got 50% of their CPUs and rates moved by 30%" in target.notes[0]
    assert probed_target(calibration()).notes == ()


def test_int8_on_openvino_has_no_probe() -> None:
    """Floors of another precision would be four times too high, and the measurement below them."""
    plan = plan_here(manifest_of(FULL, "int8"), 88, threads=2, backend="ort:openvino")
    assert plan.stages == {}
    assert plan.note == "there is no INT8 probe for ort:openvino"
