"""Which recorded frames calibrate an INT8 variant, which decide what becomes INT8, and which judge the outcome.

Three sets of episodes, because each choice is fitted to what it was made on: ranges to the calibration frames, the assignment of precisions
to the search frames. Frames of one episode resemble each other, so an episode is in one part only. Calibration wants single frames of
every kind; search and test want stretches of consecutive frames, since the policy has a memory of `window` frames and an error can
build up in it.

Reads images only to see whether they show something and how bright they are; calib/frames.py reads them for the policy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby, pairwise
from pathlib import Path

import numpy as np

from bundle.errors import ConfigError, EpisodeError
from bundle.manifest import Manifest
from calib.candidates import (
    Recording,
    Stratum,
    brightness,
    choose,
    deal_episodes,
    draw_number,
    frame_strata,
    in_turns,
    opened,
    survey,
)

LEAST_FRAMES = 16  # with fewer, a range is that of a few pictures
LEAST_EPISODES = 3
_CANDIDATES = 4  # read for each frame that is wanted
_BEYOND_WINDOW = 4  # frames of a stretch after the policy's memory is full and slides
_COVERED = (
    "was the lens covered, or the camera not running? python episodes/doctor.py FILES lists what each recording shows."
)


@dataclass(frozen=True)
class Chosen:
    """One calibration frame.

    Attributes:
        source: episode file, or FOLDER#INDEX of a LeRobot dataset.
        frame: index in the episode.
        instruction: what the policy is told.
        stratum: (instruction, motion such as "+x-y" or "stop", "start", "middle" or "end", "dark", "medium" or "bright").
    """

    source: Path
    frame: int
    instruction: str
    stratum: Stratum


@dataclass(frozen=True)
class Stretch:
    """Consecutive frames of a held-out episode, `start` to `stop` - 1, to be streamed from a reset."""

    source: Path
    start: int
    stop: int
    instruction: str

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Sample:
    """What was drawn; no episode is in two of the three parts.

    Attributes:
        calibration: in the order of file names and frames.
        search: decides which parts become INT8.
        test: judges the result.
        notes: a line for whatever was left out or had to be assumed.
    """

    calibration: tuple[Chosen, ...]
    search: tuple[Stretch, ...]
    test: tuple[Stretch, ...]
    notes: tuple[str, ...]


def draw(
    sources: Sequence[Path],
    *,
    manifest: Manifest,
    frames: int,
    search_frames: int,
    test_frames: int,
    instruction: str | None = None,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Sample:
    """Draw the three parts from `sources`, as a function of file names and seed: neither order nor folder matter.

    Args:
        frames: calibration frames; fewer where the episodes gave no more.
        search_frames, test_frames: about so many, in stretches that are longer than the window where the episodes are.
        instruction: for all episodes, instead of their own.
        advance: called after each image that is read: at most 4 * frames, and two or a few more for each stretch.

    Raises:
        ConfigError: fewer calibration frames are asked for than can calibrate.
        EpisodeError: an episode is damaged or of another robot; none has an instruction; or too few show something.
    """
    if frames < LEAST_FRAMES:
        raise ConfigError(
            "too few calibration frames are asked for",
            got=frames,
            expected=f"at least {LEAST_FRAMES}",
            hint="64 are enough for most policies; more take longer and change little.",
        )
    recordings, notes = survey(
        sources,
        manifest.action,
        instruction=instruction,
        template=manifest.prompt.template,
        cameras=manifest.preprocessing.cameras,
    )
    window = manifest.dimensions.window
    look = _Look(advance)
    dark: tuple[Recording, ...] = ()
    while True:
        usable = [recording for recording in recordings if recording not in dark]
        _require_episodes(len(usable), dark, notes)
        calibration, search, test = deal_episodes(usable, window=window, seed=seed)
        stretches, found_dark, short = _held_out(
            look, window, seed, search=(search, search_frames), test=(test, test_frames)
        )
        if not found_dark:
            break
        dark += found_dark  # and the parts are dealt anew, so that none is left empty
    chosen, blank = _calibration(look, calibration, frames, seed)
    lines = [
        *notes,
        *(f"{recording.name}: left out, it shows nothing where it was looked at" for recording in dark),
        *blank,
        *short,
    ]
    if len(chosen) < frames:
        lines.append(
            f"calibration: {len(chosen)} frames of {frames} asked for; its episodes ({len(calibration)}) gave no more"
        )
    return Sample(chosen, stretches["search"], stretches["test"], tuple(lines))


def _require_episodes(usable: int, dark: Sequence[Recording], notes: Sequence[str]) -> None:
    if usable >= LEAST_EPISODES:
        return
    if dark:
        raise EpisodeError(
            "the frames show nothing",
            got=f"{len(dark)} episodes that are black or without contrast ({dark[0].name}, ...), and {usable} others",
            expected=f"at least {LEAST_EPISODES} episodes that show what the robot saw",
            hint=_COVERED,
        )
    raise EpisodeError(
        "there are too few episodes",
        got=f"{usable}" + (f" that can be used ({'; '.join(notes[:3])})" if notes else ""),
        expected=f"at least {LEAST_EPISODES}: to calibrate on, to choose precisions by, and to judge the result by",
        hint="pass more episodes; frames of one episode resemble each other too much to be in two parts.",
    )


# --- stretches -------------------------------------------------------------------------------------------------------------------


def _held_out(
    look: _Look, window: int, seed: int, **parts: tuple[list[Recording], int]
) -> tuple[dict[str, tuple[Stretch, ...]], tuple[Recording, ...], list[str]]:
    """The stretches of both parts, the episodes of which nothing is to be seen, and a line for a part that came out short."""
    stretches: dict[str, tuple[Stretch, ...]] = {}
    dark: list[Recording] = []
    short: list[str] = []
    for name, (recordings, wanted) in parts.items():
        own: list[Stretch] = []
        for recording, places in plan_stretches(recordings, wanted, window, seed):
            seen = [stretch for place in places if (stretch := _first_that_shows(look, recording, place)) is not None]
            own += seen
            if not seen:
                dark.append(recording)
        stretches[name] = tuple(own)
        if (total := sum(len(stretch) for stretch in own)) < wanted:
            short.append(f"{name}: {total} frames of {wanted} asked for; its episodes ({len(recordings)}) gave no more")
    return stretches, tuple(dark), short


def plan_stretches(
    recordings: Sequence[Recording], wanted: int, window: int, seed: int
) -> list[tuple[Recording, list[list[range]]]]:
    """For each episode that is used, its stretches, each as the places where it may lie, the preferred first.

    A second stretch of an episode is taken only when every episode has one, and stretches of one episode do not overlap.
    """
    usual = window + _BEYOND_WINDOW
    by_instruction: dict[str, list[Recording]] = defaultdict(list)
    for recording in sorted(recordings, key=lambda each: (draw_number(seed, "stretch", each.name), each.order)):
        by_instruction[recording.instruction].append(recording)
    mixed = in_turns([by_instruction[instruction] for instruction in sorted(by_instruction)])
    turns = sorted(mixed, key=lambda recording: len(recording) <= window)  # stable: short ones last
    counts: dict[Recording, int] = {}
    planned = 0
    for again in range(max(len(recording) for recording in turns)):
        for recording in turns:
            if planned < max(1, wanted) and (again == 0 or (again + 1) * usual <= len(recording)):
                counts[recording] = again + 1
                planned += min(usual, len(recording))
    segments = {
        recording: [range(*ends) for ends in pairwise(len(recording) * part // times for part in range(times + 1))]
        for recording, times in counts.items()
    }
    room = [len(segment) for own in segments.values() for segment in own]
    # Longer than usual only where there are not enough episodes: as long as it takes.
    length = next(
        (n for n in range(usual, max(room)) if sum(min(n, each) for each in room) >= wanted), max(usual, *room)
    )
    turn = count(0)
    return [
        (recording, [_places(segment, length, next(turn)) for segment in own]) for recording, own in segments.items()
    ]


def _places(segment: range, length: int, turn: int) -> list[range]:
    """Where a stretch may lie in its segment: at the start, in the middle and at the end, beginning with one by turns."""
    slack = max(0, len(segment) - length)
    firsts = dict.fromkeys(segment.start + slack * ((turn + shift) % 3) // 2 for shift in range(3))
    return [range(first, min(first + length, segment.stop)) for first in firsts]


def _first_that_shows(look: _Look, recording: Recording, places: Sequence[range]) -> Stretch | None:
    for place in places:
        if None not in look(recording, [place[0], place[-1]]):
            return Stretch(recording.source, place.start, place.stop, recording.instruction)
    return None


# --- calibration frames ----------------------------------------------------------------------------------------------------------


def _calibration(
    look: _Look, recordings: Sequence[Recording], frames: int, seed: int
) -> tuple[tuple[Chosen, ...], list[str]]:
    """The calibration frames, and a line for each episode with frames that show nothing."""
    candidates = choose(frame_strata(recordings, seed), _CANDIDATES * frames)
    lumas: dict[tuple[Recording, int], float] = {}
    blank: list[str] = []
    for recording, group in groupby(sorted(candidates, key=_by_file), key=lambda candidate: candidate[0]):
        wanted = [frame for _, frame in group]
        seen = dict(zip(wanted, look(recording, wanted), strict=True))
        lumas |= {(recording, frame): luma for frame, luma in seen.items() if luma is not None}
        if empty := [str(frame) for frame, luma in seen.items() if luma is None]:
            which = "all that were drawn" if len(empty) == len(wanted) else ", ".join(empty)
            blank.append(f"{recording.name}: left out frames that show nothing: {which}")
    if not lumas:
        raise EpisodeError(
            "the frames show nothing",
            got=f"{len(candidates)} calibration frames, all black or without contrast",
            expected="pictures of what the robot saw",
            hint=_COVERED,
        )
    if len(lumas) < LEAST_FRAMES:
        raise EpisodeError(
            "there are too few frames to calibrate on",
            got=f"{len(lumas)} that can be used, in {len(recordings)} episodes",
            expected=f"at least {LEAST_FRAMES}",
            hint="pass more episodes; about three of five are calibrated on, the others judge the result.",
        )
    low, high = np.quantile(list(lumas.values()), [1 / 3, 2 / 3])
    strata: dict[Stratum, list[Chosen]] = defaultdict(list)
    for recording, frame in candidates:
        if (recording, frame) in lumas:
            luma = lumas[recording, frame]
            light = "dark" if luma < low else "bright" if luma > high else "medium"
            stratum = (recording.instruction, recording.motions[frame], recording.position(frame), light)
            strata[stratum].append(Chosen(recording.source, frame, recording.instruction, stratum))
    rank = {recording.source: index for index, recording in enumerate(sorted(recordings, key=lambda each: each.order))}
    return tuple(sorted(choose(strata, frames), key=lambda each: (rank[each.source], each.frame))), blank


def _by_file(candidate: tuple[Recording, int]) -> tuple[tuple[str, str, str], int]:
    recording, frame = candidate
    return recording.order, frame


@dataclass(frozen=True)
class _Look:
    """Reads frames to tell how bright they are, each once; None for one that shows nothing."""

    advance: Callable[[], None]
    _seen: dict[tuple[Path, int], float | None] = field(default_factory=dict)

    def __call__(self, recording: Recording, frames: Sequence[int]) -> list[float | None]:
        unseen = sorted({frame for frame in frames if (recording.source, frame) not in self._seen})
        if unseen:
            with opened(recording.source) as episode:
                for frame in unseen:
                    self._seen[recording.source, frame] = brightness(episode.frame(frame))
                    self.advance()
        return [self._seen[recording.source, frame] for frame in frames]
