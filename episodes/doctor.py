#!/usr/bin/env python3
"""Command line: what is wrong with recorded episodes, before a training finds out; and copies of them that are right.

    python episodes/doctor.py FOLDER
    python episodes/doctor.py FOLDER 'more/*.h5' --json
    python episodes/doctor.py FOLDER --repair --out REPAIRED
    python episodes/doctor.py FOLDER --export-lerobot DATASET

Exit codes: 0 no errors, 1 an episode has errors or something failed, 2 usage.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bundle.atomic import make_folder
from bundle.errors import ConfigError, EpisodeError, JetvlaError
from episodes.doctor_view import show, show_repairs
from episodes.findings import Examination
from episodes.instruction import EpisodeWarning
from episodes.isolation import examine_all
from episodes.lerobot import export_lerobot, split_name
from episodes.repair import Repaired, RepairOptions, plan_repairs, repair
from episodes.set_examination import examine_set
from episodes.sources import find_sources

_LONGEST_S = 1e6
_PIPE_WIDTH = 150  # the table's, where no terminal tells one


@dataclass(frozen=True)
class DoctorConfig:
    """Examine episodes.

    Attributes:
        files: episode files, folders of them, globs, or LeRobot v3 dataset folders.
        repair: write each usable episode into --out as JPEG-compressed V5 with its instruction; originals are only read.
        out: folder for repaired episodes; made if it does not exist.
        instruction: what the robot was told in those of FILES that store none; by default what the file name says.
        swap_colour: exchange red and blue of all FILES while repairing.
        drop_corrupt: leave out frames at the end of an episode that cannot be read; in the middle they are always refused.
        force: replace files in --out.
        export_lerobot: write the usable episodes (of files the repaired ones with --repair) as a LeRobot v3 dataset into this folder.
        timeout_s: how long examining one episode may take.
        jobs: episodes examined at a time; 0 takes one for each CPU core, at most 8.
        json: machine-readable result on stdout.
    """

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES ...")]
    repair: bool = False
    out: Path | None = None
    instruction: str | None = None
    swap_colour: bool = False
    drop_corrupt: bool = False
    force: bool = False
    export_lerobot: Path | None = None
    timeout_s: float = 60.0
    jobs: int = 0
    json: bool = False


def main() -> int:
    """Parse, examine, print."""
    config = tyro.cli(DoctorConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    checked = False
    try:
        check(config)
        paths = find_sources(config.files)
        targets = _targets(config, paths)
        checked = True
        return run(config, paths, targets, console)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1 if checked else 2
    except KeyboardInterrupt:
        console.print("interrupted; unfinished files were removed.")
        return 1


def check(config: DoctorConfig) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: they do.
    """
    only_repair = {
        "--out": config.out,
        "--instruction": config.instruction,
        "--swap-colour": config.swap_colour,
        "--drop-corrupt": config.drop_corrupt,
        "--force": config.force,
    }
    given = [name for name, value in only_repair.items() if value]
    if not config.files:
        problem, expected = "there is nothing to examine", "files, folders or globs"
    elif given and not config.repair:
        problem, expected = f"{', '.join(given)} without --repair", "--repair, which they belong to"
    elif config.repair and config.out is None:
        problem, expected = "--repair without --out", "--out FOLDER for the repaired copies"
    elif not 0 < config.timeout_s < _LONGEST_S or config.jobs < 0:
        problem, expected = "--timeout-s or --jobs is out of range", "--timeout-s above 0, --jobs 0 or more"
    else:
        return
    raise ConfigError(problem, expected=expected, hint="python episodes/doctor.py --help explains each option.")


def run(config: DoctorConfig, paths: Sequence[Path], targets: dict[Path, Path], console: Console) -> int:
    """Examine, show, and write what was asked for; returns the exit code.

    Args:
        paths: the episodes.
        targets: what each file among them becomes when repaired.

    Raises:
        JetvlaError: see episodes.repair and episodes.lerobot.
    """
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=_PIPE_WIDTH)
    jobs = config.jobs or min(8, os.cpu_count() or 1)
    with _progress(console) as progress:
        task = progress.add_task("examining", total=len(paths))
        examined = examine_all(paths, timeout_s=config.timeout_s, jobs=jobs, advance=lambda: progress.advance(task))
    episodes, summary = examine_set(examined)
    result: dict[str, object] = {
        "episodes": [episode.as_json() for episode in episodes],
        "set": summary.as_json(),
    }
    if not config.json:
        show(episodes, summary, out)
    failed = summary.unusable > 0
    usable = [path for path, episode in zip(paths, episodes, strict=True) if not episode.errors]
    if config.repair:
        repaired, refused = _repair(config, paths, episodes, targets, console)
        usable = [file.path for file in repaired] + [path for path in usable if split_name(path) is not None]
        failed = failed or bool(refused)
        result["repaired"] = [asdict(file) | {"path": str(file.path)} for file in repaired]
        result["not_repaired"] = [{"path": str(path), "reason": why} for path, why in refused]
        if not config.json:
            show_repairs(repaired, refused, out)
    if config.export_lerobot is not None:
        _export(usable, config.export_lerobot, console)
        result["exported"] = {"path": str(config.export_lerobot), "episodes": len(usable)}
        if not config.json:
            out.print(f"exported: {config.export_lerobot}, {len(usable)} episodes", markup=False, soft_wrap=True)
    if config.json:
        print(json.dumps(result))
    return 1 if failed else 0


def _targets(config: DoctorConfig, paths: Sequence[Path]) -> dict[Path, Path]:
    if not config.repair or config.out is None:
        return {}
    files = [path for path in paths if split_name(path) is None]
    return dict(zip(files, plan_repairs(files, config.out, force=config.force), strict=True))


def _repair(
    config: DoctorConfig,
    paths: Sequence[Path],
    episodes: Sequence[Examination],
    targets: dict[Path, Path],
    console: Console,
) -> tuple[list[Repaired], list[tuple[Path, str]]]:
    """Repaired files, and those refused with the reason."""
    mendable = {"corrupt_frames"} if config.drop_corrupt else set()
    options = RepairOptions(config.instruction, config.swap_colour, config.drop_corrupt)
    repaired: list[Repaired] = []
    refused: list[tuple[Path, str]] = []
    with _progress(console) as progress:
        for path, episode in progress.track(list(zip(paths, episodes, strict=True)), description="repairing"):
            hopeless = [problem.text for problem in episode.errors if problem.code not in mendable]
            if path not in targets:
                refused.append((path, "it belongs to a LeRobot dataset; only HDF5 files are repaired"))
            elif hopeless:
                # Such a file may crash the process that reads it, and this one is to live.
                refused.append((path, hopeless[0]))
            else:
                target = targets[path]
                make_folder(target.parent)
                try:
                    repaired.append(repair(path, target, options))
                except EpisodeError as error:
                    what = error.what.removeprefix(f"{path}: ")
                    refused.append((path, f"{what}; {error.hint}"))
    return repaired, refused


def _export(paths: Sequence[Path], folder: Path, console: Console) -> None:
    if not paths:
        raise EpisodeError(
            "there is nothing to export",
            got="no usable episode",
            expected="at least one",
            hint="mend what the report above says.",
        )
    with console.status("exporting"), warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)  # the report tells which instructions are assumed
        export_lerobot(paths, folder)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    sys.exit(main())
