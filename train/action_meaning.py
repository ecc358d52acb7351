"""What the action's columns are called and mean: from the head, the config, and what the user states.

No checkpoint records it. Defaults are the lab's; everything can be stated, and the manifest always says what was taken.
"""

from __future__ import annotations

from bundle.errors import ConfigError
from bundle.manifest import Action
from train.config import PolicySpec
from train.facts import TrainingFacts

# The fork's nine classes in its own order; x forward, y left (REP 103).
NINE_CLASSES = ("Stop", "F", "B", "L", "R", "FL", "FR", "BL", "BR")
_DIRECTIONS = {
    "Stop": (0, 0), "F": (1, 0), "B": (-1, 0), "L": (0, 1), "R": (0, -1),
    "FL": (1, 1), "FR": (1, -1), "BL": (-1, 1), "BR": (-1, -1),
}  # fmt: skip
_VELOCITIES = ("linear_x", "linear_y", "angular_z")
_ARM = ("x", "y", "z", "roll", "pitch", "yaw")
_USUAL_SPEED = 1.15
_UNITS = {"linear_x": "m/s", "linear_y": "m/s", "angular_z": "rad/s", "gripper": "-1 or 1"}


def action_of(
    spec: PolicySpec,
    facts: TrainingFacts | None = None,
    *,
    action_range: tuple[float, float] | None = None,
    names: tuple[str, ...] = (),
    classes: tuple[str, ...] = (),
    class_speed: float | None = None,
) -> Action:
    """The manifest's action part.

    Args:
        facts: what the checkpoint records of its training; only the user's word, which is the rest, goes before it.
        action_range: physical values of -1 and +1.
        names: of the columns.
        classes: names of a class head's classes in order.
        class_speed: linear speed of a class head's commands, in m/s; None is that of the recordings if they are known, else the lab's.

    Raises:
        ConfigError: names or classes that do not fit the head, or classes that must be stated.
    """
    minimum, maximum = action_range or (spec.minimum, spec.maximum)
    if not minimum < maximum:
        raise ConfigError(
            "the action range is empty",
            got=f"{minimum} to {maximum}",
            expected="minimum < maximum",
            hint="--action-range -1.15 1.15",
        )
    if action_range is not None and spec.head.kind == "classes":
        raise ConfigError(
            "a class head has no range", got="--action-range", hint="--class-speed sets its commands' speed."
        )
    if action_range is not None and spec.head.kind == "actions_gripper" and maximum <= 0.5:
        raise ConfigError(
            "the action range would keep the gripper at -1",
            got=f"maximum {maximum}",
            expected="above 0.5",
            hint="upstream's evaluation scales the gripper's 0 and 1 as well, and takes the sign of what exceeds 0.5.",
        )
    class_names = _class_names(spec, classes)
    if class_speed is None:
        class_speed = _USUAL_SPEED if facts is None else facts.action_maximum
    names = names or _recorded_names(spec, facts) or _default_names(spec)
    columns = 2 if spec.head.kind == "classes" else spec.head.outputs
    if len(names) != columns or len(set(names)) != columns:
        raise ConfigError(
            "the action names do not fit the head",
            got=", ".join(names),
            expected=f"{columns} different names",
            hint="see --action-names.",
        )
    return Action(
        head=spec.head.kind,
        names=names,
        units=tuple(_UNITS.get(name, "as trained") for name in names),
        normalized=spec.head.kind != "classes" and (spec.normalized or action_range is not None),
        minimum=minimum,
        maximum=maximum,
        mu=spec.mu,
        class_names=class_names,
        class_values=tuple(tuple(class_speed * part for part in _DIRECTIONS[name]) for name in class_names),
    )


def _recorded_names(spec: PolicySpec, facts: TrainingFacts | None) -> tuple[str, ...]:
    """The axes that were learned; columns of a wider head that were trained to be zero are called so."""
    if facts is None:
        return ()
    if spec.head.kind != "actions_gripper":
        return facts.action_names
    learned = len(facts.action_names)
    return (*facts.action_names, *(f"unused_{index}" for index in range(learned, spec.head.outputs - 1)), "gripper")


def _default_names(spec: PolicySpec) -> tuple[str, ...]:
    count = spec.head.outputs
    if spec.head.kind == "classes":
        return _VELOCITIES[:2]
    if spec.head.kind == "velocities":
        return _VELOCITIES[:count] if count <= len(_VELOCITIES) else tuple(f"action_{i}" for i in range(count))
    arm = count - 1
    if arm == len(_ARM):
        return (*_ARM, "gripper")
    return (*(_VELOCITIES[:arm] if arm <= len(_VELOCITIES) else tuple(f"action_{i}" for i in range(arm))), "gripper")


def _class_names(spec: PolicySpec, classes: tuple[str, ...]) -> tuple[str, ...]:
    if spec.head.kind != "classes":
        if classes:
            raise ConfigError("this head has no classes", got="--classes", hint="leave it out.")
        return ()
    names = classes or (NINE_CLASSES if spec.head.outputs == len(NINE_CLASSES) else ())
    if len(names) != spec.head.outputs or len(set(names)) != len(names) or not set(names) <= set(_DIRECTIONS):
        raise ConfigError(
            f"what the {spec.head.outputs} classes mean must be stated",
            got=" ".join(names) or "nothing",
            expected=f"{spec.head.outputs} names out of {' '.join(_DIRECTIONS)}, in training order",
            hint="for example --classes Stop F L R FL FR; the order stands in the dataset code of the run.",
        )
    return names
