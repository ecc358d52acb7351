"""The verification step of a build: record the reference, stream the engines, judge, show.

Binds export/parity.py (what is compared and how it is judged) to a build's files, frames and messages.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table

from bundle.errors import ParityError
from bundle.manifest import Manifest
from bundle.recording import Episode, Recording, ReferenceStep
from export import fp16_range, parity
from export.config import BuildConfig
from export.console import Reporter, plain_table
from export.fp16_range import LIMIT
from export.plan import Plan
from export.reference import record_reference as record
from export.weight_file import FP16_MAX
from runtime.backends.select import open_backend
from runtime.golden import Golden
from runtime.policy import Policy
from runtime.replay import read_resized
from train.checkpoint import LoadedPolicy

PARITY_REPORT = "reports/parity.json"
# Frames for buckets beyond the first two prompts: they share all weights, only the length of the row is new.
_GLANCE = 2
# Operations that a message names.
_NAMED = 4


def verification_episodes(config: BuildConfig, plan: Plan) -> list[Episode]:
    """Two episodes of more than a window each with a reset between them, and a glance at every other bucket."""
    window = plan.dims.window
    others = len(plan.prompts) - 2
    counts = (config.verify_frames or window + 4, config.verify_frames or window + 2, *[_GLANCE] * others)
    if config.verify_episode is not None:
        recorded = read_resized(
            config.verify_episode, plan.manifest.preprocessing, plan.dims.image_size, limit=max(counts)
        ).frames
        frames = [np.resize(recorded, (count, *recorded.shape[1:])) for count in counts]  # repeats a short episode
    else:
        size, cameras = plan.dims.image_size, plan.dims.cameras
        frames = [parity.random_frames(count, cameras, size, seed=seed) for seed, count in enumerate(counts)]
    pad = plan.manifest.prompt.pad_id
    return [
        Episode(pictures, ids, tuple(int(token != pad) for token in ids))
        for pictures, ids in zip(frames, plan.prompts, strict=True)
    ]


def record_reference(
    staging: Path, loaded: LoadedPolicy, plan: Plan, episodes: Sequence[Episode], reporter: Reporter
) -> list[list[ReferenceStep]]:
    """Run the reference; keep all of it in the bundle, and its first step as the golden step."""
    preprocessing = plan.manifest.preprocessing
    frames = sum(len(episode.frames) for episode in episodes)
    with reporter.count_bar("reference: torch fp32, adapters unmerged", frames) as advance:
        reference = record(loaded.policy, episodes, mean=preprocessing.mean, std=preprocessing.std, advance=advance)
    Recording.of(episodes, reference).save(staging)
    first = reference[0][0]
    Golden(episodes[0].frames[0], np.array(episodes[0].token_ids), first.feature, first.action).save(staging)
    return reference


def compare(
    staging: Path,
    config: BuildConfig,
    manifest: Manifest,
    episodes: Sequence[Episode],
    reference: Sequence[Sequence[ReferenceStep]],
    reporter: Reporter,
) -> parity.ParityReport:
    """Stream the episodes through the runtime."""
    with reporter.count_bar(f"engines: {config.backend}", sum(len(episode.frames) for episode in episodes)) as advance:
        policy = Policy(staging, manifest, open_backend(config.backend))
        return parity.compare(policy, episodes, reference, advance)


def measure_range(
    staging: Path, manifest: Manifest, stage: str, recording: Recording, reporter: Reporter
) -> fp16_range.StageRange:
    """How large the fp16 values of a stage get; says what must become fp32."""
    frames = sum(len(fp16_range.frames_of(episode)) for episode in recording.episodes)
    with reporter.count_bar(f"fp16 range: {stage}", frames) as advance:
        found = fp16_range.measure(staging, manifest, stage, recording, advance)
    if found.beyond:
        worst, *others = sorted(found.beyond, key=lambda name: -found.half[name])
        more = f" and {len(others)} more around it" if others else ""
        reporter.result(
            f"{stage}: {worst} reaches {found.half[worst]:.3g}, more than {LIMIT:.0f}, half of fp16's range; "
            f"this operation{more} must be computed in fp32"
        )
    return found


def accept(staging: Path, config: BuildConfig, report: parity.ParityReport, reporter: Reporter) -> None:
    """Show the verdict; a FAIL ends the build.

    Raises:
        ParityError: the verdict is FAIL.
    """
    reporter.table(_parity_table(report))
    for reason in report.reasons:
        reporter.warn(reason)
    reporter.result(
        f"{report.verdict}: {report.frames} frames, feature cosine {report.feature_cosine:.7f}, "
        f"action error {report.action_max_error:.1e}"
    )
    for stage, found in report.fp16.items():
        _show_range(stage, found, reporter)
    if report.verdict == "FAIL":
        (staging / PARITY_REPORT).write_bytes(pretty_json(report))
        raise ParityError(
            "the engines do not do what the checkpoint does",
            got="; ".join(report.reasons),
            expected=f"at least WARN for {config.graph_precision}",
            hint=f"no bundle was written; {config.target}.failed/parity.json says which stage differs."
            + (
                " Try --precision fp32."
                if config.graph_precision != "fp32"
                else " This is a bug in jetvla or its libraries."
            ),
        )


def release(loaded: LoadedPolicy) -> None:
    """Drop the checkpoint's mappings before the backend loads: both together would be the peak of the build."""
    loaded.policy.to_empty(device="meta")
    loaded.state.clear()
    loaded.raw.state.clear()
    gc.collect()


def _show_range(stage: str, found: parity.Fp16Range, reporter: Reporter) -> None:
    reporter.result(f"{stage}: largest fp16 value {found.largest:.3g} of {FP16_MAX:.0f} ({found.operation})")
    if found.widened:
        names = [f"{name} ({peak:.3g})" for name, peak in sorted(found.widened.items(), key=lambda item: -item[1])]
        more = f", ... {len(names)} operations in all" if len(names) > _NAMED else ""
        reporter.result(
            f"{stage}: in fp32, since it makes, reads or holds what fp16 cannot: {', '.join(names[:_NAMED])}{more}"
        )


def _parity_table(report: parity.ParityReport) -> Table:
    table = plain_table("", "cosine", "max error")
    for name, stage in report.stages.items():
        table.add_row(f"{name} alone", f"{stage.cosine:.7f}", f"{stage.max_error:.1e}")
    table.add_row("feature, streamed", f"{report.feature_cosine:.7f}", f"{report.feature_max_error:.1e}")
    for column in report.columns:
        table.add_row(f"{column.name} ({column.unit})", "", f"{column.max_error:.1e}")
    return table


def pretty_json(value: msgspec.Struct) -> bytes:
    """Indented JSON of a report."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
