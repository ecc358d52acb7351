"""The judgement of an INT8 variant as one HTML file: no network, no scripts, every foreign text escaped.

How it looks is calib/quantization_page.html.jinja's business. Without matplotlib the page has numbers but no diagrams.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib import figures
from calib.acceptance import Acceptance
from calib.figures import BlockRow, Point
from calib.outliers import OutlierRow
from calib.own_error import OwnError
from export.html_page import check_jinja2, fill

__all__ = ["BlockRow", "OutlierRow", "Page", "Point", "check_page", "render", "sentence"]

_PAGE = Path(__file__).with_name("quantization_page.html.jinja")


@dataclass(frozen=True)
class Page:
    """What stands on the page.

    Attributes:
        facts: (name, value): calibration frames, id, backend, machine, seconds, sizes.
        strata: (name, frames) of the calibration set.
        worst_pictures: (caption, PNG or JPEG) in the order of `acceptance.worst`.
        floating_ms: latency of the floating-point bundle on ONNX Runtime CPU, measured as the points were; None if it was not.
        backend: on which the points were measured.
        notes: what was left out, assumed or not looked at.
        judged: on recordings; made-up pictures say nothing about what the robot does.
        own: how far the floating-point policy is from the recordings.
    """

    title: str
    bundle: str
    variant: str
    acceptance: Acceptance
    points: tuple[Point, ...]
    blocks: tuple[BlockRow, ...]
    outliers: tuple[OutlierRow, ...]
    facts: tuple[tuple[str, str], ...]
    strata: tuple[tuple[str, int], ...]
    worst_pictures: tuple[tuple[str, bytes], ...]
    floating_ms: float | None = None
    backend: str = "ort:cpu"
    notes: tuple[str, ...] = ()
    judged: bool = True
    own: tuple[OwnError, ...] = ()

    @property
    def word(self) -> str:
        """The verdict."""
        return self.acceptance.verdict if self.judged else "NOT JUDGED"


def check_page() -> None:
    """Find out that no page can be made before hours of searching rather than after.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    check_jinja2("a page")


def render(page: Page) -> str:
    """The page as text.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    check_page()
    values = {
        "page": page,
        "found": page.acceptance,
        "sentence": sentence(page),
        "keys": _keys(page),
        "figures": _figures(page),
        "front": [(place, point) for place, point in _numbered(page) if point.on_front or point.chosen],
        "tried": _numbered(page),
        "blocks": sorted(page.blocks, key=lambda row: -row.error_alone),
        "outliers": sorted(page.outliers, key=lambda row: -row.ratio_before),
        "shown": figures.BARS,
        "photographs": [(caption, _data_uri(picture)) for caption, picture in page.worst_pictures],
    }
    return fill(_PAGE, values, {"number": _number, "ms": _ms, "share": _share, "physical": "{:.5f}".format})


def sentence(page: Page) -> str:
    """The verdict for somebody who has a robot."""
    found = page.acceptance
    if not page.judged:
        return (
            "Calibrated on made-up pictures: speed and memory are right, what the robot would do is unknown. "
            "It runs only when it is named."
        )
    if math.isnan(found.action_error):
        return "The INT8 variant gives commands that are not numbers."
    worst = max(found.axes, key=lambda axis: axis.chunk.max / (axis.largest or 1.0), default=None)
    parts = []
    if worst is not None:
        parts.append(
            f"the largest difference of any command is {_number(worst.chunk.max)} {worst.unit} in {worst.name}, "
            f"{_share(worst.chunk.max / worst.largest if worst.largest else 0.0)} of its largest"
        )
    changed = found.changed_frames
    parts.append(f"{changed or 'no'} changed decision{'' if changed == 1 else 's'} in {found.frames} frames")
    ratio = _ratio(page)
    if ratio is not None:
        parts.append(f"a step on {page.backend} takes {ratio:.2g} of the time of floating point on ort:cpu")
    does = "does the same" if found.verdict == "PASS" else "does not do the same"
    return f"With the INT8 variant the robot {does}: {'; '.join(parts)}."


def _ratio(page: Page) -> float | None:
    """Time of the chosen assignment over that of floating point."""
    chosen = next((point.latency_ms for point in page.points if point.chosen), None)
    return chosen / page.floating_ms if chosen is not None and page.floating_ms else None


def _keys(page: Page) -> list[tuple[str, str, str]]:
    """(label, number, unit) of what one looks for first."""
    found = page.acceptance
    chosen = next((point.latency_ms for point in page.points if point.chosen), None)
    keys = [("action error, largest", _number(found.action_error), f"of {found.budget:g}")]
    keys += [(f"{axis.name}, largest", _number(axis.chunk.max), axis.unit) for axis in found.axes]
    keys.append(("judged on", str(found.frames), f"frames of {found.episodes} episodes"))
    if chosen is not None:
        beside = f"ms, floating point on ort:cpu {_ms(page.floating_ms)}" if page.floating_ms else "ms"
        keys.append((f"step on {page.backend}", _ms(chosen), beside))
    return keys


def _figures(page: Page) -> dict[str, Any]:
    """Diagrams by name, as markup; none without matplotlib."""
    if not figures.available():
        return {}
    from markupsafe import Markup  # jinja2 brings it

    drawn = {}
    if page.points:
        budget = page.acceptance.budget
        drawn["pareto"] = figures.pareto(page.points, budget, "pareto", floating_ms=page.floating_ms)
    if page.blocks:
        drawn["sensitivity"] = figures.sensitivity(page.blocks, "sensitivity")
    # matplotlib escapes the names that are drawn.
    return {name: Markup(svg) for name, svg in drawn.items()}


def _numbered(page: Page) -> list[tuple[int, Point]]:
    """Points with their numbers in the diagram, the fastest first."""
    return sorted(enumerate(page.points, start=1), key=lambda each: each[1].latency_ms)


def _data_uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _number(value: float) -> str:
    """Three digits that matter."""
    return "not a number" if math.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 or value == 0 else "less than 0.1%"
