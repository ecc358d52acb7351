"""What is known of an episode after an examination, as plain data that survives a way through JSON.

Found out by episodes/examination.py and compared by episodes/set_examination.py; knows neither.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from episodes.frame_scan import CorruptFrame
from episodes.instruction import InstructionSource

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """Something about an episode.

    Attributes:
        code: which kind, for programs: unreadable, session_log, layout, images, actions, event_types, action_classes, instruction,
            attributes, times, no_motion, corrupt_frames, frame_sizes, frozen_frames, black_frames, white_frames, overexposed,
            no_instruction, instruction_assumed, side_mismatch, fps, colour_order, hung, crashed.
        severity: "error" if the episode cannot be used as it is.
        text: what it is.
        hint: what to do about it.
    """

    code: str
    severity: Severity
    text: str
    hint: str


@dataclass(frozen=True)
class AxisRange:
    """Smallest and largest value of one action column, in the recorder's units."""

    name: str
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Examination:
    """What is known of one episode; None or empty where it could not be found out.

    Attributes:
        path: the file, or FOLDER#INDEX for an episode of a LeRobot dataset.
        bytes: size of the file.
        schema: v1, v5, v6 or lerobot.
        encoding: raw rgb, raw bgr or jpeg.
        frames: images stored, readable or not.
        height, width: of the images; of most, where they differ.
        fps: frames per second.
        instruction: what the robot was told, and where that comes from: stored, file name or none.
        axes: range of each action column.
        classes: frames of each of the nine classes of episodes/actions.py.
        left, right: frames with linear_y above, below the threshold of the classes.
        corrupt, repeated, black, white, overexposed, bands: see episodes/frame_scan.py.
        problems: in the order in which they were found.
    """

    path: str
    bytes: int | None = None
    schema: str | None = None
    encoding: str | None = None
    frames: int = 0
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    instruction: str | None = None
    instruction_source: InstructionSource = "none"
    axes: tuple[AxisRange, ...] = ()
    classes: dict[str, int] = field(default_factory=dict)
    left: int = 0
    right: int = 0
    corrupt: tuple[CorruptFrame, ...] = ()
    repeated: tuple[int, ...] = ()
    black: tuple[int, ...] = ()
    white: tuple[int, ...] = ()
    overexposed: tuple[int, ...] = ()
    bands: tuple[tuple[float, float], ...] | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that forbid to use the episode as it is."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    def as_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes an equal Examination."""
        return asdict(self)


def from_json(data: dict[str, Any]) -> Examination:
    """The inverse of `Examination.as_json`, also after a way through JSON.

    Raises:
        TypeError, KeyError: it is not such data.
    """
    nested: dict[str, Any] = {
        "axes": tuple(AxisRange(**axis) for axis in data["axes"]),
        "corrupt": tuple(CorruptFrame(**frame) for frame in data["corrupt"]),
        "problems": tuple(Problem(**problem) for problem in data["problems"]),
        "repeated": tuple(data["repeated"]),
        "black": tuple(data["black"]),
        "white": tuple(data["white"]),
        "overexposed": tuple(data["overexposed"]),
        "bands": None if data["bands"] is None else tuple((red, blue) for red, blue in data["bands"]),
    }
    return Examination(**(data | nested))
