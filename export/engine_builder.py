"""Brings a bundle's engines up to date: build what is missing, keep what is intact, prove what can run here.

Works from the bundle alone - graphs, weights and the recorded reference - so it is the same on a training PC and on a robot without torch.
Engines are published one by one: an interrupted run keeps what it finished. Nothing of the bundle itself is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from bundle import engine_cache
from bundle.atomic import disk_errors, write_bytes
from bundle.engine_cache import ENGINE_PARITY, ENGINE_PARITY_INT8, TIMING_CACHE, EngineRecord
from bundle.errors import BundleError, EngineBuildError, EngineError, ParityError, PromptError, StorageError
from bundle.hashing import sha256_file
from bundle.manifest import Manifest
from bundle.recording import RECORDING_NAME, Recording
from export import parity
from export.console import Reporter, human_bytes
from export.engine_options import EngineOptions
from export.engine_plan import (
    EngineTask,
    Machines,
    choose_machines,
    free_device_bytes,
    make_tasks,
    tasks_table,
    view_to_build,
    workspace_bytes,
)
from export.engine_process import Progress, build_in_process
from export.to_tensorrt import EngineBuilt, EngineRequest
from runtime.backends.trt import TrtBackend
from runtime.policy import Policy

Builder = Callable[[EngineRequest, Progress], EngineBuilt]


@dataclass(frozen=True)
class Outcome:
    """What happened: labels by fingerprint, e.g. `orin-sm87x8-trt10.3.0-cuda12/vision`."""

    built: tuple[str, ...] = ()
    refitted: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()


def plan_engines(bundle: Path, options: EngineOptions, reporter: Reporter) -> tuple[Machines, list[EngineTask]]:
    """Say what would be built."""
    machines = choose_machines(options)
    if machines.tensorrt is None:
        reporter.result(f"no engines: {machines.reason}")
        return machines, []
    manifest = Manifest.load(bundle)
    view = view_to_build(manifest, options)
    named = "INT8, the bundle's variant" if view.precision == "int8" else f"{view.precision}, as exported"
    reporter.result(machines.reason if manifest.quantized is None else f"{machines.reason}; {named}")
    tasks = make_tasks(bundle, view, options, machines)
    reporter.table(tasks_table(view, tasks))
    return machines, tasks


def build_engines(
    bundle: Path, options: EngineOptions, reporter: Reporter, *, force: bool = False, build: Builder = build_in_process
) -> Outcome:
    """Build the missing engines of a bundle and verify those that run here. The caller holds the bundle's lock.

    Args:
        force: build also what is there.

    Raises:
        EngineBuildError: TensorRT refused, crashed or ran out of memory; engines finished before are kept.
        ParityError: an engine does not do what the checkpoint does; the engines of this machine are removed again.
        BundleError: the bundle's graphs are damaged.
        StorageError: the disk is full.
    """
    machines, tasks = plan_engines(bundle, options, reporter)
    if machines.tensorrt is None:
        return Outcome()
    manifest = Manifest.load(bundle)
    view = view_to_build(manifest, options)
    reused: list[str] = []
    missing: list[EngineTask] = []
    for task in tasks:
        if force or not _is_intact(bundle, task, reporter):
            missing.append(task)
        else:
            reused.append(_name(task))
    made: dict[str, list[str]] = {"built": [], "refitted": []}
    if missing:
        with reporter.count_bar("checking graphs and weights", 1) as advance:
            # An engine of damaged weights would be a cached error; those of the other precision are not read.
            manifest.verify(bundle, without=manifest.all_stage_files() - view.stage_files())
            advance()
        _check_space(bundle, view, missing)
        _forget_proofs(bundle, view, missing)
    for task in missing:
        record = _build_one(bundle, view, options, machines, task, reporter, build)
        made[record.origin].append(_name(task))
    if reused:
        reporter.result(f"reused: {', '.join(reused)}")
    fingerprints = {task.fingerprint for task in tasks}
    verified = []
    for fingerprint in sorted(fingerprints):
        if not machines.runs_here(fingerprint):
            reporter.result(
                f"{fingerprint}: not run here, as there is no such GPU; the golden step proves the engines at their first start"
            )
        elif missing or not engine_cache.parity_file(bundle, view, fingerprint).exists():
            _prove(bundle, view, machines, fingerprint, reporter)
            verified.append(fingerprint)
    _remove_useless(bundle, manifest, tasks, reporter)
    return Outcome(tuple(made["built"]), tuple(made["refitted"]), tuple(reused), tuple(verified))


def _is_intact(bundle: Path, task: EngineTask, reporter: Reporter) -> bool:
    if task.cached is None:
        return False
    try:
        engine_cache.verify(bundle, task.cached)
    except EngineError as error:
        reporter.warn(f"{error.what} ({error.got}); it is built again")
        return False
    return True


def _build_one(
    bundle: Path,
    manifest: Manifest,
    options: EngineOptions,
    machines: Machines,
    task: EngineTask,
    reporter: Reporter,
    build: Builder,
) -> EngineRecord:
    folder = engine_cache.fingerprint_folder(bundle, task.fingerprint)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    entry = manifest.stages[task.stage]
    temporary = folder / f".{task.label}.{task.key[:16]}.building"
    cache = folder / f".{TIMING_CACHE}.building"
    # Not INT8: scales are part of its graph, and what is refitted is weights.
    source = _refit_source(bundle, manifest, task) if options.refit and entry.precision != "int8" else None
    request = EngineRequest(
        flavour=machines.tensorrt.name if machines.tensorrt else "trt",
        label=task.label,
        graph=str((bundle / task.graph.file).resolve()),
        output=str(temporary.resolve()),
        layers_output=str(temporary.with_suffix(".layers").resolve()),
        target=task.target,
        optimization_level=options.optimization_level,
        workspace_bytes=workspace_bytes(options, free_device_bytes(), entry.weight_bytes),
        refit=options.refit,
        timing_cache=str(cache.resolve()),
        refit_from=None if source is None else str((bundle / source.file).resolve()),
    )
    try:
        with disk_errors(folder):
            if (folder / TIMING_CACHE).exists():
                shutil.copyfile(folder / TIMING_CACHE, cache)
            with reporter.phases_bar(f"{task.label} {task.fingerprint}") as progress:
                built = build(request, progress)
            record = engine_cache.new_record(
                stage=task.stage,
                sequence=task.graph.sequence,
                content=task.content,
                key=task.key,
                fingerprint=task.fingerprint,
                settings=task.settings,
                origin="refitted" if built.refitted else "built",
                sha256=sha256_file(temporary),
                bytes=temporary.stat().st_size,
                layers=built.layers,
                inputs=built.inputs,
                outputs=built.outputs,
                seconds=built.seconds,
                built_at=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            )
            _check_tensors(task, record)
            engine_cache.publish(bundle, temporary, record)
            layers = temporary.with_suffix(".layers")
            if layers.exists():
                layers.replace((bundle / record.file).with_suffix(".layers"))
            if built.timing_cache:
                write_bytes(folder / TIMING_CACHE, cache.read_bytes())
    finally:
        for path in (temporary, temporary.with_suffix(".layers"), cache):
            path.unlink(missing_ok=True)
    how = "refitted" if built.refitted else "built with the timing cache" if built.timing_cache else "built"
    if options.refit and source is not None and not built.refitted:
        how += " (refit was refused)"
    reporter.result(
        f"{task.label}: {how} in {built.seconds:.1f} s, {human_bytes(record.bytes)}, {built.layers} layers"
        f", peak {built.peak_rss_mb / 1000:.1f} GB"
    )
    return record


def _refit_source(bundle: Path, manifest: Manifest, task: EngineTask) -> EngineRecord | None:
    """The newest refittable engine of the same place, machine and graph, of any weights, but not one of the bundle's INT8 stages."""
    view = manifest if manifest.quantized is None else manifest.int8()
    int8 = {
        engine_cache.content_key(view, stage, graph)
        for stage, graph in engine_cache.graphs(view)
        if view.stages[stage].precision == "int8"
    }
    found = [
        item.record
        for item in engine_cache.survey(bundle, Manifest.load(bundle))
        if item.record is not None
        and item.state != "broken"
        and item.record.content not in int8
        and item.record.settings == task.settings
        and item.record.fingerprint == task.fingerprint
        and (item.record.stage, item.record.sequence) == (task.stage, task.graph.sequence)
    ]
    return max(found, key=lambda record: record.built_at, default=None)


def _check_tensors(task: EngineTask, record: EngineRecord) -> None:
    """The parsed network must have the manifest's inputs and outputs; nothing else would fit the chain's buffers."""
    for kind, expected, got in (
        ("inputs", task.graph.inputs, record.inputs),
        ("outputs", task.graph.outputs, record.outputs),
    ):
        wanted = {tensor.name: (tensor.shape, tensor.dtype) for tensor in expected}
        found = {tensor.name: (tensor.shape, tensor.dtype) for tensor in got}
        if wanted != found:
            raise EngineBuildError(
                f"TensorRT read other {kind} from the graph of {task.label}",
                got=found,
                expected=wanted,
                hint="this is a bug in jetvla or its ONNX parser; please report it with TensorRT's version.",
            )


def _check_space(bundle: Path, manifest: Manifest, missing: list[EngineTask]) -> None:
    needed = sum(manifest.stages[task.stage].weight_bytes + (32 << 20) for task in missing)
    free = shutil.disk_usage(bundle).free
    if free < needed:
        raise StorageError(
            f"not enough room for the engines of {bundle}",
            got=f"{human_bytes(free)} free",
            expected=f"about {human_bytes(needed)}",
            hint="export/engines.py prune BUNDLE removes engines that are of no use; --bucket builds for fewer lengths.",
        )


def _prove(bundle: Path, manifest: Manifest, machines: Machines, fingerprint: str, reporter: Reporter) -> None:
    """Stream the recorded reference through the engines.

    Raises:
        ParityError: they do not match; their records are removed, so that nothing loads them.
    """
    if RECORDING_NAME not in manifest.files:
        reporter.warn("the bundle has no recorded reference: the golden step alone proves its engines, at every start.")
        return
    recording = Recording.load(bundle)
    report_path = engine_cache.parity_file(bundle, manifest, fingerprint)
    report_path.unlink(missing_ok=True)
    frames = sum(len(episode.frames) for episode in recording.episodes)
    with reporter.count_bar(f"engines: {fingerprint}", frames) as advance:
        flavour = machines.tensorrt.name if machines.tensorrt else None
        policy = Policy(bundle, manifest, TrtBackend(flavour, fingerprint=fingerprint))
        try:
            buckets = policy.buckets
            if set(buckets) != set(manifest.prompt.buckets):
                reporter.warn(f"verified at the lengths that have an engine: {', '.join(map(str, buckets))}")
                recording = _fitting(policy, recording)
            if not recording.episodes:
                reporter.warn(
                    "no recorded prompt fits them: the golden step alone proves these engines, at every start."
                )
                return
            report = parity.compare(policy, recording.episodes, recording.steps, advance)
        finally:
            policy.close()
    reporter.result(
        f"{report.verdict}: {fingerprint}, {report.frames} frames, feature cosine {report.feature_cosine:.7f}, "
        f"action error {report.action_max_error:.1e}"
    )
    for reason in report.reasons:
        reporter.warn(reason)
    if report.verdict == "FAIL":
        while records := _refuted(bundle, manifest, fingerprint):  # older ones must not step in unproved
            for record in records:
                (bundle / record.file).with_suffix(".json").unlink(missing_ok=True)
        raise ParityError(
            "the TensorRT engines do not do what the checkpoint does",
            got="; ".join(report.reasons),
            expected="PASS for int8" if manifest.precision == "int8" else f"at least WARN for {manifest.precision}",
            hint="the engines will not be loaded; the bundle still runs with --backend ort. "
            "Try --optimization-level 2, or a bundle of --precision fp32, and report it with TensorRT's version.",
        )
    write_bytes(report_path, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def _refuted(bundle: Path, manifest: Manifest, fingerprint: str) -> list[EngineRecord]:
    """Engines that a failed proof speaks against: all that took part, but for those that were proved in the other precision."""
    records = engine_cache.newest(bundle, manifest, fingerprint)
    other = ENGINE_PARITY if manifest.precision == "int8" else ENGINE_PARITY_INT8
    proved = (engine_cache.fingerprint_folder(bundle, fingerprint) / other).exists()
    return [record for (stage, _), record in records.items() if not (proved and _is_shared(manifest, stage))]


def _forget_proofs(bundle: Path, manifest: Manifest, missing: list[EngineTask]) -> None:
    """Engines that are about to be built anew were never proved: killed before they are, they must not look as if they had been."""
    for task in missing:
        folder = engine_cache.fingerprint_folder(bundle, task.fingerprint)
        engine_cache.parity_file(bundle, manifest, task.fingerprint).unlink(missing_ok=True)
        for name in (ENGINE_PARITY, ENGINE_PARITY_INT8) if _is_shared(manifest, task.stage) else ():
            (folder / name).unlink(missing_ok=True)


def _is_shared(manifest: Manifest, stage: str) -> bool:
    """The stage's engines serve the INT8 policy and the floating-point one."""
    return manifest.quantized is not None and stage not in manifest.quantized.stages


def _fitting(policy: Policy, recording: Recording) -> Recording:
    """The episodes whose prompt is not too long for the engines that there are."""
    runs = []
    for episode, steps in zip(recording.episodes, recording.steps, strict=True):
        with suppress(PromptError):
            policy.reset(token_ids=episode.token_ids, attention_mask=episode.mask)
            runs.append((episode, steps))
    return Recording.of([episode for episode, _ in runs], [steps for _, steps in runs])


def _remove_useless(bundle: Path, manifest: Manifest, tasks: list[EngineTask], reporter: Reporter) -> None:
    """Engines of these machines that nothing will run: of graphs that the bundle no longer has, or of other settings than asked for.

    The runtime takes the newest engine of a place, so one of other settings would run in its stead. Other machines' engines are theirs.
    """
    # By content: an engine of the other precision has the same place, and is not superseded by one of this.
    wanted = {(task.fingerprint, task.content): task.key for task in tasks}
    fingerprints = {task.fingerprint for task in tasks}
    freed = 0
    for found in engine_cache.survey(bundle, manifest):
        if found.path.parent.name not in fingerprints:
            continue
        record = found.record
        place = None if record is None else (record.fingerprint, record.content)
        superseded = record is not None and place in wanted and wanted[place] != record.key
        if found.state != "current" or superseded:
            freed += engine_cache.remove(found)
    if freed:
        reporter.result(f"removed engines that nothing would run: {human_bytes(freed)}")


def _name(task: EngineTask) -> str:
    return f"{task.fingerprint}/{task.label}"


def engines_exist(bundle: Path) -> bool:
    """True if anything lies under engines/."""
    try:
        return bool(engine_cache.survey(bundle, Manifest.load(bundle)))
    except BundleError:
        return False
