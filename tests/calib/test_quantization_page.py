"""calib/quantization_page.py: one file that says everything, fetches nothing, and believes no foreign text."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
import sys
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bundle.errors import ConfigError
from bundle.manifest import Action
from calib import figures
from calib.acceptance import Acceptance, Flips, Pair, Streamed, judge
from calib.outliers import OutlierRow
from calib.own_error import OwnError
from calib.pictures import worst_picture
from calib.quantization_page import BlockRow, Page, Point, check_page, render, sentence
from tests.html_document import Document

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<script>alert('1')</script>\"'><img src=x onerror=alert(1)> {{ 7 * 7 }} {% raw %} $\\frac{ --> \u202e \U0001f600 \u6f22 \x07"
ACTION = Action(
    head="velocities", names=("linear_x", "linear_y", "angular_z"), units=("m/s", "m/s", "rad/s"), normalized=True, minimum=-1.15,
    maximum=1.15, mu=None, class_names=(), class_values=(),
)  # fmt: skip


def made_acceptance(*, noise: float = 0.0015, action: Action = ACTION) -> Acceptance:
    rng = np.random.default_rng(4)
    streams = []
    for index in range(9):
        reference = np.tanh(
            np.cumsum(rng.normal(0, 0.35, (14, 1, len(action.names))), axis=0) + rng.normal(0, 0.1, (14, 10, 1))
        )
        candidate = reference + rng.normal(0, noise, reference.shape)
        name = f"episode_2025120{index}_120000_1box_hori_left_core_medium.h5"
        both = reference.astype(np.float32), candidate.astype(np.float32)
        streams.append(Streamed(name, 3 * index, "Navigate to the gray basket on the left", *both))
    return judge(streams, action, budget=0.01)


def scene(height: int = 270, width: int = 480) -> NDArray[np.uint8]:
    """A floor, a wall and a box, uint8 [height, width, 3]."""
    down, across = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    picture = np.where((down > 0.5)[..., None], (150, 132, 110), (196, 200, 204)) * (0.65 + 0.35 * down[..., None])
    picture[(abs(across - 0.35) < 0.06) & (abs(down - 0.52) < 0.14)] = (96, 98, 100)
    return (picture + np.random.default_rng(0).normal(0, 5, picture.shape)).clip(0, 255).astype(np.uint8)


def made_page(points: int = 24, **changes: Any) -> Page:
    rng = np.random.default_rng(2)
    found = made_acceptance()
    latency = np.sort(rng.uniform(255, 620, points))
    error = 0.11 * np.exp(-(latency - 255) / 95) * rng.lognormal(0.15, 0.5, points) + 4e-4
    front = [bool((error[: at + 1] <= error[at]).sum() == 1) for at in range(points)]
    kept = next((at for at in range(points) if error[at] <= 0.01), points - 1)
    labels = ["all INT8"] + [f"language.{at % 24}-{at % 24 + 3} and vision.{at % 7} in fp32" for at in range(1, points)]
    blocks = [f"{stage}.{at}" for stage in ("vision", "language") for at in range(24)]
    page = Page(
        title="gray-basket-left: INT8",
        bundle="gray-basket-left",
        variant="language in INT8 but 6-11, vision in fp32",
        acceptance=found,
        points=tuple(
            Point(labels[at], float(latency[at]), float(error[at]), chosen=at == kept, on_front=front[at]) for at in range(points)
        ),
        blocks=tuple(
            BlockRow(name, "fp32" if at in (30, 31, 47) else "int8", float(rng.exponential(0.002)) - 1e-4, float(rng.uniform(4, 12)))
            for at, name in enumerate(blocks)
        ),
        outliers=tuple(
            OutlierRow(f"language/layers.{at}/fc2", float(rng.uniform(40, 900)), 0.61, float(rng.uniform(60, 1400)), 7.2, 1771)
            for at in range(8)
        ),
        facts=(
            ("calibration frames", "64 of 38 episodes"), ("calibration id", "5eed5eed" * 8), ("backend", "ort:cpu"),
            ("machine", "made-up Orin NX 16 GB"), ("search", "812 s"), ("size", "3.14 GB, was 6.20 GB"),
        ),
        strata=(("left, +x, start, dark", 9), ("left, +x+y, middle, medium", 21), ("right, stop, end, bright", 3)),
        worst_pictures=tuple(
            (
                f"{each.episode}, frame {each.frame}, chunk step {each.step}: {each.column}",
                worst_picture(scene(), each.reference, each.candidate, each.names),
            )
            for each in found.worst
        ),
        floating_ms=1490.0,
    )  # fmt: skip
    return dataclasses.replace(page, **changes)


PAGE = made_page()


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_everything_is_said() -> None:
    text = Document(render(PAGE)).text
    assert text.index("PASS") < text.index("the robot does the same") < text.index("What was tried")
    for word in (
        PAGE.title, PAGE.bundle, PAGE.variant, sentence(PAGE), *(name for pair in PAGE.facts for name in pair),
        *(name for name, _ in PAGE.strata), *(caption for caption, _ in PAGE.worst_pictures),
        "of the time of floating point on ort:cpu", "ms, floating point on ort:cpu 1490",
    ):  # fmt: skip
        assert re.sub(r"\s+", " ", word) in text, word
    for point in PAGE.points:
        assert point.label in text
        assert f"{point.action_error:.3g}" in text
        assert f"{point.latency_ms:.1f}" in text
    for block in PAGE.blocks:
        assert f"{block.block} {block.precision} {block.error_alone:.3g} {block.latency_ms:+.3g}" in text
    for row in PAGE.outliers:
        assert row.site in text
        assert f"{row.peak:.3g} 0.61 " in text
    for axis in PAGE.acceptance.axes:
        for part in (axis.now, axis.chunk):
            low, high = part.interval
            assert f"{part.max:.5f} {part.mean:.5f} [{low:.5f}, {high:.5f}] {part.rmse:.5f}" in text
        assert f"{axis.bias:.5f} [{axis.bias_interval[0]:.5f}, {axis.bias_interval[1]:.5f}] 1.15" in text
    for worst in PAGE.acceptance.worst:
        assert f"{worst.episode} {worst.frame} {worst.step} {worst.column} {worst.error:.3g}" in text
        assert f"linear_x {worst.reference[0]:+.4f} → {worst.candidate[0]:+.4f} m/s" in text


def test_a_failure_says_why_before_anything_else() -> None:
    found = made_acceptance(noise=0.2)
    document = Document(render(dataclasses.replace(PAGE, acceptance=found)))
    assert found.verdict == "FAIL"
    assert "the robot does not do the same" in document.text
    assert len(found.reasons) > 2
    for reason in found.reasons:
        assert reason in document.text
        assert document.text.index(reason) < document.text.index("What was tried")
    assert "<title>FAIL: " in render(dataclasses.replace(PAGE, acceptance=found))
    assert ("td", "class", "warn") in document.attributes


def test_the_policys_own_error_gives_the_scale() -> None:
    own = (OwnError("linear_x", "m/s", 0.27), OwnError("linear_y", "m/s", 0.5))
    text = Document(render(dataclasses.replace(PAGE, own=own))).text
    assert "off what was recorded on these frames by 0.27 m/s in linear_x, 0.5 m/s in linear_y (RMSE" in re.sub(
        r"\s+", " ", text
    )
    assert "off what was recorded" not in Document(render(PAGE)).text


def test_made_up_pictures_judge_nothing() -> None:
    text = Document(render(dataclasses.replace(PAGE, judged=False, notes=("not judged at 88 slots",)))).text
    assert "PASS" not in text.replace("PASS up to", "")
    assert "NOT JUDGED" in text
    assert "what the robot would do is unknown" in text
    assert "the robot does the same" not in text
    assert "not judged at 88 slots" in text


def test_the_sentence() -> None:
    axis = PAGE.acceptance.axes[0]
    calm = msgspec.structs.replace(
        PAGE.acceptance, axes=(msgspec.structs.replace(axis, chunk=msgspec.structs.replace(axis.chunk, max=0.004)),)
    )
    page = dataclasses.replace(PAGE, acceptance=calm, floating_ms=None)
    assert sentence(page) == (
        "With the INT8 variant the robot does the same: the largest difference of any command is 0.004 m/s in linear_x, 0.3% of its "
        "largest; no changed decisions in 126 frames."
    )
    flips = Flips(
        frames=1, steps=4, of_frames=126, of_steps=1260, pairs=(Pair(reference="F", candidate="FL", frames=1, steps=4),)
    )
    page = dataclasses.replace(
        page, acceptance=msgspec.structs.replace(calm, class_flips=flips, gripper_flips=None, changed_frames=1)
    )
    assert "; 1 changed decision in 126 frames." in sentence(page)
    text = Document(render(page)).text
    assert "Classes: another class in 1 of 126 frames" in text
    assert "F FL 1 4" in text
    page = dataclasses.replace(page, acceptance=msgspec.structs.replace(calm, verdict="FAIL", action_error=math.nan))
    assert "not numbers" in sentence(page)
    assert "not a number" in Document(render(page)).text


def test_nothing_is_fetched_and_nothing_runs() -> None:
    html = render(PAGE)
    document = Document(html)
    assert not {"script", "link", "iframe", "object", "image", "a"} & set(document.tags)
    for tag, name, value in document.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href"):
            assert (value or "").startswith(("#", "data:image/jpeg;base64,")), (tag, name)
        assert "http" not in (value or "") or name.startswith("xmlns"), (tag, name, value)
        assert not re.search(r"url\((?!#)", value or ""), (tag, value)
    assert "default-src 'none'" in html
    ids = [value for _, name, value in document.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 10
    assert len(html) < 500_000


def test_foreign_text_is_text() -> None:
    action = msgspec.structs.replace(ACTION, names=(EVIL, "linear_y", "c"), units=(EVIL, "m/s", "rad/s"))
    found = made_acceptance(action=action)
    flips = Flips(
        frames=1, steps=1, of_frames=9, of_steps=9, pairs=(Pair(reference=EVIL, candidate=EVIL, frames=1, steps=1),)
    )
    found = msgspec.structs.replace(
        found,
        reasons=(EVIL,),
        class_flips=flips,
        worst=tuple(msgspec.structs.replace(each, episode=EVIL, instruction=EVIL, column=EVIL) for each in found.worst),
    )
    html = render(
        dataclasses.replace(
            PAGE, title=EVIL, bundle=EVIL, variant=EVIL, acceptance=found,
            points=(Point(EVIL, 3.0, 0.1, True, True), Point(EVIL, 4.0, 0.2, False, False)),
            blocks=(BlockRow(EVIL, EVIL, 0.1, 0.1), BlockRow("x<b>&", "int8", 0.1, 0.1)),
            outliers=(OutlierRow(EVIL, 1, 1, 1, 1, 1),), facts=((EVIL, EVIL),), strata=((EVIL, 1),),
            worst_pictures=((EVIL, PAGE.worst_pictures[0][1]),),
        )
    )  # fmt: skip
    assert "<script" not in html
    document = Document(html)
    assert set(document.tags) <= set(Document(render(PAGE)).tags) | {"ul", "li", "strong"}
    assert document.tags.count("img") == 1
    assert not [attribute for attribute in document.attributes if attribute[1].startswith("on")]
    assert "{{ 7 * 7 }}" in document.text
    assert "x<b>&" in document.text


def test_an_early_page_has_the_verdict_alone() -> None:
    bare = made_page(points=0, blocks=(), outliers=(), strata=(), worst_pictures=(), floating_ms=None)
    document = Document(render(bare))
    assert "PASS" in document.text
    assert "svg" not in document.tags


def test_without_matplotlib_there_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not figures.available()
    document = Document(render(PAGE))
    assert "svg" not in document.tags
    assert "matplotlib is not installed here" in document.text


def test_without_jinja_there_is_a_word_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match="a page needs jinja2"):
        check_page()


@pytest.mark.parametrize("points", [1, 2, 12, 40])
def test_numbers_of_the_front_are_drawn_and_none_covers_another(points: int) -> None:
    page = made_page(points)
    svg = figures.pareto(page.points, 0.01, "p", floating_ms=page.floating_ms)
    assert svg == figures.pareto(page.points, 0.01, "p", floating_ms=page.floating_ms)
    assert "floating point: 1490 ms" in texts(svg)
    placed = {}
    for element in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        style = element.get("style") or ""
        if re.search(r"\b9px", style) and (element.text or "").isdigit():
            turned = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", element.get("transform") or "")
            x, y = turned.groups() if turned else (element.get("x"), element.get("y"))
            placed[int(element.text or "")] = (float(x or "nan"), float(y or "nan"))
    assert {place for place, point in enumerate(page.points, 1) if point.on_front or point.chosen} <= set(placed)
    assert len(placed) >= 0.8 * points
    spots = np.array(list(placed.values()))
    apart = abs(spots[:, None] - spots[None])
    assert ((apart[..., 0] > 5) | (apart[..., 1] > 8) | np.eye(len(spots), dtype=bool)).all()


@pytest.mark.parametrize("error", [0.0, math.nan, math.inf, 1e-12])
def test_errors_without_a_place_on_a_log_scale(error: float) -> None:
    points = (Point("one", 3.0, error, False, False), Point("two", 3.0, 0.02, True, True))
    svg = figures.pareto(points, 0.01, "p", floating_ms=3.5)
    assert "floating point" in texts(svg)
    assert "nan" not in svg
    ElementTree.fromstring(figures.sensitivity((BlockRow("vision.0", "fp32", error, -0.1),), "s"))


def test_the_bars_are_the_largest() -> None:
    shown = set(texts(figures.sensitivity(PAGE.blocks, "s")))
    order = [row.block for row in sorted(PAGE.blocks, key=lambda row: -row.error_alone)]
    assert set(order[: figures.BARS]) <= shown
    assert not set(order[figures.BARS :]) & shown


def opened(picture: bytes) -> NDArray[np.int16]:
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB")).astype(np.int16)


def where(picture: NDArray[np.int16], colour: tuple[int, int, int]) -> tuple[float, float]:
    """Mean column and row of what has a colour, above the numbers."""
    rows, columns = np.nonzero((abs(picture[:270] - np.array(colour)) < 40).all(axis=-1))
    assert len(rows) > 20
    return float(columns.mean()), float(rows.mean())


def test_arrows_point_where_the_robot_goes() -> None:
    grey = np.full((720, 1280, 3), 60, np.uint8)
    blue, orange = (90, 175, 255), (255, 160, 60)
    names = ("linear_x", "linear_y")
    left = opened(worst_picture(grey, (1.0, 0.5), (0.5, -1.0), names))
    assert left.shape[1] == 480
    assert where(left, blue)[0] < 240 < where(left, orange)[0]
    assert where(left, blue)[1] < where(left, orange)[1]
    turned = opened(worst_picture(grey, (0.7,), (-0.7,), ("angular_z",)))
    assert where(turned, blue)[0] < 240 < where(turned, orange)[0]
    back = opened(worst_picture(grey, (1.0, 0.0), (-1.0, 0.0), names))
    assert where(back, blue)[1] < where(back, orange)[1]


@pytest.mark.parametrize("shape", [(224, 224), (1, 1), (900, 40), (8, 640)])
@pytest.mark.parametrize("values", [(0.0, 0.0, 0.0), (math.nan, math.inf, -math.inf), (1e-30, 1e9, 3.0)])
def test_any_frame_and_any_command_gives_a_picture(shape: tuple[int, int], values: tuple[float, ...]) -> None:
    picture = worst_picture(np.zeros((*shape, 3), np.uint8), values, (0.0, -1.0, 0.5), ("linear_x", "linear_y", EVIL))
    assert opened(picture).shape[1] == 480
    turned = worst_picture(np.zeros((*shape, 3), np.uint8), values, (0.0, 1.0, 1.0), ("a", "angular_z", "linear_x"))
    assert opened(turned).shape[1] == 480


def test_both_kinds_of_pictures_are_embedded() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, format="PNG")
    html = render(dataclasses.replace(PAGE, worst_pictures=(("one", buffer.getvalue()), PAGE.worst_pictures[0])))
    assert f'src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"' in html
    assert 'src="data:image/jpeg;base64,' in html
