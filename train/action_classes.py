"""The classes of a class head: what they are called, which command each stands for, and which one a recorded action is labelled as.

A class is a name that everybody knows (`FL`), or a name and its command as numbers (`TurnL=0,0,0.5`). Labels follow the lab's loaders:
an axis moves where it exceeds its threshold, turning counts only where nothing else moves, and a motion that no class has is the class
that stands still. Several classes may share a motion (slow and fast); then the nearest command decides. Which order a config or a
checkpoint means is for train/robovlms_classes.py and train/action_meaning.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bundle.errors import ConfigError
from bundle.manifest import Action
from train.run_config import ModelConfig

AXES = ("linear_x", "linear_y", "angular_z")
# x forward, y left (REP 103), z counter-clockwise, seen from above.
DIRECTIONS: dict[str, tuple[int, int, int]] = {
    "Stop": (0, 0, 0), "F": (1, 0, 0), "B": (-1, 0, 0), "L": (0, 1, 0), "R": (0, -1, 0),
    "FL": (1, 1, 0), "FR": (1, -1, 0), "BL": (-1, 1, 0), "BR": (-1, -1, 0),
    "TurnL": (0, 0, 1), "TurnR": (0, 0, -1),
}  # fmt: skip
ORDERS: dict[int, tuple[str, ...]] = {
    6: ("Stop", "F", "L", "R", "FL", "FR"),
    8: ("Stop", "F", "L", "R", "FL", "FR", "TurnL", "TurnR"),
    9: ("Stop", "F", "B", "L", "R", "FL", "FR", "BL", "BR"),
}
USUAL_SPEED_MPS = 1.15
TURN_RADPS = 0.5
# Up to which an axis stands still, in the lab's loaders: m/s, m/s, rad/s.
THRESHOLDS = (0.3, 0.3, 0.1)
_EXAMPLE = "for example --classes Stop F L R FL FR TurnL=0,0,0.5 TurnR=0,0,-0.5"


@dataclass(frozen=True)
class ClassTable:
    """Classes in the order of the head's outputs.

    Attributes:
        names: C different ones.
        values: commands [C, 3]: linear_x and linear_y in m/s, angular_z in rad/s.
        relabel: motion (a key of DIRECTIONS) -> the class that its frames are labelled as, instead of its own or of standing still.
    """

    names: tuple[str, ...]
    values: tuple[tuple[float, float, float], ...]
    relabel: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def turns(self) -> bool:
        """Whether a command has a third column."""
        return any(value[2] != 0 for value in self.values)

    @property
    def hears_turns(self) -> bool:
        """Whether labels depend on angular_z."""
        return self.turns or not {"TurnL", "TurnR"}.isdisjoint(self.relabel)

    def spelled(self) -> tuple[str, ...]:
        """Each as `parse_classes` reads it, command included."""
        return tuple(
            f"{name}={','.join(_shortest(part) for part in (value if value[2] else value[:2]))}"
            for name, value in zip(self.names, self.values, strict=True)
        )

    def labels(self, actions: NDArray[np.floating], axes: Sequence[str]) -> NDArray[np.int64]:
        """The class of each action [..., A], int64 [...].

        Args:
            axes: names of the A columns; an axis of AXES that is not among them counts as 0.
        """
        full = np.zeros((*actions.shape[:-1], len(AXES)))
        for column, name in enumerate(AXES):
            if name in axes:
                full[..., column] = actions[..., list(axes).index(name)]
        rows = full.reshape(-1, len(AXES))
        values = np.asarray(self.values, np.float64)
        moved, motions = _motions(rows, self._thresholds(values)), _motions(values, np.zeros(len(AXES)))
        distance = np.linalg.norm(rows[:, None] - values, axis=-1)
        alike = (moved[:, None] == motions).all(axis=-1)
        still = np.flatnonzero(~motions.any(axis=1))
        otherwise = np.full(len(rows), still[0]) if len(still) else distance.argmin(axis=1)
        found = np.where(alike.any(axis=1), np.where(alike, distance, np.inf).argmin(axis=1), otherwise)
        for motion, name in self.relabel.items():
            found[(moved == DIRECTIONS[motion]).all(axis=1)] = self.names.index(name)
        return found.astype(np.int64).reshape(actions.shape[:-1])

    @staticmethod
    def _thresholds(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The lab's, or half of the smallest command of an axis where that is less: a slow class must be reachable."""
        sizes = np.where(values == 0, np.inf, np.abs(values)).min(axis=0)
        return np.minimum(THRESHOLDS, sizes / 2)


def _motions(rows: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Signs of what moves [N, 3]; turning is a motion of its own only where nothing else moves."""
    signs = np.where(np.abs(rows) > thresholds, np.sign(rows), 0).astype(np.int64)
    signs[signs[:, :2].any(axis=1), 2] = 0
    return signs


def parse_classes(
    texts: Sequence[str],
    *,
    speed: float = USUAL_SPEED_MPS,
    relabel: Mapping[str, str] | None = None,
    hint: str = _EXAMPLE,
) -> ClassTable:
    """Classes as they are written: a name of DIRECTIONS, or `name=vx,vy[,wz]`.

    Args:
        speed: linear speed of classes without numbers, in m/s; they turn at TURN_RADPS.
        relabel: see ClassTable.

    Raises:
        ConfigError: a name that needs numbers, numbers that are none, or a name twice.
    """
    names, values = [], []
    for text in texts:
        name, equals, numbers = (part.strip() for part in text.partition("="))
        names.append(name)
        values.append(_numbers(text, numbers, hint) if equals else _named(name, speed, hint))
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError(
            "two classes have one name" if all(names) else "a class has no name",
            got=" ".join(texts),
            expected="different names, in training order",
            hint=hint,
        )
    relabel = dict(relabel or {})
    wrong = [f"{motion} as {name}" for motion, name in relabel.items() if motion not in DIRECTIONS or name not in names]
    if wrong:
        raise ConfigError(
            "a motion cannot be labelled so",
            got=", ".join(wrong),
            expected=f"a motion out of {' '.join(DIRECTIONS)}, as one of the classes {' '.join(names)}",
            hint='for example model.relabel = {FL = "L", FR = "R"}',
        )
    return ClassTable(tuple(names), tuple(values), relabel)


def classes_of_model(model: ModelConfig, *, speed: float = USUAL_SPEED_MPS) -> ClassTable:
    """The classes that a training config asks for; the nine directions where it says nothing.

    Raises:
        ConfigError: see parse_classes.
    """
    return parse_classes(
        model.classes or ORDERS[9],
        speed=speed,
        relabel=model.relabel,
        hint='for example model.classes = ["Stop", "F", "TurnL=0,0,0.5"]',
    )


def classes_of_action(action: Action) -> ClassTable:
    """The classes of a policy, by its manifest."""
    columns = [action.names.index(axis) if axis in action.names else None for axis in AXES]
    rows = [[0.0 if column is None else row[column] for column in columns] for row in action.class_values]
    names = action.class_names or tuple(f"class {index}" for index in range(len(rows)))
    return ClassTable(names, tuple((row[0], row[1], row[2]) for row in rows))


def _shortest(number: float) -> str:
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _named(name: str, speed: float, hint: str) -> tuple[float, float, float]:
    if name not in DIRECTIONS:
        raise ConfigError(
            f"what the class {name!r} does is not known",
            got=name,
            expected=f"one of {' '.join(DIRECTIONS)}, or {name or 'NAME'}=vx,vy[,wz] in m/s and rad/s",
            hint=hint,
        )
    x, y, z = DIRECTIONS[name]
    return speed * x, speed * y, TURN_RADPS * z


def _numbers(text: str, numbers: str, hint: str) -> tuple[float, float, float]:
    try:
        parts = [float(part) for part in numbers.split(",")]
    except ValueError:
        parts = []
    if len(parts) not in (2, 3) or not all(map(math.isfinite, parts)):
        raise ConfigError(
            "the command of a class is not usable",
            got=text,
            expected="NAME=vx,vy or NAME=vx,vy,wz: finite numbers, in m/s and rad/s",
            hint=hint,
        )
    return parts[0], parts[1], parts[2] if len(parts) == 3 else 0.0


NINE = parse_classes(ORDERS[9])
