"""Puts a found INT8 variant into the bundle: packed graphs, the manifest's record, the report, in one atomic exchange."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from bundle import engine_cache
from bundle.atomic import link_or_copy, staged_directory
from bundle.errors import CalibrationError
from bundle.hashing import sha256_file
from bundle.manifest import File, Form, Graph, Manifest, Measured, Quantized, Stage
from bundle.strangers import keep_strangers
from calib.acceptance import Acceptance
from calib.calibrate import StageCalibration
from calib.config import QuantizeConfig
from calib.figures import available
from calib.int8_weights import DataFile
from calib.outliers import OutlierRow, outliers
from calib.own_error import OwnError
from calib.pictures import worst_picture
from calib.quantization_page import BlockRow, Page, Point, render
from calib.rewrite import Integers, check, pack, rewrite
from calib.search import Evaluation, Outcome, front
from calib.stage_graph import STAGES, StageGraph, blocks_of
from calib.workspace import Workspace
from export.console import Reporter, human_bytes
from runtime.backends.select import open_backend, view_of
from runtime.golden import LEAST_COSINE, MOST_ERROR, Golden, deviation
from runtime.policy import Policy

REPORT, PAGE = "reports/quantization.json", "reports/quantization.html"
_FORMS: tuple[Form, ...] = get_args(Form)
_OUTLIERS = 12
# Its picture is no recorded frame, so INT8 is further off there than on frames; beyond this the check at every start would check nothing.
_GOLDEN_COSINE, _GOLDEN_ERROR = 0.95, 0.1


@dataclass(frozen=True)
class Result:
    """Everything that was found; see calib.pipeline."""

    calibration_sha256: str
    calibration_frames: int
    random: bool
    request: str
    config: QuantizeConfig
    strata: Mapping[str, int]
    notes: Sequence[str]
    blocks: tuple[str, ...]
    chosen: Evaluation
    outcome: Outcome
    tries: int
    calibrations: Mapping[str, StageCalibration]
    acceptances: Mapping[str, Acceptance]
    measured: tuple[Measured, ...]
    own: tuple[OwnError, ...]
    machine: str
    seconds: Mapping[str, float]


class Report(msgspec.Struct, frozen=True):
    """reports/quantization.json."""

    request: str
    backend: str
    chosen: Evaluation
    tried: tuple[Evaluation, ...]
    without: dict[str, Evaluation]
    tries: int
    acceptances: dict[str, Acceptance]
    measured: tuple[Measured, ...]
    own: tuple[OwnError, ...]
    machine: str
    onnxruntime: str
    calibration_sha256: str
    strata: dict[str, int]
    notes: tuple[str, ...]
    outliers: tuple[OutlierRow, ...]
    seconds: dict[str, float]


def read_request(bundle: Path) -> str | None:
    """Which request made the variant that is there."""
    try:
        return msgspec.json.decode((bundle / REPORT).read_bytes(), type=Report).request
    except (OSError, msgspec.DecodeError):
        return None


def publish(
    bundle: Path,
    manifest: Manifest,
    workspace: Workspace,
    graphs: Mapping[tuple[str, int | None], StageGraph],
    integers: Mapping[str, Integers],
    result: Result,
    frame: Callable[[str, int], NDArray[np.uint8]],
    reporter: Reporter,
) -> None:
    """Exchange the bundle for one with the variant; the caller holds its lock.

    Args:
        manifest: of the floating-point policy, without a variant.

    Raises:
        CalibrationError: the golden step, which the runtime replays at every start, is off by more than INT8 explains.
    """
    with staged_directory(bundle) as staging:
        kept = dict(manifest.files)
        for name in kept:
            link_or_copy(bundle / name, staging / name)
        (staging / "reports").mkdir(exist_ok=True)
        stages: dict[str, Stage] = {}
        files: dict[str, File] = {}
        for stage in STAGES:
            chosen = set(blocks_of(graphs, stage)) & set(result.chosen.int8)
            if chosen:
                stages[stage], written = _write_stage(
                    stage, manifest.stages[stage], chosen, workspace.folder, staging, graphs, integers[stage], result
                )
                files |= written
        quantized = Quantized(
            stages=stages,
            calibration_sha256=result.calibration_sha256,
            calibration_frames=result.calibration_frames,
            random=result.random,
            method=f"{result.config.ranges}, smoothing {result.config.smoothing:g}",
            assignment={
                block: "int8" if block in result.chosen.int8 else manifest.stages[stage].precision
                for stage in STAGES
                for block in blocks_of(graphs, stage)
            },
            budget=result.config.max_action_error,
            action_error=max(found.action_error for found in result.acceptances.values()),
            frames=next(iter(result.acceptances.values())).frames,
            verdict="FAIL" if any(found.verdict == "FAIL" for found in result.acceptances.values()) else "PASS",
            golden_cosine=0.0,
            golden_error=0.0,
            machine=result.machine,
            measured=result.measured,
        )
        draft = msgspec.structs.replace(manifest, quantized=quantized, files=kept | files)
        similarity, error = _golden(staging, draft, result, reporter)
        quantized = msgspec.structs.replace(quantized, golden_cosine=similarity, golden_error=error)
        (staging / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(_report(result)), indent=2) + b"\n")
        page = _page(bundle, result, frame, f"feature cosine {similarity:.6f}, action error {error:.3g}")
        (staging / PAGE).write_text(render(page), encoding="utf-8")
        for name in (REPORT, PAGE):
            files[name] = File(sha256=sha256_file(staging / name), bytes=(staging / name).stat().st_size)
        final = msgspec.structs.replace(manifest, quantized=quantized, files=kept | files)
        final.save(staging)
        Manifest.load(staging).verify_sizes(staging)
        keep_strangers(bundle, staging)
        engines = engine_cache.carry_over(bundle, staging, final)
        if engines:
            reporter.result(f"{engines} engines kept")
        size = sum(stage.weight_bytes for stage in stages.values())
        verdict = "NOT JUDGED" if result.random else quantized.verdict
        reporter.result(f"{bundle}  INT8 {human_bytes(size)}  {verdict}  {bundle / PAGE}")


def _write_stage(
    stage: str,
    base: Stage,
    blocks: set[str],
    source: Path,
    target: Path,
    graphs: Mapping[tuple[str, int | None], StageGraph],
    integers: Integers,
    result: Result,
) -> tuple[Stage, dict[str, File]]:
    """All graphs of a stage in every form, and one file with the weights of all."""
    written: list[Graph] = []
    files: dict[str, File] = {}
    digest = hashlib.sha256(result.calibration_sha256.encode())
    with DataFile(target / f"{stage}.int8.onnx.data") as data:
        for form in _FORMS:
            for graph in base.graphs:
                model = pack(rewrite(graphs[stage, graph.sequence], blocks, integers, form), source, data)
                kind = "" if form == "portable" else f".{form}"
                length = "" if graph.sequence is None else f".s{graph.sequence}"
                path = target / f"{stage}.int8{kind}{length}.onnx"
                content = model.SerializeToString(deterministic=True)
                path.write_bytes(content)
                if form == "portable":
                    digest.update(content)
                files[path.name] = File(sha256=sha256_file(path), bytes=path.stat().st_size)
                written.append(
                    Graph(
                        file=path.name,
                        form=form,
                        sequence=graph.sequence,
                        nodes=len(model.graph.node),
                        inputs=graph.inputs,
                        outputs=graph.outputs,
                    )
                )
    digest.update(data.sha256.encode())
    files[data.path.name] = File(sha256=data.sha256, bytes=data.bytes)
    for each in written:
        if each.form != "ort-cpu":  # its operators are not ONNX's
            check(target / each.file)
    entry = Stage(
        key=digest.hexdigest(),
        precision="int8",
        weights=data.path.name,
        weight_bytes=data.bytes,
        graphs=tuple(written),
    )
    return entry, files


def _golden(folder: Path, draft: Manifest, result: Result, reporter: Reporter) -> tuple[float, float]:
    """What the golden step gives: the worst of all accepted backends, through the files that are about to be published."""
    golden = Golden.load(folder)
    draft.save(folder)
    found = []
    for name in result.acceptances:
        policy = Policy(
            folder, view_of(Manifest.load(folder), name, "int8"), open_backend(name, threads=result.config.threads)
        )
        try:
            policy.reset(token_ids=[int(token) for token in golden.token_ids])
            found.append(deviation(policy, golden))
        finally:
            policy.close()
    similarity = min(cosine for cosine, _ in found)
    error = float(np.max([error for _, error in found]))  # Python's max would lose a NaN
    reporter.result(f"golden step: feature cosine {similarity:.6f}, action error {error:.3g}")
    # Made-up pictures promise nothing, but what the check at a start would never let pass could not even be timed.
    least = LEAST_COSINE if result.random else _GOLDEN_COSINE
    most = MOST_ERROR if result.random else min(max(_GOLDEN_ERROR, 5 * result.config.max_action_error), MOST_ERROR)
    if not (similarity >= least and error <= most):
        raise CalibrationError(
            "INT8 is too far off on the golden step, which is replayed at every start",
            got=f"feature cosine {similarity:.4f}, action error {error:.3g}",
            expected=f"at least {least}, at most {most:g}",
            hint="more varied recordings widen the ranges; --ranges minmax clips nothing.",
        )
    return similarity, error


def _report(result: Result) -> Report:
    return Report(
        request=result.request,
        backend=result.chosen.backend,
        chosen=result.chosen,
        tried=result.outcome.tried,
        without=result.outcome.without,
        tries=result.tries,
        acceptances=dict(result.acceptances),
        measured=result.measured,
        own=result.own,
        machine=result.machine,
        onnxruntime=onnxruntime.__version__,
        calibration_sha256=result.calibration_sha256,
        strata=dict(result.strata),
        notes=tuple(result.notes),
        outliers=outliers(result.calibrations),
        seconds=dict(result.seconds),
    )


def _page(bundle: Path, result: Result, frame: Callable[[str, int], NDArray[np.uint8]], golden: str) -> Page:
    acceptance = result.acceptances[result.chosen.backend]
    fronts = front(result.outcome.tried)
    start = result.outcome.all_int8
    # What was tried was measured in turns with everything in INT8, over a longer time; the last measurement gives the scale.
    ms = {(row.backend, row.precision == "int8"): row.step_ms for row in result.measured}
    scale = ms[result.chosen.backend, True] / result.chosen.latency_ms
    points = tuple(
        Point(
            label=_label(result.blocks, each),
            latency_ms=each.latency_ms * scale,
            action_error=each.action_error,
            chosen=each.int8 == result.chosen.int8,
            on_front=each.int8 in fronts,
        )
        for each in result.outcome.tried
    )
    rows = tuple(
        BlockRow(
            block=block,
            precision="int8" if block in result.chosen.int8 else "float",
            error_alone=start.action_error - each.action_error,
            latency_ms=(each.latency_ms - start.latency_ms) * scale,
        )
        for block, each in result.outcome.without.items()
    )
    pictures: tuple[tuple[str, bytes], ...] = ()
    if available():
        pictures = tuple(
            (
                f"{each.episode}, frame {each.frame}: {each.column} at chunk step {each.step}, error {each.error:.3g}",
                worst_picture(frame(each.episode, each.frame), each.reference, each.candidate, each.names),
            )
            for each in acceptance.worst
        )
    made_of = "made-up pictures" if result.random else "frames"
    facts = [
        ("calibration", f"{result.calibration_frames} {made_of}, id {result.calibration_sha256[:16]}"),
        ("ranges", f"{result.config.ranges}, smoothing {result.config.smoothing:g}"),
        ("searched on", f"{result.chosen.backend}, ONNX Runtime {onnxruntime.__version__}"),
        ("machine", result.machine),
        *((f"step, {row.backend} {row.precision}", f"{row.step_ms:.4g} ms") for row in result.measured),
        *((f"verdict on {name}", f"{found.verdict}, action error {found.action_error:.3g}") for name, found in result.acceptances.items()),
        ("golden step, replayed at every start", golden),
        ("tried on the test frames", f"{result.tries} assignment{'' if result.tries == 1 else 's'}"),
        *((f"seconds, {name.lower()}", f"{value:.0f}") for name, value in result.seconds.items()),
    ]  # fmt: skip
    return Page(
        title=f"INT8 of {bundle.resolve().name}",
        bundle=bundle.resolve().name,
        variant="int8",
        acceptance=acceptance,
        points=points,
        blocks=rows,
        outliers=outliers(result.calibrations)[:_OUTLIERS],
        facts=tuple(facts),
        strata=tuple(result.strata.items()),
        worst_pictures=pictures,
        floating_ms=ms["ort:cpu", False],
        backend=result.chosen.backend,
        notes=tuple(result.notes),
        judged=not result.random,
        own=result.own,
    )


def _label(blocks: Sequence[str], found: Evaluation) -> str:
    rest = [block for block in blocks if block not in found.int8]
    if not rest:
        return "all INT8"
    return f"{', '.join(rest)} in float" if len(rest) <= 3 else f"INT8: {', '.join(found.int8)}"
