#!/usr/bin/env python3
"""Command line: flight recordings in, HDF5 episodes for training out.

    python episodes/from_recording.py RUN.mcap --dry-run
    python episodes/from_recording.py RUN.mcap --out EPISODES
    python episodes/from_recording.py 'recordings/*.mcap' --out EPISODES --layout v6 --actions decided

Exit codes: 0 ok, 1 failed, 2 usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bundle.atomic import make_folder
from bundle.errors import ConfigError, EpisodeError, FrameError, JetvlaError
from episodes.recording import SUFFIX, choose, split_recording
from episodes.recording_convert import ConversionOptions, Layout, Piece, plan_pieces, write_piece
from episodes.recording_events import RecordedRun, read_run
from episodes.recording_repair import is_finished, repair
from episodes.recording_segments import ActionSource, Segment, cut
from episodes.sources import natural

_MOST_STOP_FRAMES = 100
_PIPE_WIDTH = 150  # the table's, where no terminal tells one


@dataclass(frozen=True)
class ConvertConfig:
    """Convert flight recordings.

    Attributes:
        recordings: RUN.mcap, RUN.mcap#INDEX for one piece of it, folders or globs.
        out: folder for the episodes; made if it does not exist.
        layout: v5 keeps JPEG frames, instruction and times; v6 is raw BGR with the side in the file's name.
        actions: what was published to the robot after safety, or what the policy decided.
        min_frames: leave out pieces with fewer.
        stop_frames: append the last picture so many times with a zero action; only for runs that ended where the robot should stop.
        dry_run: show what would be written.
        force: replace files in --out.
        repair: first finish recordings that a crash left without their end, in place; they are read in any case.
        json: machine-readable result on stdout.
    """

    recordings: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN.mcap ...")]
    out: Path = Path("episodes_from_recordings")
    layout: Layout = "v5"
    actions: ActionSource = "published"
    min_frames: int = 18
    stop_frames: int = 0
    dry_run: bool = False
    force: bool = False
    repair: bool = False
    json: bool = False


def main() -> int:
    """Parse, convert, print."""
    config = tyro.cli(ConvertConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    try:
        return run(config, console)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        console.print("interrupted; the unfinished file was removed.")
        return 1


def run(config: ConvertConfig, console: Console) -> int:
    """Do what the command line says; returns the exit code.

    Raises:
        JetvlaError: the command line is wrong, a recording cannot be read, a file is in the way, or the disk refuses.
    """
    if not config.recordings or config.min_frames < 1 or not 0 <= config.stop_frames <= _MOST_STOP_FRAMES:
        raise ConfigError(
            "no recording, or --min-frames or --stop-frames is out of range",
            expected=f"RUN.mcap, --min-frames 1 or more, --stop-frames 0 to {_MOST_STOP_FRAMES}",
            hint="python episodes/from_recording.py --help explains each option.",
        )
    options = ConversionOptions(config.layout, config.actions, config.min_frames, config.stop_frames)
    named = find_recordings(config.recordings)
    if config.repair and not config.dry_run:
        for path in dict.fromkeys(path for path, _ in named):
            if not is_finished(path) and repair(path):
                console.print(f"repaired {path}", markup=False, soft_wrap=True)
    pieces = plan_pieces(_read(named, console), config.out, options, force=config.force)
    failed = {} if config.dry_run else _write(pieces, config.out, options, console)
    if config.json:
        print(json.dumps([_as_json(piece, failed.get(piece)) for piece in pieces]))
    else:
        show(pieces, failed, dry_run=config.dry_run)
    converted = any(piece.target is not None for piece in pieces)
    return 1 if failed or not converted else 0


def find_recordings(arguments: Sequence[str]) -> list[tuple[Path, int | None]]:
    """Files, each with the index of the piece that is meant (None: all), in natural order.

    Raises:
        EpisodeError: an argument matches nothing.
    """
    found: dict[tuple[Path, int | None], None] = {}
    for argument in arguments:
        path = Path(argument).expanduser()
        matches: list[tuple[Path, int | None]]
        if path.is_dir():
            matches = [(entry, None) for entry in path.iterdir() if entry.suffix.lower() == SUFFIX]
        elif (named := split_recording(path)) is not None and named[0].exists():
            matches = [named]
        elif path.exists():
            matches = [(path, None)]
        else:
            root = Path(path.anchor)
            matches = [(match, None) for match in root.glob(str(path.relative_to(root)))]
        if not matches:
            raise EpisodeError(
                f"no recordings match {argument!r}",
                expected="RUN.mcap, RUN.mcap#INDEX, a folder of recordings, or a glob in quotes",
                hint="recordings lie in the folder that the robot file names under recorder.",
            )
        found |= dict.fromkeys(sorted(matches, key=lambda match: natural(match[0])))
    return list(found)


def show(pieces: Sequence[Piece], failed: dict[Piece, str], *, dry_run: bool) -> None:
    """Print the table."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=_PIPE_WIDTH)
    table = Table(
        "piece", "frames", "s", "fps", "instruction", "episode", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    for piece in pieces:
        outcome = piece.remark if piece.target is None else piece.target.name
        if piece.target is not None and piece.remark:
            outcome += f" ({piece.remark})"
        if piece in failed:
            outcome = f"FAILED: {failed[piece]}"
        table.add_row(
            escape(piece.name),
            str(len(piece.segment.decisions)),
            f"{piece.segment.duration_s:.1f}",
            "" if piece.fps is None else f"{piece.fps:.1f}",
            escape(piece.segment.instruction),
            escape(outcome),
        )
    out.print(table)
    count = sum(piece.target is not None and piece not in failed for piece in pieces)
    left_out = sum(piece.target is None for piece in pieces)
    done = "would be written" if dry_run else "written"
    out.print(f"\n{count} episodes {done}, {left_out} left out, {len(failed)} failed")


def _read(named: Sequence[tuple[Path, int | None]], console: Console) -> list[tuple[RecordedRun, tuple[Segment, ...]]]:
    read = []
    for path, index in named:
        run = read_run(path)
        if run.unfinished:
            torn = f"; its last {run.torn} bytes are torn and left out" if run.torn else ""
            console.print(f"[yellow]warning:[/] {escape(str(path))} has no end{torn}", soft_wrap=True)
        segments = cut(run)
        read.append((run, segments if index is None and segments else (choose(run, segments, index),)))
    return read


def _write(pieces: Sequence[Piece], folder: Path, options: ConversionOptions, console: Console) -> dict[Piece, str]:
    """Write all that have a target; returns those that failed, with the reason."""
    failed: dict[Piece, str] = {}
    wanted = [piece for piece in pieces if piece.target is not None]
    if wanted:
        make_folder(folder)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("frames", total=sum(len(piece.segment.decisions) for piece in wanted))
        for piece in wanted:
            try:
                write_piece(piece, options, advance=lambda: progress.advance(task))
            except (EpisodeError, FrameError) as error:
                failed[piece] = error.what if error.got is None else f"{error.what}: {error.got}"
    return failed


def _as_json(piece: Piece, failed: str | None) -> dict[str, object]:
    return {
        "piece": f"{piece.run.path}#{piece.segment.index}",
        "frames": len(piece.segment.decisions),
        "seconds": piece.segment.duration_s,
        "fps": piece.fps,
        "instruction": piece.segment.instruction,
        "ended_by": piece.segment.ended_by,
        "episode": None if piece.target is None else str(piece.target),
        "remark": piece.remark,
        "failed": failed,
    }


if __name__ == "__main__":
    sys.exit(main())
