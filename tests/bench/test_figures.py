"""bench/figures.py: pictures that can stand in one page, in any theme, without losing a spike."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import figures
from bench.results import Timing
from tests.bench.results_made import made_result

pytest.importorskip("matplotlib")
SVG = "{http://www.w3.org/2000/svg}"
RESULT = made_result()


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_it_is_an_element_with_real_text_and_colours_of_the_page() -> None:
    svg = figures.histogram(RESULT.sections["total"], 200.0, "one", of="steps")
    assert svg.startswith("<svg")
    assert svg.endswith("</svg>")
    assert {"ms", "steps", "deadline 200 ms"} <= set(texts(svg))
    assert "var(--ours)" in svg
    assert "var(--limit)" in svg
    assert not re.search(r"#[0-9a-fA-F]{6}", svg)
    assert "<style" not in svg
    assert "font-family" not in svg
    assert not {"width", "height"} & set(ElementTree.fromstring(svg).attrib)


def test_ids_are_of_the_figure_and_references_are_kept() -> None:
    drawn = [figures.timeline(RESULT.sections["total"], 200.0, name, x_label="step") for name in ("one", "two")]
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in drawn]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, own in zip(drawn, ids, strict=True):
        used = set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg))
        assert used
        assert used <= own


def test_same_input_same_picture() -> None:
    one, two = (figures.histogram(RESULT.sections["total"], 200.0, "a", of="steps") for _ in range(2))
    assert one == two


@pytest.mark.parametrize("deadline", [200.0, 5000.0])
def test_a_deadline_far_away_is_told_instead_of_drawn(deadline: float) -> None:
    shown = texts(figures.timeline(RESULT.sections["total"], deadline, "a", x_label="step"))
    assert ("deadline 5000 ms: beyond this picture" in shown) == (deadline > 1e3)
    # An axis up to the deadline would squeeze everything flat.
    numbers = [float(text) for text in shown if text.replace(".", "").isdigit()]
    assert max(numbers) <= 350


@pytest.mark.parametrize("samples", [[5.0], [5.0] * 50, [0.0, 0.0], [-0.1, 0.2]])
def test_few_and_equal_samples(samples: list[float]) -> None:
    timing = Timing.of(samples)
    for svg in (
        figures.histogram(timing, 200.0, "a", of="steps"),
        figures.timeline(timing, 200.0, "b", x_label="step", last=1.0),
        figures.stage_bars({"vision": timing}, {}, ["vision"], "c"),
        figures.driven(np.array(samples), np.array(samples), None, "d"),
    ):
        ElementTree.fromstring(svg)


def test_stages_without_a_plan_have_bars_alone() -> None:
    assert RESULT.plan is not None
    for floors, count in ((RESULT.plan.stages, 3), ({}, 1)):
        svg = figures.stage_bars(RESULT.sections, floors, ["vision", "language"], "a")
        assert len({"roofline floor", "expected", "measured, p50 (line to p95)"} & set(texts(svg))) == count


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=3000))
@settings(max_examples=30, deadline=None)
def test_thinning_keeps_extremes_and_order(values: list[float]) -> None:
    series = np.array(values)
    x, y = figures.thin(np.arange(len(series)), series)
    assert (np.diff(x) > 0).all()
    assert (series[x.astype(int)] == y).all()
    assert (y.min(), y.max()) == (series.min(), series.max())
    assert len(y) <= 1002


def test_a_single_spike_among_many_survives() -> None:
    series = np.ones(100_000)
    series[54_321] = 9.0
    assert 54_321 in figures.thin(np.arange(len(series)), series)[0]
