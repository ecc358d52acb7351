"""A build, step by step: read, plan, export, verify, publish.

Only one tensor of one stage is in memory at a time, and the reference is released before the backend loads, so a full-size build fits a
small machine. An fp16 build computes operations in fp32 whose values leave fp16's range (see export/fp16_range.py), and promotes
stages to fp32 where that costs nothing if the actions are off (see export/plan.py). It says so.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import numpy as np

from bundle import engine_cache
from bundle.atomic import disk_errors, link_or_copy, staged_directory
from bundle.errors import BundleError, CheckpointError, ParityError
from bundle.hashing import content_bytes, content_files, sha256_file
from bundle.held_files import unchanged
from bundle.manifest import File, FloatPrecision, Manifest, Stage
from bundle.prompt_template import takes_words
from bundle.recording import Recording
from bundle.strangers import keep_strangers
from export import verification
from export.action_spec import action_spec
from export.config import BUILD_REPORT, BuildConfig, BuildReport, Input, library_versions, request_sha256
from export.console import Reporter, human_bytes
from export.conventions import infer_conventions, provisional_packing
from export.fp16_range import StageRange
from export.plan import EMBEDDING_WEIGHT, Plan, check_space, make_plan, merged_weights, plan_table, stage_files
from export.to_onnx import export_stage
from export.verification import PARITY_REPORT, pretty_json
from export.weights import STAGES, stage_bytes
from runtime.instruction import EMBEDDING_NAME
from runtime.tokenizer import TOKENIZER_NAME
from train.action_classes import classes_of_action
from train.checkpoint import LoadedPolicy, load
from train.keys import loss_modules

_LOG_NAME = "reports/build.log"


def dry_run(config: BuildConfig, reporter: Reporter) -> None:
    """Read the checkpoint, print what a build would do, write nothing."""
    with _unchanged_inputs(config):
        _read_and_plan(config, reporter)
    reporter.result("dry run: nothing was written.")


def run(config: BuildConfig, reporter: Reporter) -> None:
    """Build into config.target; see export.pipeline.build. The caller holds the target's lock."""
    with _unchanged_inputs(config):
        _run(config, reporter)


def _unchanged_inputs(config: BuildConfig) -> AbstractContextManager[None]:
    """Weights are mapped until the end of a build."""
    return unchanged(
        content_files(config.checkpoint),
        error=CheckpointError,
        hint="build again when nobody writes to it; nothing was published.",
    )


def _run(config: BuildConfig, reporter: Reporter) -> None:
    target = config.target
    # As it is before it is read: training may replace the file meanwhile.
    checkpoint = tuple(map(Input.of, content_files(config.checkpoint)))
    loaded, plan = _read_and_plan(config, reporter)
    check_space(target, plan)
    inputs = (*checkpoint, *_other_inputs(config, loaded))
    with staged_directory(target) as staging:
        try:
            (staging / "reports").mkdir()
            precisions = plan.precisions()
            with reporter.step("Export"):
                stages, files = _export(staging, config, loaded, plan, precisions, reporter)
                _write_embedding(staging, loaded)
                if plan.tokenizer is not None:
                    shutil.copyfile(plan.tokenizer, staging / TOKENIZER_NAME)
            with reporter.step("Verify"):
                episodes = verification.verification_episodes(config, plan)
                reference = verification.record_reference(staging, loaded, plan, episodes, reporter)
                recording = Recording.of(episodes, reference)
                ranges = {
                    stage: _hold_range(staging, config, loaded, plan, stage, stages, files, recording, reporter)
                    for stage, precision in precisions.items()
                    if precision == "fp16"
                }
                while True:
                    manifest = msgspec.structs.replace(plan.manifest, stages=stages)
                    promoted = plan.promotable(precisions) if config.promote else None
                    if promoted is None:
                        verification.release(loaded)
                    report = verification.compare(staging, config, manifest, episodes, reference, reporter)
                    if report.comfortable or promoted is None:
                        break
                    precisions[promoted] = "fp32"
                    reporter.result(
                        f"{report.verdict} with {promoted} in fp16 (action error {report.action_max_error:.1e}); "
                        f"fp32 costs only {human_bytes(plan.sizes[promoted] // 2)}, so it is promoted"
                    )
                    del ranges[promoted]
                    _remove_stage(staging, stages[promoted])
                    again, written = _export(staging, config, loaded, plan, {promoted: "fp32"}, reporter)
                    stages, files = stages | again, files | written
                report = msgspec.structs.replace(
                    report, fp16={stage: found.summary() for stage, found in ranges.items()}
                )
                verification.accept(staging, config, report, reporter)
            with reporter.step("Publish"):
                if _has_int8(target):
                    reporter.result(
                        "the bundle's INT8 variant is not carried over: it was made of the old stages; calib/quantize.py makes it anew"
                    )
                (staging / PARITY_REPORT).write_bytes(pretty_json(report))
                (staging / _LOG_NAME).write_text(reporter.log, encoding="utf-8")
                kept_stages = {name: entry for name, entry in stages.items() if entry in plan.reusable.values()}
                build_report = BuildReport(
                    request=request_sha256(config),
                    inputs=inputs,
                    reused_stages=tuple(stage for stage in STAGES if stage in kept_stages),
                    seconds=reporter.seconds,
                    peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                    versions=library_versions(),
                )
                (staging / BUILD_REPORT).write_bytes(pretty_json(build_report))
                known = {name: plan.known_files[name] for entry in kept_stages.values() for name in stage_files(entry)}
                files = _record_files(staging, known | files)
                manifest = msgspec.structs.replace(manifest, files=files, parity=report.summary())
                manifest.save(staging)
                Manifest.load(staging).verify_sizes(staging)
                keep_strangers(target, staging)
                kept = engine_cache.carry_over(target, staging, manifest)
                if kept:
                    reporter.result(f"{kept} engines kept")
                size = sum(record.bytes for record in files.values())
                reporter.result(f"{target}  {human_bytes(size)}  {report.verdict}")
        except ParityError as error:
            _keep_failure(target, staging, reporter, error)
            raise
    shutil.rmtree(_failure_folder(target), ignore_errors=True)  # of an earlier build; it would contradict this one


def _read_and_plan(config: BuildConfig, reporter: Reporter) -> tuple[LoadedPolicy, Plan]:
    with reporter.step("Read checkpoint"):
        loaded = load(
            config.checkpoint,
            base=config.base,
            config=config.config,
            packing=provisional_packing(config),
            x_attn_causal=config.x_attn_causal,
            prompt_template=config.prompt_template,
            pad_prompt_to=config.pad_prompt_to,
            announce=reporter.result,
        )
        if config.infer_from is not None:
            infer_conventions(config, loaded, reporter)
        _report_base(loaded, reporter)
        _report_left_out(loaded, reporter)
        conventions = loaded.policy.conventions
        parameters = sum(tensor.numel() for name, tensor in loaded.state.items() if ".lora_" not in name)
        reporter.result(
            f"{loaded.raw.kind} {human_bytes(content_bytes(config.checkpoint))}, {parameters / 1e6:.1f} M parameters, "
            f"{len(loaded.adapted)} LoRA modules, head {loaded.policy.spec.head.kind}"
        )
        reporter.result(f"packing {conventions.packing} ({conventions.packing_source})")
        causal = f"x_attn_causal {conventions.x_attn_causal} ({conventions.x_attn_causal_source})"
        if loaded.policy.spec.fork and conventions.x_attn_causal_source.startswith("assumed"):
            reporter.warn(
                causal
                + "; the fork's Dockerfile installs 4.52.3, which is causal: state --x-attn-causal if you trained in it."
            )
        else:
            reporter.result(causal)
        _report_meaning(config, loaded, reporter)
        _warn_untrained(loaded, reporter)
        _warn_doubtful(loaded, reporter)
    with reporter.step("Plan"):
        state = merged_weights(loaded).state
        weights = sum(stage_bytes(state, part) for part in (*STAGES, "embedding"))
        total = weights + content_bytes(config.checkpoint)
        with reporter.bytes_bar("hashing", total) as advance:
            plan = make_plan(config, loaded, advance)
        reporter.result(f"sequence buckets {', '.join(map(str, plan.manifest.prompt.buckets))}")
        reporter.table(plan_table(plan, loaded))
    return loaded, plan


def _report_base(loaded: LoadedPolicy, reporter: Reporter) -> None:
    """Say what the base directory gave; a checkpoint with a part of the backbone may be a damaged one."""
    if loaded.folded:
        reporter.result(f"adapters of {len(loaded.folded)} modules were merged on reading, as peft merges them")
    if loaded.remark is not None:
        reporter.warn(loaded.remark)
    if not loaded.from_base:
        return
    folder = loaded.base.folder if loaded.base.folder is None else loaded.base.folder.resolve()
    origin = f"{len(loaded.from_base)} tensors taken from {folder}"
    own = {name for name in loaded.state if name.startswith("backbone.") and ".lora_" not in name}
    if own <= set(loaded.from_base) or (loaded.raw.kind == "jetvla" and "base_sha256" in loaded.raw.recorded):
        reporter.result(f"base weights: {origin}")
    else:
        reporter.warn(f"the checkpoint holds a part of the backbone only; {origin}: {loaded.from_base[0]}, ...")


def _report_left_out(loaded: LoadedPolicy, reporter: Reporter) -> None:
    """Say which modules of the checkpoint are not in the bundle; tables and buffers stand in the manifest alone."""
    for module, count in loss_modules(loaded.ignored).items():
        reporter.result(f"{module} ({count} tensors) is left out: losses alone are computed with it")
    if loaded.idle:
        reporter.warn(
            f"vision_resampler ({len(loaded.idle)} tensors) is left out: under packing fork_overwrite the image tokens are Kosmos-2's own, "
            "and use_vision_resampler has no effect"
        )


def _report_meaning(config: BuildConfig, loaded: LoadedPolicy, reporter: Reporter) -> None:
    """Say what nobody can see in the weights: the text around an instruction, and what classes stand for."""
    spec = loaded.policy.spec
    padded = f" padded to {spec.pad_to} tokens" if spec.pad_to is not None else ""
    reporter.result(f"prompt {spec.prompt_template!r}{padded} ({spec.prompt_source})")
    if not takes_words(spec.prompt_template):
        reporter.warn("the prompt has no {instruction} in it: whatever the robot is told, the policy does the same.")
    if spec.head.kind == "classes":
        action = action_spec(spec, config, loaded.facts)
        reporter.result(f"classes {' '.join(classes_of_action(action).spelled())} ({action.classes_source})")


def _warn_untrained(loaded: LoadedPolicy, reporter: Reporter) -> None:
    ups = [tensor for name, tensor in loaded.state.items() if name.endswith(".lora_B.weight")]
    if ups and not any(bool(up.any()) for up in ups):
        reporter.warn("every LoRA-B is zero: this adapter was never trained, and does nothing.")
    if not bool(loaded.state["action_token"].any()):
        reporter.warn("the action token is zero: this policy was never trained.")


def _warn_doubtful(loaded: LoadedPolicy, reporter: Reporter) -> None:
    """Policies that load without an error and may still not be what they look like."""
    spec = loaded.policy.spec
    few = spec.head.kind == "actions_gripper" and spec.head.outputs < 7
    if few and loaded.policy.conventions.packing_source.startswith("inferred:"):
        reporter.warn(
            f"{spec.head.outputs - 1} arm columns: unmodified upstream cannot train that, early runs of the 2-DoF fork did. "
            "If this is one, its packing must be stated: --packing, or --infer-from EPISODE."
        )
    if spec.head.kind == "actions_gripper" and spec.normalized and spec.maximum <= 0.5:
        reporter.warn(
            f"norm_max {spec.maximum} also scales the gripper, as upstream's evaluation does: its command is -1 always."
        )


def _other_inputs(config: BuildConfig, loaded: LoadedPolicy) -> tuple[Input, ...]:
    """Files beside the checkpoint whose change makes the bundle out of date, also those whose appearance does."""
    paths = [config.tokenizer, config.infer_from, config.verify_episode, *loaded.config_files, *loaded.base.searched]
    if loaded.base.folder is not None:
        paths += [loaded.base.folder / "config.json", loaded.base.folder / TOKENIZER_NAME]
        paths += sorted(loaded.base.folder.glob("model*.safetensors")) if loaded.from_base else []
    return tuple(Input.of(path) for path in paths if path is not None)


def _export(
    staging: Path,
    config: BuildConfig,
    loaded: LoadedPolicy,
    plan: Plan,
    precisions: Mapping[str, FloatPrecision],
    reporter: Reporter,
    wide: Collection[str] = (),
) -> tuple[dict[str, Stage], dict[str, File]]:
    """Write or link these stages, the operations `wide` in fp32.

    Returns:
        Manifest entries, and the records of the weight files just written.
    """
    weights = merged_weights(loaded)
    stages: dict[str, Stage] = {}
    files: dict[str, File] = {}
    for stage, precision in precisions.items():
        cached = None if wide else plan.reusable.get((stage, precision))
        if cached is not None:
            entry = cached
            for name in stage_files(entry):
                link_or_copy(config.target / name, staging / name)
        else:
            with reporter.bytes_bar(stage, plan.size(stage, precision)) as advance:
                entry, written = export_stage(
                    stage,
                    staging,
                    weights,
                    plan.dims,
                    precision=precision,
                    buckets=plan.manifest.prompt.buckets,
                    key=plan.key(stage, precision, wide),
                    wide=wide,
                    progress=advance,
                )
            files |= written
        stages[stage] = entry
        done = "reused" if cached is not None else "written"
        nodes = " and ".join(str(graph.nodes) for graph in entry.graphs)
        reporter.result(f"{stage}: {precision}, {done}, {human_bytes(entry.weight_bytes)}, {nodes} nodes")
    return stages, files


def _hold_range(
    staging: Path,
    config: BuildConfig,
    loaded: LoadedPolicy,
    plan: Plan,
    stage: str,
    stages: dict[str, Stage],
    files: dict[str, File],
    recording: Recording,
    reporter: Reporter,
) -> StageRange:
    """Measure an fp16 stage, and write it anew with what leaves fp16's range in fp32 until nothing does; updates `stages` and `files`.

    Ends because the operations of a graph do: each round keeps more of them in fp32.
    """
    wide: frozenset[str] = frozenset()
    while True:
        manifest = msgspec.structs.replace(plan.manifest, stages=stages)
        found = verification.measure_range(staging, manifest, stage, recording, reporter)
        if not found.beyond:
            return found
        wide |= found.beyond
        _remove_stage(staging, stages[stage])
        again, written = _export(staging, config, loaded, plan, {stage: "fp16"}, reporter, wide)
        stages |= again
        files |= written


def _remove_stage(staging: Path, entry: Stage) -> None:
    for name in stage_files(entry):
        (staging / name).unlink()


def _write_embedding(staging: Path, loaded: LoadedPolicy) -> None:
    """token_embedding.npy float32 [vocab + 1, D]; the last row is the action token.

    fp32 in every bundle: it stays on disk (a prompt maps a few rows of it), and its rounding would be the same at every step.
    """
    table = loaded.state[EMBEDDING_WEIGHT]
    shape = (table.shape[0] + 1, table.shape[1])
    # Written, not memory-mapped: on a full disk a mapped page is a SIGBUS instead of an error.
    with (staging / EMBEDDING_NAME).open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, table.shape[0], 4096):
            file.write(table[start : start + 4096].contiguous().numpy().data)
        file.write(loaded.state["action_token"].contiguous().numpy().data)


def _has_int8(target: Path) -> bool:
    try:
        return Manifest.load(target).quantized is not None
    except BundleError:
        return False


def _record_files(staging: Path, known: dict[str, File]) -> dict[str, File]:
    """Integrity records of everything in the bundle; weight files just written were hashed on the way."""
    files = {}
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(staging))
            files[name] = known.get(name) or File(sha256=sha256_file(path), bytes=path.stat().st_size)
    return files


def _failure_folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.failed")


def _keep_failure(target: Path, staging: Path, reporter: Reporter, error: ParityError) -> None:
    """Leave report and log of a failed verification beside the target."""
    folder = _failure_folder(target)
    with disk_errors(folder):
        if folder.is_file():
            folder.unlink()
        folder.mkdir(exist_ok=True)
        shutil.copyfile(staging / PARITY_REPORT, folder / "parity.json")
        (folder / "build.log").write_text(f"{reporter.log}\n{error}\n", encoding="utf-8")
