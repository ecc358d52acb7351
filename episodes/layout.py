"""Decides from a file's content which of the known episode schemas it has.

The recorder changed three times and never wrote a version, so the schema is sniffed, by this rule:

1. an attribute `runtime_config` or a group `grounding`  -> a session log, recorded while a policy drove: refused;
2. a dataset `observations/images`                       -> "v5";
3. a dataset `images`, and a dataset `action_classes` or one of the attributes `scenario`, `cx_position`, `cx_path`,
   `control_mode`                                        -> "v6";
4. a dataset `images` otherwise                          -> "v1".

V1 and V6 hold the same datasets but V1 frames are RGB and V6 frames BGR, which is why rule 3 must not be guessed. An
explicit schema overrides the whole rule. No recorder of these had a hand camera; where a file has one, its images stand beside the others,
stored as they are. Knows where things are; does not read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import h5py

from bundle.errors import EpisodeError
from episodes.container import find_dataset, has_link, list_datasets

Schema = Literal["v1", "v5", "v6"]
SCHEMAS: tuple[Schema, ...] = get_args(Schema)

IMAGES: dict[Schema, str] = {"v1": "images", "v5": "observations/images", "v6": "images"}
HAND_IMAGES: dict[Schema, str] = {"v1": "hand_images", "v5": "observations/hand_images", "v6": "hand_images"}
ACTIONS = "actions"
EVENT_TYPES = "action_event_types"
ACTION_CLASSES = "action_classes"
INSTRUCTION = "language_instruction"
TIMESTAMPS = ("timestamps", "timestamp", "observations/timestamps", "observations/timestamp")
V6_ATTRIBUTES = ("scenario", "cx_position", "cx_path", "control_mode")


def detect_schema(file: h5py.File, path: Path) -> Schema:
    """The schema of an open file, by the rule in the module docstring.

    Raises:
        EpisodeError: the file is a session log, or has none of the known layouts.
    """
    _refuse_session_log(file, path)
    if find_dataset(file, IMAGES["v5"], path) is not None:
        return "v5"
    if find_dataset(file, IMAGES["v1"], path) is not None:
        has_v6_sign = has_link(file, ACTION_CLASSES) or any(name in file.attrs for name in V6_ATTRIBUTES)
        return "v6" if has_v6_sign else "v1"
    raise EpisodeError(
        f"{path} has none of the known episode layouts",
        got=list_datasets(file),
        expected="images + actions (v1, v6) or observations/images + actions (v5)",
        hint="if it comes from a new recorder, convert it with episodes.writer.write_episode; otherwise leave it out.",
    )


def session_log_signs(file: h5py.File) -> list[str]:
    """What tells that an open file was recorded while a policy drove; empty for a demonstration."""
    signs = ["attribute 'runtime_config'"] if "runtime_config" in file.attrs else []
    if has_link(file, "grounding"):
        signs.append("group 'grounding'")
    return signs


def _refuse_session_log(file: h5py.File, path: Path) -> None:
    signs = session_log_signs(file)
    if signs:
        raise EpisodeError(
            f"{path} is a session log, not an episode",
            got=" and ".join(signs),
            expected="a demonstration",
            hint="it was recorded while a policy drove, so its actions are the policy's own; leave it out of training. "
            'If a person drove, open it with schema="v5".',
        )
