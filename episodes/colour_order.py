"""Suspects episodes whose red and blue are swapped, by comparing them with the others of the set.

V1 and V6 differ only in the colour order, and a file of one that is taken for the other reads without any error. Nothing in a single
file tells: a blue floor is possible. But recordings of one place agree in the colours of floor and background, so a file that
agrees with the others after swapping, and not before, is suspect.

This is a comparison, not a proof. The majority is taken for right, so a set that is wrong throughout looks fine; three files are the
fewest that can be compared; grey surroundings tell nothing; and a recording of another place may look swapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Confidence = Literal["low", "high"]
Bands = tuple[tuple[float, float], ...]

_FEWEST = 3
_FEWEST_FOR_HIGH = 5
_CLEAR_GREY_LEVELS = (
    4.0  # by which swapping must bring a file nearer to the others; below it compression and light decide
)
_CLEAR_RATIO = 1.5


@dataclass(frozen=True)
class ColourComparison:
    """One file against the median of the others, in grey levels (0-255).

    Attributes:
        as_read: mean distance of red and blue, band by band.
        swapped: the same with red and blue of this file exchanged.
        suspect: swapping brings it clearly nearer.
        confidence: "high" if at least four others were compared and the swapped file is as near to them as they are to each other;
            "low" may well be another place or light. Only meaningful for a suspect.
    """

    as_read: float
    swapped: float
    suspect: bool
    confidence: Confidence


def compare_colours(bands: Sequence[Bands | None]) -> list[ColourComparison | None]:
    """Compare each file's bands (see episodes/frame_scan.py) with those of the others; None where that is not possible.

    If more than half are suspect, the set is split and nobody can tell which part is wrong: then all of them stay suspect, and it
    is for the caller to say so (`is_split`).
    """
    known = [index for index, of_file in enumerate(bands) if of_file is not None]
    result: list[ColourComparison | None] = [None] * len(bands)
    if len(known) < _FEWEST:
        return result
    values = np.array([bands[index] for index in known])
    distances = np.array([_distances(values, index) for index in range(len(known))])
    for row, index in enumerate(known):
        as_read, swapped = distances[row].tolist()
        usual = float(np.median(np.delete(distances[:, 0], row)))
        fits = swapped <= 2 * usual + 1
        result[index] = ColourComparison(
            as_read=as_read,
            swapped=swapped,
            suspect=as_read - swapped > _CLEAR_GREY_LEVELS and as_read > _CLEAR_RATIO * swapped,
            confidence="high" if fits and len(known) >= _FEWEST_FOR_HIGH else "low",
        )
    return result


def is_split(comparisons: Sequence[ColourComparison | None]) -> bool:
    """True if so many are suspect that the majority is no measure."""
    judged = [comparison for comparison in comparisons if comparison is not None]
    return 2 * sum(comparison.suspect for comparison in judged) > len(judged)


def _distances(values: npt.NDArray[np.float64], row: int) -> tuple[float, float]:
    """Mean distance of file `row` of `values` [files, bands, red and blue] to the median of the others, as read and swapped."""
    others = np.median(np.delete(values, row, axis=0), axis=0)
    return float(np.abs(values[row] - others).mean()), float(np.abs(values[row, :, ::-1] - others).mean())
