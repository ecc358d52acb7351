"""What the action's columns are called and mean: from the head, the config, and what the user states.

No checkpoint records it. Defaults are the lab's; everything can be stated, and the manifest always says what was taken.
"""

from __future__ import annotations

from bundle.errors import ConfigError
from bundle.manifest import Action
from train.action_classes import AXES, DIRECTIONS, USUAL_SPEED_MPS, ClassTable, parse_classes
from train.config import PolicySpec
from train.facts import TrainingFacts

_ARM = ("x", "y", "z", "roll", "pitch", "yaw")
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
        classes: a class head's classes in order, names or `name=vx,vy[,wz]`.
        class_speed: linear speed of classes without numbers, in m/s; None is that of the recordings if they are known, else the lab's.

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
    table, source = _classes(spec, facts, classes, class_speed)
    columns = (3 if table.turns else 2) if spec.head.kind == "classes" else spec.head.outputs
    names = names or _recorded_names(spec, facts) or _default_names(spec, columns)
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
        class_names=table.names,
        class_values=tuple(value[:columns] for value in table.values),
        classes_source=source,
    )


def _recorded_names(spec: PolicySpec, facts: TrainingFacts | None) -> tuple[str, ...]:
    """The axes that were learned; columns of a wider head that were trained to be zero are called so."""
    if facts is None or spec.head.kind == "classes":
        return ()
    if spec.head.kind != "actions_gripper":
        return facts.action_names
    learned = len(facts.action_names)
    return (*facts.action_names, *(f"unused_{index}" for index in range(learned, spec.head.outputs - 1)), "gripper")


def _default_names(spec: PolicySpec, columns: int) -> tuple[str, ...]:
    count = spec.head.outputs
    if spec.head.kind == "classes":
        return AXES[:columns]
    if spec.head.kind == "velocities":
        return AXES[:count] if count <= len(AXES) else tuple(f"action_{i}" for i in range(count))
    arm = count - 1
    if arm == len(_ARM):
        return (*_ARM, "gripper")
    return (*(AXES[:arm] if arm <= len(AXES) else tuple(f"action_{i}" for i in range(arm))), "gripper")


def _has_speed(name: str, value: tuple[float, float, float]) -> bool:
    """Whether a command is its name's direction at one linear speed; turns, and commands of one's own, are not."""
    size = max(abs(value[0]), abs(value[1]))
    x, y, z = DIRECTIONS.get(name, (0, 0, 0))
    return z == 0 and size > 0 and value == (size * x, size * y, 0)


def _classes(
    spec: PolicySpec, facts: TrainingFacts | None, stated: tuple[str, ...], speed: float | None
) -> tuple[ClassTable, str]:
    """The classes, and who says so: the user, the checkpoint, or what the lab's code does with the config."""
    if spec.head.kind != "classes":
        if stated:
            raise ConfigError("this head has no classes", got="--classes", hint="leave it out.")
        return ClassTable((), ()), ""
    count = spec.head.outputs
    recorded = () if facts is None else facts.classes or ()
    if stated:
        texts, source = stated, "stated by the user"
    elif recorded:
        texts, source = recorded, "recorded"
        if speed is not None:  # which goes before what is recorded, for the classes that it can be said of
            table = parse_classes(recorded)
            texts = tuple(
                name if _has_speed(name, value) else text
                for text, name, value in zip(recorded, table.names, table.values, strict=True)
            )
    else:
        texts, source = spec.classes, spec.classes_source
    hint = "for example --classes Stop F L R FL FR TurnL=0,0,0.5; the order stands in the dataset code of the run."
    if len(texts) != count:
        what = f"--classes names {len(texts)} of {count} classes" if stated else ""
        raise ConfigError(
            what or f"what the {count} classes mean must be stated",
            got=" ".join(texts) or f"nothing; {source}" if source else "nothing",
            expected=f"{count} of {' '.join(DIRECTIONS)} or NAME=vx,vy[,wz], in training order",
            hint=hint,
        )
    if speed is None:
        speed = USUAL_SPEED_MPS if facts is None else facts.action_maximum
    return parse_classes(texts, speed=speed, hint=hint), source
