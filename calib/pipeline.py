"""The public door of quantization: `quantize(QuantizeConfig(...))` adds an INT8 variant to a bundle.

Sample, calibrate, integers, search, accept, publish. The bundle is replaced in one step at the end, with hard links for everything that
stays, so it is the old one or the new one at any moment. What was finished before an interruption is taken up again
(calib/workspace.py).
"""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from bundle.atomic import exclusive, recover, refuse_foreign
from bundle.errors import BundleError, CalibrationError, ConfigError, PromptError
from bundle.hashing import sha256_file
from bundle.manifest import MANIFEST_NAME, Manifest, Quantized
from calib.assignments import searchable
from calib.calibrate import How, StageCalibration, calibrate_stage, runs
from calib.config import QuantizeConfig
from calib.data import Data, frame_finder, held_sha256, read_data, strata
from calib.int8_weights import Ranges, write_integers
from calib.own_error import own_error
from calib.publish import PAGE, REPORT, Result, publish, read_request
from calib.quantization_page import check_page
from calib.rewrite import Integers
from calib.selection import Selection, usable_backends
from calib.stage_graph import STAGES, StageGraph, blocks_of, read_stage
from calib.workspace import Workspace, remove_workspaces, request_sha256
from export.console import Reporter
from runtime.backends.ort_plugins import PLUGINS, plugin_installed
from runtime.instruction import load_embedding, prompt_tensors
from runtime.processor import processor_name
from runtime.prompt import PromptTensors

__all__ = ["STEPS", "QuantizeConfig", "quantize"]

STEPS = 6
Floats = NDArray[np.float32]
# Instructions that are written out in a warning.
_NAMED = 4
# Held-out episodes of which one says little about others.
_FEW_EPISODES = 3
# A bundle that was built for an instruction wastes fewer: its lengths are multiples of 8.
_WASTED_SLOTS = 8
_ROOT = Path(__file__).resolve().parent.parent


def quantize(config: QuantizeConfig, reporter: Reporter | None = None) -> Path:
    """Add an INT8 variant to a bundle, or find that it has the one that was asked for; returns its directory.

    Raises:
        BundleError: the bundle is damaged, or of another schema version.
        EpisodeError: the recordings are another robot's, too few, damaged, or show nothing.
        PromptError: the bundle cannot take an instruction of theirs.
        CalibrationError: no INT8 variant stays within the budget (the message says what the best is), or the judgement on test frames
            failed. The bundle is as it was; what was found out is kept for another try.
        ConfigError, BackendError, StorageError: as their names say.
    """
    reporter = reporter or Reporter(STEPS, quiet=True)
    check_page()
    bundle = config.bundle.parent if config.bundle.name == MANIFEST_NAME else config.bundle
    with exclusive(bundle):
        recover(bundle)
        try:
            return _quantize(bundle, config, reporter)
        except CalibrationError as error:
            raise _with_what_stays(error, Manifest.load(bundle).quantized) from None


def _with_what_stays(error: CalibrationError, quantized: Quantized | None) -> CalibrationError:
    """Say so if a variant of an earlier run, perhaps with a looser budget, goes on driving."""
    if quantized is None:
        return error
    stays = f"The bundle keeps the INT8 variant that it has, of budget {quantized.budget:g}; --precision float does without it."
    return CalibrationError(error.what, got=error.got, expected=error.expected, hint=f"{error.hint} {stays}")


def _quantize(bundle: Path, config: QuantizeConfig, reporter: Reporter) -> Path:
    manifest = Manifest.load(bundle)
    refuse_foreign(bundle)
    with reporter.step("Sample"):
        data = read_data(config, manifest, reporter)
        notes = _length_notes(manifest, data, bundle)
        for note in notes:
            reporter.warn(note)
        graphs = _read_graphs(bundle, manifest, config.layers_per_block)
        blocks = [block for stage in STAGES for block in blocks_of(graphs, stage)]
        chosen_from = searchable(blocks, config.keep_float)
        backends, left_out = usable_backends(config)
        for line in left_out:
            reporter.result(line)
        reporter.result(
            f"to be INT8, if within {config.max_action_error:g}: {', '.join(chosen_from)}; on {', '.join(backends)}"
        )
    if data.sample is None and manifest.quantized is not None and not manifest.quantized.random and not config.force:
        raise ConfigError(
            "made-up pictures would replace an INT8 variant that was judged on recordings",
            got=f"--allow-random, and a variant calibrated on {manifest.quantized.calibration_frames} recorded frames",
            expected="recordings, or a bundle without such a variant",
            hint="--force replaces it all the same; a copy of the bundle keeps it.",
        )
    if config.dry_run:
        reporter.result("dry run: nothing was written.")
        return bundle
    how = How(config.ranges, config.smoothing, config.layers_per_block, config.threads)
    request = request_sha256(
        _float_sha256(manifest), data.sha256, held_sha256(data), msgspec.to_builtins(how), _code_sha256(), _here()
    )
    # A backend that was installed since has not been measured.
    wanted = request_sha256(request, config.max_action_error, sorted(config.keep_float), backends)
    if not config.force and _is_there(bundle, manifest, data.sha256, wanted):
        remove_workspaces(bundle)  # of a run that was killed when all was done
        reporter.result("the bundle has this variant already; --force makes it again.")
        return bundle
    # An INT8 variant that is there plays no part, and may be damaged: this makes another.
    manifest = _floating(manifest)
    with reporter.count_bar("checking the bundle's files", 1) as advance:
        manifest.verify(bundle)
        advance()
    workspace = Workspace(bundle, manifest, request)
    if workspace.resumed:
        reporter.result("taking up what an earlier run finished")
    with reporter.step("Calibrate"):
        found = _calibrate(workspace, manifest, data, how, reporter)
    with reporter.step("Integers"):
        graphs = _read_graphs(workspace.folder, manifest, config.layers_per_block)
        integers = _integers(workspace, graphs, found, reporter)
    run = Selection(config, manifest, data, workspace, graphs, integers, backends, reporter)
    with reporter.step("Search"):
        references = run.references()
        trials = run.fastest_backend()
        outcome = run.search(trials, references)
    with reporter.step("Accept"):
        chosen, acceptances, tries = run.accept(trials, outcome, references)
        measured = run.measure(chosen, acceptances)
    with reporter.step("Publish"):
        result = Result(
            calibration_sha256=data.sha256,
            calibration_frames=len(data.seen),
            random=data.sample is None,
            request=wanted,
            config=config,
            strata=strata(data.sample),
            notes=(*(data.sample.notes if data.sample else ()), *notes),
            blocks=trials.blocks,
            chosen=chosen,
            outcome=outcome,
            tries=tries,
            calibrations=found,
            acceptances=acceptances,
            measured=measured,
            own=own_error(data.test, references, manifest.action) if data.sample is not None else (),
            machine=processor_name() or platform.machine(),
            seconds=dict(reporter.seconds),
        )
        publish(bundle, manifest, workspace, graphs, integers, result, frame_finder(data), reporter)
    workspace.remove()
    return bundle


def _calibrate(
    workspace: Workspace, manifest: Manifest, data: Data, how: How, reporter: Reporter
) -> dict[str, StageCalibration]:
    found: dict[str, StageCalibration] = {}
    before: Floats | None = None
    with reporter.count_bar("frames through all stages", len(STAGES) * runs(len(data.seen))) as advance:
        for stage in STAGES:
            known = workspace.load_calibration(stage)
            if known is None:
                known = calibrate_stage(stage, workspace.folder, manifest, data.seen, before, how, advance)
                workspace.save_calibration(stage, known)
            found[stage] = known
            before = known.outputs
    folded = sum(len(each.smoothing) for each in found.values())
    reporter.result(
        f"{sum(len(each.scales) for each in found.values())} products observed, {folded} LayerNorms smoothed"
    )
    return found


def _read_graphs(folder: Path, manifest: Manifest, layers_per_block: int) -> dict[tuple[str, int | None], StageGraph]:
    return {
        (stage, graph.sequence): read_stage(
            folder, manifest, stage, sequence=graph.sequence, layers_per_block=layers_per_block
        )
        for stage in STAGES
        for graph in manifest.stages[stage].graphs
    }


def _integers(
    workspace: Workspace,
    graphs: Mapping[tuple[str, int | None], StageGraph],
    found: Mapping[str, StageCalibration],
    reporter: Reporter,
) -> dict[str, Integers]:
    made = {}
    firsts = {stage: next(graph for (name, _), graph in graphs.items() if name == stage) for stage in STAGES}
    total = sum(site.shape[0] * site.shape[1] for graph in firsts.values() for site in graph.sites)
    with reporter.bytes_bar("quantizing weights", total) as advance:
        for stage, graph in firsts.items():
            tensors = workspace.load_integers(stage)
            if tensors is None:
                ranges = Ranges(found[stage].scales, found[stage].smoothing)
                file = write_integers(graph, ranges, workspace.integers(stage), advance)
                workspace.save_integers(stage, file)
                tensors = file.tensors
            graph.unmap()
            made[stage] = Integers(workspace.integers(stage).name, tensors, found[stage].scales)
    reporter.result(f"{total / 1e6:.1f} M weights")
    return made


def _is_there(bundle: Path, manifest: Manifest, calibration: str, request: str) -> bool:
    """The bundle has the variant that is asked for, and its files are intact."""
    quantized = manifest.quantized
    if quantized is None or quantized.calibration_sha256 != calibration or read_request(bundle) != request:
        return False
    try:
        manifest.verify(bundle, without=manifest.files.keys() - (manifest.all_stage_files() - manifest.stage_files()))
    except BundleError:
        return False
    return True


def _floating(manifest: Manifest) -> Manifest:
    """The bundle without its INT8 variant."""
    variant = manifest.all_stage_files() - manifest.stage_files() | {REPORT, PAGE}
    files = {name: record for name, record in manifest.files.items() if name not in variant}
    return msgspec.structs.replace(manifest, quantized=None, files=files)


def _length_notes(manifest: Manifest, data: Data, folder: Path) -> list[str]:
    """Lengths that run the same integers though nobody has looked at them, and instructions that run at more slots than they need.

    Raises:
        PromptError: an instruction is too long for the bundle or cannot be tokenised; it names the recording.
    """
    embedding = load_embedding(folder)
    lengths = manifest.prompt.buckets

    def prompts(told: Mapping[str, str]) -> dict[str, PromptTensors]:
        found = {}
        for instruction, episode in told.items():
            try:
                found[instruction] = prompt_tensors(folder, manifest, embedding, lengths, instruction=instruction)
            except PromptError as error:
                raise PromptError(
                    f"{episode}: {error.what}", got=error.got, expected=error.expected, hint=error.hint
                ) from None
        return found

    seen = prompts({each.instruction: each.episode for each in data.seen})
    searched = prompts({each.stretch.instruction: each.episode for each in data.search})
    judged = prompts({each.stretch.instruction: each.episode for each in data.test})
    notes = []
    unseen, unjudged = (set(lengths) - {prompt.bucket for prompt in part.values()} for part in (seen, judged))
    for verb, unused in (
        ("neither calibrated nor judged", unseen & unjudged),
        ("not calibrated", unseen - unjudged),
        ("not judged", unjudged - unseen),
    ):
        if unused:
            slots = ", ".join(map(str, sorted(unused)))
            notes.append(f"{verb} at {slots} slots: no instruction of those recordings runs at that length")
    episodes = len({each.episode for each in data.test})
    if data.sample is not None and episodes < _FEW_EPISODES:
        notes.append(
            f"judged on {episodes} episode{'' if episodes == 1 else 's'} only: more recordings tell more about other scenes"
        )
    long = {
        each
        for each, prompt in (seen | searched | judged).items()
        if prompt.bucket - int(prompt.action_index[-1]) - 1 >= _WASTED_SLOTS
    }
    if long:
        options = " ".join(f"--instruction {shlex.quote(each)}" for each in sorted(long)[:_NAMED])
        options += f" and {len(long) - _NAMED} more" if len(long) > _NAMED else ""
        notes.append(
            f"recorded instructions run at more slots than they need: a bundle built with {options} takes less time"
        )
    return notes


def _float_sha256(manifest: Manifest) -> str:
    """Identity of the floating-point policy: an INT8 variant that is there must not change it."""
    return request_sha256(
        {name: stage.key for name, stage in manifest.stages.items()},
        msgspec.to_builtins(manifest.prompt),
        manifest.files["token_embedding.npy"].sha256,
    )


def _here() -> list[str]:
    """What errors and milliseconds depend on besides our code: the processor, and the libraries that compute."""
    versions = [
        f"{plugin.package} {importlib.metadata.version(plugin.package)}"
        for name, plugin in PLUGINS.items()
        if plugin_installed(name)
    ]
    return [processor_name() or platform.machine(), onnxruntime.__version__, *versions]


def _code_sha256() -> str:
    """Of everything that computes or measures."""
    paths = [path for folder in ("calib", "runtime") for path in sorted((_ROOT / folder).rglob("*.py"))]
    return request_sha256([sha256_file(path) for path in paths])
