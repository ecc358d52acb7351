"""What can be told of recorded episodes before a choice is made among them: their kinds of frames, and whether a picture shows anything.

Motion and position need no image, and reading one costs tens of milliseconds, so `survey` opens each file once and reads none; brightness
is measured only where a frame is a candidate. `choose` deals evenly over kinds of frames: a set drawn at random would be nine parts
"forward", and the ranges of what it has not seen are clipped.

Every choice is a function of file names and a seed. Knows nothing about policies but what their actions are called.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bundle.errors import EpisodeError
from bundle.manifest import Action
from bundle.prompt_template import RAW, told
from episodes.reader import Episode, EpisodeWarning, open_episode

T = TypeVar("T")
Stratum = tuple[str, ...]

POSITIONS = ("start", "middle", "end")
# Of the largest command; slower is standing still on that axis. The threshold of the recorder's own discrete classes.
_MOVES = 0.3
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Of 255. A covered lens gives sensor noise of a few levels; a frame without any contrast is a broken one, whatever its level.
_BLACK, _FLAT = 10.0, 1.0
_HELD_OUT = 0.2  # of the episodes, for search and again for test
_SAMPLES = 160  # rows and columns that are looked at; the mean of a picture needs no more


@dataclass(frozen=True, eq=False)
class Recording:
    """An episode as far as it is known without its images.

    Attributes:
        source: its file, or FOLDER#INDEX.
        instruction: what the policy is told.
        motions: the motion class of each frame, such as "+x-y" or "stop".
        content: tells files of the same name apart.
    """

    source: Path
    instruction: str
    motions: tuple[str, ...]
    content: str

    def __len__(self) -> int:
        return len(self.motions)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def order(self) -> tuple[str, str, str]:
        """Sorts recordings; the folder counts only between copies."""
        return self.name, self.content, str(self.source)

    def position(self, frame: int) -> str:
        """The third of the episode in which a frame lies."""
        return POSITIONS[len(POSITIONS) * frame // len(self)]


def survey(
    sources: Iterable[Path],
    action: Action,
    *,
    instruction: str | None,
    template: str = RAW,
    cameras: Sequence[str] = ("static",),
) -> tuple[tuple[Recording, ...], tuple[str, ...]]:
    """The episodes that have an instruction, in the order of their names, and a line for each that has none.

    Args:
        instruction: for all of them, instead of their own.
        template: of the policy's prompt; one without words needs no instruction.
        cameras: that each must have.

    Raises:
        EpisodeError: a file is damaged, was recorded on another robot, lacks a camera, or no episode has an instruction.
    """
    required = recorded_axes(action)
    found: list[Recording] = []
    notes: list[str] = []
    assumed: list[str] = []
    known: set[str] = set()  # a copy in another part would be judged by what it was fitted to
    for source in dict.fromkeys(sources):
        with opened(source) as episode:
            if not set(required) <= set(episode.action_names):
                raise EpisodeError(
                    f"{source} is an episode of another robot",
                    got=", ".join(episode.action_names),
                    expected=", ".join(required),
                    hint="calibrate on episodes of the robot that the policy drives; if it is that robot, state the policy's axes "
                    "when building: --action-names ...",
                )
            episode.require_cameras(cameras)
            said = told(template, instruction, episode.instruction)
            if said is None:
                notes.append(f"{source.name}: left out, it has no instruction")
                continue
            if instruction is None and episode.instruction_source == "file name":
                assumed.append(source.name)
            content = hashlib.sha256(repr((said, episode.action_names, episode.actions.shape)).encode())
            content.update(episode.actions.tobytes())
            content.update(episode.frame(0).tobytes())  # standing still is the same actions everywhere
            if content.hexdigest() in known:
                notes.append(f"{source.name}: left out, a copy of another episode")
                continue
            known.add(content.hexdigest())
            found.append(Recording(source, said, motion_classes(episode, action), content.hexdigest()))
    if not found:
        raise EpisodeError(
            "no episode has an instruction",
            got=f"{len(notes)} episodes without one",
            expected="one stored, or left or right in the file name",
            hint="pass --instruction '...': what the robot was told in these episodes.",
        )
    if assumed:
        notes.append(
            f"{len(assumed)} episodes: no instruction is stored, it was taken from the file name ({min(assumed)}, ...)"
        )
    return tuple(sorted(found, key=lambda recording: recording.order)), tuple(sorted(notes))


def recorded_axes(action: Action) -> tuple[str, ...]:
    """The columns that an episode must have: all but a gripper head's gripper and its padding, which a mobile robot does not record."""
    if action.head == "classes":
        # The lab's loader fills up what old recordings lack: they do not turn.
        return tuple(name for name in action.names if name != "angular_z")
    if action.head != "actions_gripper":
        return action.names
    return tuple(name for name in action.names[:-1] if not name.startswith("unused_")) or action.names


def motion_classes(episode: Episode, action: Action) -> tuple[str, ...]:
    """For each frame, the signs of the axes that move: "+x-y", "-angular_z", "stop"."""
    names = [name for name in action.names if name in episode.action_names]
    commands = episode.actions[:, [episode.action_names.index(name) for name in names]]
    largest = _largest_commands(action)[[action.names.index(name) for name in names]]
    signs = np.where(np.abs(commands) > _MOVES * largest, np.sign(commands), 0)
    labels = [name.removeprefix("linear_") for name in names]
    return tuple(
        "".join(("+" if sign > 0 else "-") + label for sign, label in zip(row, labels, strict=True) if sign) or "stop"
        for row in signs
    )


def _largest_commands(action: Action) -> NDArray[np.float64]:
    """Of each column; metres and radians are not compared."""
    if action.head == "classes":
        table: NDArray[np.float64] = np.abs(np.array(action.class_values, np.float64)).max(axis=0)
        return table
    return np.full(len(action.names), max(abs(action.minimum), abs(action.maximum)) if action.normalized else 1.0)


def opened(source: Path) -> Episode:
    """The episode, without the reader's warning of an assumed instruction: `survey` says that once for all.

    Raises:
        EpisodeError: see open_episode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)
        return open_episode(source)


def brightness(frame: NDArray[np.uint8]) -> float | None:
    """Mean luma, 0-255, of a frame uint8 [H, W, 3]; None where it shows nothing, being black or without any contrast."""
    rows, columns = (max(1, length // _SAMPLES) for length in frame.shape[:2])
    luma = frame[::rows, ::columns].astype(np.float32) @ _LUMA
    return None if luma.max() < _BLACK or luma.std() < _FLAT else float(luma.mean())


def draw_number(*key: int | str) -> int:
    """A number that is always the same for a key and looks random across keys, in any process and version."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def frame_strata(recordings: Sequence[Recording], seed: int) -> dict[Stratum, list[tuple[Recording, int]]]:
    """All frames by (instruction, motion, position); within a stratum, each recording gives one before any gives its second."""
    strata: dict[Stratum, list[tuple[Recording, int]]] = defaultdict(list)
    for recording in recordings:
        for frame, motion in enumerate(recording.motions):
            strata[recording.instruction, motion, recording.position(frame)].append((recording, frame))
    return {stratum: list(_spread(stratum, frames, seed)) for stratum, frames in strata.items()}


def _spread(stratum: Stratum, frames: Sequence[tuple[Recording, int]], seed: int) -> Iterator[tuple[Recording, int]]:
    own: dict[Recording, list[tuple[Recording, int]]] = defaultdict(list)
    for recording, frame in sorted(frames, key=lambda each: draw_number(seed, each[0].name, each[1])):
        own[recording].append((recording, frame))
    order = sorted(own, key=lambda each: (draw_number(seed, each.name, *stratum), each.order))
    return in_turns([own[recording] for recording in order])


def in_turns(queues: Iterable[Sequence[T]]) -> Iterator[T]:
    """The first of each, then the second of each, and so on."""
    left = [iter(queue) for queue in queues]
    while left:
        going = []
        for queue in left:
            for item in islice(queue, 1):
                yield item
                going.append(queue)
        left = going


def choose(strata: Mapping[Stratum, Sequence[T]], count: int) -> list[T]:
    """At most `count` items, dealt in turns over the strata, the rare before the frequent.

    Where there are more strata than `count`, the coarse kinds come before the fine: every instruction is there before any has its second
    motion, every motion before any has its second position.
    """
    order = _coarse_first({stratum: len(items) for stratum, items in strata.items()}, 0)
    return list(in_turns([strata[stratum] for stratum in order]))[:count]


def _coarse_first(sizes: Mapping[Stratum, int], depth: int) -> list[Stratum]:
    if len(sizes) <= 1:
        return list(sizes)
    groups: dict[str, dict[Stratum, int]] = defaultdict(dict)
    for stratum, size in sizes.items():
        groups[stratum[depth]][stratum] = size
    rare_first = sorted(groups, key=lambda kind: (sum(groups[kind].values()), kind))
    return list(in_turns([_coarse_first(groups[kind], depth + 1) for kind in rare_first]))


def deal_episodes(
    recordings: Sequence[Recording], *, window: int, seed: int
) -> tuple[list[Recording], list[Recording], list[Recording]]:
    """Calibration, search and test, about 60, 20 and 20 percent of each instruction's episodes and at least one each.

    Search and test each get an episode longer than `window` if there are such, the test first.

    Args:
        recordings: at least three.
    """
    ordered = sorted(
        recordings,
        key=lambda each: (
            draw_number(seed, "instruction", each.instruction),
            each.instruction,
            draw_number(seed, "episode", each.name),
            each.order,
        ),
    )
    held = 2 * max(1, round(_HELD_OUT * len(ordered)))
    # Evenly spaced along a list sorted by instruction: each instruction gives its share, give or take one.
    picked = [ordered[(2 * index + 1) * len(ordered) // (2 * held)] for index in range(held)]
    calibration, search, test = [each for each in ordered if each not in picked], picked[::2], picked[1::2]
    _lend_long(test, (calibration, 0), (search, 0), window=window)
    _lend_long(search, (calibration, 0), (test, 1), window=window)
    return calibration, search, test


def _lend_long(part: list[Recording], *donors: tuple[list[Recording], int], window: int) -> None:
    """Exchange an episode for one longer than the window, of the same instruction if possible; a donor keeps the stated number."""
    if any(len(recording) > window for recording in part):
        return
    for donor, keeps in donors:
        long = [index for index, recording in enumerate(donor) if len(recording) > window]
        if len(long) > keeps:
            theirs, ours = min(
                product(long, range(len(part))),
                key=lambda pair: donor[pair[0]].instruction != part[pair[1]].instruction,
            )
            donor[theirs], part[ours] = part[ours], donor[theirs]
            return
