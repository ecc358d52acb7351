"""Finds out what the robot had been told in an episode: stored text, else the side in the file name.

Most V1 and all V6 recordings have no text; the lab keeps "left" or "right" in the file name instead. Assuming an
instruction changes what a policy learns, so it is always said with an EpisodeWarning, and a name with both sides (a
target on one side, a path over the other) is not guessed at.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Literal

import h5py

from bundle.errors import EpisodeError
from episodes.attributes import attribute_texts, read_attribute
from episodes.container import has_link, read_texts, require_dataset
from episodes.layout import INSTRUCTION, Schema

Side = Literal["left", "right"]
InstructionSource = Literal["stored", "file name", "none"]

# The recordings of 2025 (V1) drive to a bottle behind obstacles, those of 2026 (V5, V6) to a basket.
_BOTTLE = "Navigate around obstacles and reach the front of the beverage bottle on the {side}"
_BASKET = "Navigate to the gray basket on the {side}"
SENTENCES: dict[Schema, str] = {"v1": _BOTTLE, "v5": _BASKET, "v6": _BASKET}
_KOREAN_SIDES: dict[Side, tuple[str, ...]] = {"left": ("왼쪽", "좌측"), "right": ("오른쪽", "우측")}


class EpisodeWarning(UserWarning):
    """Something about an episode had to be assumed."""


def sentence(schema: Schema, side: Side) -> str:
    """The instruction that the lab gave in recordings of `schema` with the target on `side`."""
    return SENTENCES[schema].format(side=side)


def sides_in_name(path: Path) -> frozenset[Side]:
    """The sides that are words of the file name: `episode_20260715_173157_weak_left_left_curve.h5` -> {"left"}."""
    words = re.split(r"[^a-z0-9]+", path.stem.lower())
    sides: tuple[Side, Side] = ("left", "right")
    return frozenset(side for side in sides if side in words)


def sides_in_text(text: str) -> frozenset[Side]:
    """The sides that an English or Korean text names."""
    words = set(re.findall(r"[a-z0-9]+", text.lower()))
    return frozenset(
        side for side, korean in _KOREAN_SIDES.items() if side in words or any(word in text for word in korean)
    )


def read_stored_instruction(file: h5py.File, path: Path) -> str | None:
    """The text in the dataset or in the attribute of that name, or None where there is none or it is blank.

    Raises:
        EpisodeError: it is no text, or there are several different texts.
    """
    found: tuple[str, ...] = ()
    if has_link(file, INSTRUCTION):
        found += read_texts(require_dataset(file, INSTRUCTION, path), path)
    if INSTRUCTION in file.attrs:
        found += attribute_texts(read_attribute(file, INSTRUCTION), f"{path}: attribute {INSTRUCTION!r}")
    texts = {text.strip(" ") for text in found if text.strip()}
    if len(texts) > 1:
        raise EpisodeError(
            f"{path} holds {len(texts)} different instructions",
            got="; ".join(repr(text) for text in sorted(texts)[:3]),
            expected="one instruction for the whole episode",
            hint="split the episode where the instruction changes.",
        )
    return texts.pop() if texts else None


def assume_instruction(stored: str | None, path: Path, schema: Schema) -> tuple[str | None, InstructionSource]:
    """The instruction and where it comes from: stored, else the sentence for the one side in the file name, else none."""
    if stored is not None:
        return stored, "stored"
    sides = sides_in_name(path)
    if len(sides) == 1:
        return sentence(schema, next(iter(sides))), "file name"
    return None, "none"


def resolve_instruction(
    stored: str | None, path: Path, schema: Schema, *, stacklevel: int
) -> tuple[str | None, InstructionSource]:
    """As `assume_instruction`; warns with EpisodeWarning unless it is stored.

    Args:
        stacklevel: as for `warnings.warn`, counted from the caller of this function.
    """
    text, source = assume_instruction(stored, path, schema)
    if source == "file name":
        message = f"{path}: no instruction is stored; assuming {text!r} from the file name"
        warnings.warn(message, EpisodeWarning, stacklevel=stacklevel + 1)
    elif source == "none":
        why = "names both left and right" if sides_in_name(path) else "names no side"
        message = f"{path}: no instruction is stored and the file name {why}; the episode has no instruction"
        warnings.warn(message, EpisodeWarning, stacklevel=stacklevel + 1)
    return text, source
