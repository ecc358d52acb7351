"""Matplotlib axes that become SVG for a page that is light or dark, on a phone or on paper.

Colours are roles (ink, ours, limit ...) that become CSS variables of the page, text stays text, and every id is made unique, since all
figures of a page stand in one document. Knows nothing about what is drawn.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that nothing else uses; the page's style sheet says what they look like.
ROLES = {
    "ink": "#010101",
    "grid": "#010102",
    "ours": "#010103",
    "other": "#010104",
    "limit": "#010105",
    "soft": "#010106",
}
_WIDTH = 5.0  # inches: 360 units, as many as a phone has
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.edgecolor": ROLES["grid"],
    "axes.labelcolor": ROLES["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": ROLES["ink"],
    "xtick.color": ROLES["ink"],
    "ytick.color": ROLES["ink"],
    "grid.color": ROLES["grid"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10.0,
}


def available() -> bool:
    """True if there is something to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.1, columnspacing=1.2)


@contextmanager
def figure(name: str, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on; afterwards the list holds the SVG.

    Args:
        name: of the figure; unique in its page.
        height: inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    done: list[str] = []
    settings: Any = {**_STYLE, "svg.hashsalt": name}  # matplotlib types every key
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Metrics of the drawing font are only used to place things; the reader's font draws.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        drawn = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield drawn.add_subplot(), done
        buffer = io.StringIO()
        metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawn.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    done.append(_embedded(buffer.getvalue(), name))


def _embedded(svg: str, name: str) -> str:
    """The svg element alone, with ids of its own, colours of the page, and the width of its place."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    # A style element would be one of the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = svg.replace("<svg", '<svg stroke-linejoin="round"', 1)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for role, colour in ROLES.items():
        svg = svg.replace(colour, f"var(--{role})")
    return svg
