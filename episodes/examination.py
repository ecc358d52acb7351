"""Examines one episode to the end: facts, and problems with their severity, instead of the first error.

`open_episode` refuses a file at its first fault; a person with five hundred recordings wants to know all faults of all files. So
this walks through the same checks, notes what each of them says, and goes on with what is left. Whatever `open_episode` or
reading a frame would refuse is an error here; what can be used but should be looked at is a warning.

Knows one episode only: what shows when files are compared is the business of episodes/set_examination.py. A damaged file may hang
or kill the HDF5 library and with it this process: episodes/isolation.py examines in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
import numpy.typing as npt

from bundle.errors import EpisodeError
from episodes.actions import (
    ACTION_NAMES,
    CLASS_NAMES,
    CLASS_THRESHOLD,
    classify_actions,
    read_action_classes,
    read_actions,
    read_event_types,
)
from episodes.attributes import frame_rate, read_attributes, time_problems
from episodes.container import open_container, reading, require_dataset
from episodes.findings import AxisRange, Examination, Problem, Severity
from episodes.frame_scan import FrameScan, scan_frames
from episodes.frames import open_frames
from episodes.instruction import (
    Side,
    assume_instruction,
    read_stored_instruction,
    sides_in_name,
    sides_in_text,
)
from episodes.layout import ACTIONS, Schema, detect_schema, session_log_signs
from episodes.lerobot import split_name
from episodes.reader import open_episode
from episodes.unwritten import require_recorded_actions

T = TypeVar("T")

_LISTED = 8
_TIMES_HINT = (
    "the rate is taken from `fps` or `total_duration` where they are stored, not from these; store seconds, or the attribute "
    "`units`."
)
_FROZEN_ERROR_SHARE = 0.5  # of the moves; with more, the pictures do not show what the actions did
_CLEAR_SHARE = 2 / 3  # of the sideways frames, for a drive to one side


def examine(path: Path) -> Examination:
    """Examine an HDF5 file or FOLDER#INDEX of a LeRobot dataset; every frame is read. Never raises for what is in it."""
    problems: list[Problem] = []
    if split_name(path) is not None:
        return _examine_lerobot(path, problems)
    file = _attempt(problems, "unreadable", path, lambda: open_container(path))
    if file is None:
        size = path.stat().st_size if path.is_file() else None
        return Examination(str(path), size, problems=tuple(problems))
    with file:
        return _examine_open(file, path, problems)


def _examine_lerobot(path: Path, problems: list[Problem]) -> Examination:
    try:
        episode = open_episode(path)
    except EpisodeError as error:
        return Examination(str(path), schema="lerobot", problems=(problem_of("unreadable", error, str(path)),))
    with episode:
        facts = Examination(
            str(path),
            schema=episode.schema,
            frames=len(episode),
            fps=episode.fps,
            instruction=episode.instruction,
            instruction_source=episode.instruction_source,
        )
        scan = scan_frames(episode.frame, len(episode))
        return _judge(facts, scan, episode.actions, episode.action_names, problems)


def problem_of(code: str, error: EpisodeError, name: str) -> Problem:
    """The error of an episode as a problem of it; its name is left out, as whoever shows the problem names the episode."""
    what = error.what.removeprefix(f"{name}: ")
    if what.startswith(f"{name} "):
        what = f"the file {what.removeprefix(f'{name} ')}"
    return Problem(code, "error", what if error.got is None else f"{what} ({error.got})", error.hint)


def _examine_open(file: h5py.File, path: Path, problems: list[Problem]) -> Examination:
    size = path.stat().st_size
    signs = _attempt(problems, "layout", path, lambda: session_log_signs(file))
    schema = None
    if signs is not None:
        schema = _attempt(problems, "session_log" if signs else "layout", path, lambda: detect_schema(file, path))
    if schema is None:
        return Examination(str(path), size, problems=tuple(problems))
    known: Schema = schema
    frames = _attempt(problems, "images", path, lambda: open_frames(file, known, path))
    stored = _attempt(problems, "instruction", path, lambda: read_stored_instruction(file, path))
    instruction, source = assume_instruction(stored, path, known)
    if frames is None:
        return Examination(
            str(path), size, known, instruction=instruction, instruction_source=source, problems=tuple(problems)
        )
    count = len(frames)
    attributes = _attempt(problems, "attributes", path, lambda: read_attributes(file))
    fps = _attempt(problems, "attributes", path, lambda: frame_rate(file, attributes or {}, count, path))
    times = _attempt(problems, "times", path, lambda: time_problems(file, attributes or {}, count, path))
    actions = _attempt(problems, "actions", path, lambda: read_actions(file, path, count))
    events = _attempt(problems, "event_types", path, lambda: read_event_types(file, path, count))
    classes = _attempt(problems, "action_classes", path, lambda: read_action_classes(file, path, count))
    if actions is not None:
        recorded: npt.NDArray[np.float32] = actions
        _attempt(
            problems,
            "actions",
            path,
            lambda: require_recorded_actions(
                require_dataset(file, ACTIONS, path),
                recorded,
                frames.read,
                path,
                event_types=events,
                action_classes=classes,
            ),
        )
    problems += [Problem("times", "warning", text, _TIMES_HINT) for text in times or ()]
    facts = Examination(str(path), size, known, frames.encoding, count, None, None, fps, instruction, source)
    names = () if actions is None else ACTION_NAMES[: actions.shape[1]]
    return _judge(facts, scan_frames(frames.read, count), actions, names, problems)


def _attempt(problems: list[Problem], code: str, path: Path, read: Callable[[], T]) -> T | None:
    """What `read` gives, or None and an error in `problems`."""
    try:
        with reading(path, code):
            return read()
    except EpisodeError as error:
        problems.append(problem_of(code, error, str(path)))
        return None


def _judge(
    facts: Examination,
    scan: FrameScan,
    actions: npt.NDArray[np.float32] | None,
    names: tuple[str, ...],
    problems: list[Problem],
) -> Examination:
    """`facts` completed by what frames (already scanned) and actions (float32 [T, A], columns `names`) tell."""
    height, width = next(iter(scan.sizes), (None, None))
    axes: tuple[AxisRange, ...] = ()
    classes: dict[str, int] = {}
    left = right = 0
    if actions is not None:
        lows, highs = actions.min(axis=0).tolist(), actions.max(axis=0).tolist()
        axes = tuple(AxisRange(*axis) for axis in zip(names, lows, highs, strict=True))
        if names[:2] == ACTION_NAMES[:2]:
            counts = np.bincount(classify_actions(actions), minlength=len(CLASS_NAMES)).tolist()
            classes = dict(zip(CLASS_NAMES, counts, strict=True))
        if "linear_y" in names:
            sideways = actions[:, names.index("linear_y")]
            left, right = int((sideways > CLASS_THRESHOLD).sum()), int((sideways < -CLASS_THRESHOLD).sum())
    if actions is not None and not actions.any():
        text, hint = (
            f"all {len(actions)} actions are zero",
            "the robot never moved, or they were never written, or lost: leave the episode out unless it is to learn to stand.",
        )
        problems.append(Problem("no_motion", "warning", text, hint))
    problems = [
        *problems,
        *_frame_problems(scan, facts.frames),
        *_white_problems(scan, facts.frames),
        *_frozen_problems(scan, actions),
        *_instruction_problems(facts, left, right),
    ]
    if facts.fps is None:
        text, hint = (
            "the frame rate is not known",
            "store time stamps, `total_duration` or `fps` (in seconds) when recording.",
        )
        problems.append(Problem("fps", "warning", text, hint))
    return replace(
        facts,
        height=height,
        width=width,
        axes=axes,
        classes=classes,
        left=left,
        right=right,
        corrupt=scan.corrupt,
        repeated=scan.repeated,
        black=scan.black,
        white=scan.white,
        overexposed=scan.overexposed,
        bands=scan.bands,
        problems=tuple(problems),
    )


def _frame_problems(scan: FrameScan, frames: int) -> list[Problem]:
    problems = []
    if scan.corrupt:
        indices = [frame.index for frame in scan.corrupt]
        trailing = indices == list(range(frames - len(indices), frames)) and len(indices) < frames
        problems.append(
            Problem(
                "corrupt_frames",
                "error",
                f"{_some_of(indices, frames, 'corrupt')}; the first: {scan.corrupt[0].reason}",
                "only the end is damaged: --repair --drop-corrupt keeps what comes before."
                if trailing
                else "copy the file again from the robot; if it is like this there too, leave the episode out.",
            )
        )
    if len(scan.sizes) > 1:
        sizes = ", ".join(f"{count} of {height}x{width}" for (height, width), count in scan.sizes.items())
        hint = "a recording has one size; the file was put together from several: leave the episode out."
        problems.append(Problem("frame_sizes", "error", f"the frames differ in size: {sizes}", hint))
    if scan.black:
        all_black = len(scan.black) == frames
        problems.append(
            Problem(
                "black_frames",
                "error" if all_black else "warning",
                _some_of(scan.black, frames, "black"),
                "the camera gave no picture: check its cable and exposure, and leave the episode out if it moves then.",
            )
        )
    return problems


def _white_problems(scan: FrameScan, frames: int) -> list[Problem]:
    hint = (
        "too much light, or numbers of more than 8 bits that were cut to 8 (a mono16 camera; values times 255 twice): "
        "look at a frame, and leave the episode out if it shows nothing."
    )
    problems = []
    if scan.white:
        severity: Severity = "error" if len(scan.white) == frames else "warning"
        problems.append(Problem("white_frames", severity, _some_of(scan.white, frames, "white"), hint))
    if scan.overexposed:
        text = _some_of(scan.overexposed, frames, "white by half or more")
        problems.append(Problem("overexposed", "warning", text, hint))
    return problems


def _frozen_problems(scan: FrameScan, actions: npt.NDArray[np.float32] | None) -> list[Problem]:
    """Frame i+1 should differ from frame i if action i moved the robot; a real camera's noise makes it differ in any case."""
    if actions is None:
        return []
    moves = set(np.flatnonzero(np.any(actions[:-1] != 0, axis=1)).tolist())
    frozen = [index for index in scan.repeated if index - 1 in moves]
    if not frozen:
        return []
    text = _some_of(frozen, len(moves), "the same as before although the robot was told to move", of="moves")
    severity: Severity = "error" if len(frozen) > _FROZEN_ERROR_SHARE * len(moves) else "warning"
    hint = "the camera hung or is slower than the recorder: frames and actions no longer belong together there."
    return [Problem("frozen_frames", severity, text, hint)]


def _instruction_problems(facts: Examination, left: int, right: int) -> list[Problem]:
    problems = []
    if facts.instruction is None:
        text, hint = (
            "no instruction is stored, and the file name does not name one side",
            "--repair --instruction TEXT stores one.",
        )
        problems.append(Problem("no_instruction", "warning", text, hint))
    elif facts.instruction_source == "file name":
        text, hint = f"no instruction is stored; the file name suggests {facts.instruction!r}", "--repair stores it."
        problems.append(Problem("instruction_assumed", "warning", text, hint))
    told = sides_in_text(facts.instruction or "")
    # A LeRobot dataset's folder is called after the whole set.
    named = frozenset() if facts.schema == "lerobot" else sides_in_name(Path(facts.path))
    if len(told) != 1:
        return problems
    (side,) = told
    hint = "watch the episode; whichever is wrong teaches the policy to ignore the instruction."
    if len(named) == 1 and named != told:
        text = f"the instruction says {side}, the file name says {next(iter(named))}"
        problems.append(Problem("side_mismatch", "warning", text, hint))
    other: Side = "right" if side == "left" else "left"
    against = {"left": left, "right": right}[other]
    if against >= _CLEAR_SHARE * (left + right) and against:
        text = f"the instruction says {side}, the actions go mostly {other} (left {left}, right {right} frames)"
        problems.append(Problem("side_mismatch", "warning", text, hint))
    return problems


def _some_of(indices: Sequence[int], total: int, what: str, *, of: str = "frames") -> str:
    listed = ", ".join(str(index) for index in indices[:_LISTED]) + (", ..." if len(indices) > _LISTED else "")
    return f"{len(indices)} of {total} {of}: frame {listed} {'is' if len(indices) == 1 else 'are'} {what}"
