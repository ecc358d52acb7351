"""bench/report.py: one file that says everything, fetches nothing, and believes no foreign text."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import figures
from bench.report_writer import page, write_report
from bench.results import Baseline, Drive, Fact, Result, Verdict, read_result, write_result
from bundle.errors import ConfigError, StorageError
from tests.bench.results_made import made_result
from tests.html_document import Document

pytest.importorskip("jinja2")
SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "report.py"
RESULT = made_result()
EVIL = "<script>alert('1')</script>\"'><img src=x onerror=alert(1)> {{ 7 * 7 }} {% raw %} $\\frac{ --> \u202e \U0001f600 \u6f22"


def changed(result: Result, part: str, **changes: Any) -> Result:
    return msgspec.structs.replace(result, **{part: msgspec.structs.replace(getattr(result, part), **changes)})


def test_everything_is_said() -> None:
    text = Document(page(RESULT)).text
    assert text.index("MISS") < text.index("Latency of") + 200
    for word in (
        RESULT.verdict.line, *RESULT.verdict.reasons, "p99.9", "jitter", "engine", "action_head", "glue",
        "eager-fp16-window", "25.2 times as fast", "0.0391 to 0.0404", "out of memory: the model takes 6.7 GB",
        "of ticks had no command in time", "camera to command", "first tenth", "8.16 s", "3480 MB", "2.31 J", "VDD_IN",
        "Made-up Orin NX 16 GB, 25W , not calibrated", "compute", "linear_y", "RMSE", "PASS", "5eed5eed",
        "Navigate to the gray basket on the left", "720", "wall clock jumps, or sleep none",
    ):  # fmt: skip
        assert word.replace(" ,", ",") in text.replace(" ,", ","), word
    for name in (*RESULT.fingerprint.machine, *RESULT.fingerprint.software, *RESULT.fingerprint.before):
        assert name in text


def test_baselines_tell_ratios_before_milliseconds() -> None:
    html = page(RESULT)
    row = html[html.index("eager-fp16<") :]
    assert row.index("0.294") < row.index("0.288 to 0.301") < row.index("404")


def test_an_interval_around_one_is_no_difference() -> None:
    ours = RESULT.baselines[0]
    even = Baseline(name="even", about="", ours=ours.ours, theirs=ours.theirs, ratio=(0.98, 0.9, 1.1))
    slow = Baseline(name="slow", about="", ours=ours.ours, theirs=ours.theirs, ratio=(1.5, 1.4, 1.6))
    text = Document(page(msgspec.structs.replace(RESULT, baselines=(even, slow)))).text
    assert "no difference shown" in text
    assert "1.5 times as slow" in text


def test_nothing_is_fetched_and_nothing_runs() -> None:
    document = Document(page(RESULT))
    assert not {"script", "link", "img", "iframe", "object", "image", "a"} & set(document.tags)
    for tag, name, value in document.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href"):
            assert (value or "").startswith("#"), (tag, name, value)
        assert "http" not in (value or "") or name.startswith("xmlns"), (tag, name, value)
        assert not re.search(r"url\((?!#)", value or ""), (tag, value)
    assert "default-src 'none'" in page(RESULT)


def test_ids_are_unique_and_figures_have_words() -> None:
    document = Document(page(RESULT))
    ids = [value for _, name, value in document.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 50
    labels = [value for tag, name, value in document.attributes if name == "aria-label" and tag == "div"]
    pictures = [value for _, name, value in document.attributes if (name, value) == ("class", "picture")]
    assert len(pictures) == 7
    assert sum("Histogram" in (label or "") or "Line" in (label or "") for label in labels) == 6
    assert "lang" in {name for tag, name, _ in document.attributes if tag == "html"}


def test_foreign_text_is_text() -> None:
    drive = RESULT.drive
    assert drive is not None
    assert RESULT.plan is not None
    facts = {EVIL: Fact(value=EVIL, note=EVIL, warn=True), f"{EVIL}2": Fact(value=None, note=EVIL)}
    evil = msgspec.structs.replace(
        RESULT,
        partial=True,
        stopped=EVIL,
        bundle=msgspec.structs.replace(
            RESULT.bundle, name=EVIL, backend=EVIL, precision=EVIL, stage_precision={EVIL: EVIL}, packing=EVIL
        ),
        settings=msgspec.structs.replace(RESULT.settings, instruction=EVIL, frames=EVIL),
        fingerprint=msgspec.structs.replace(
            RESULT.fingerprint, machine=facts, software=facts, before=facts, after=facts
        ),
        baselines=(Baseline(name=EVIL, about=EVIL, skipped=EVIL),),
        sections={**RESULT.sections, EVIL: RESULT.sections["total"]},
        plan=msgspec.structs.replace(
            RESULT.plan, device=EVIL, note=EVIL, stages={EVIL: RESULT.plan.stages["vision"]}
        ),
        drive=Drive(
            episode=EVIL, instruction=EVIL, fps=None, axes=(EVIL, "b"), units=(EVIL, "m/s"),
            predicted=drive.predicted, recorded=drive.recorded,
        ),
        verdict=Verdict(outcome="invalid", line=EVIL, reasons=(EVIL,)),
    )  # fmt: skip
    html = page(evil)
    assert "<script" not in html
    assert "<img" not in html
    document = Document(html)
    assert set(document.tags) <= set(Document(page(RESULT)).tags)
    assert not [attribute for attribute in document.attributes if attribute[1].startswith("on")]
    assert "{{ 7 * 7 }}" in document.text


def test_red_facts_are_marked_by_more_than_colour_and_missing_ones_say_why() -> None:
    html = page(RESULT)
    assert re.search(r'<strong class="warn">⚠ 0\.31-0\.92 GHz</strong> <span class="note">not locked', html)
    assert re.search(r'<span class="missing">missing</span> <span class="note">no memory controller that tells', html)
    facts = {"cpu clocks": Fact(value=None, note="hidden", warn=True)}
    unknown = page(changed(RESULT, "fingerprint", machine=facts))
    assert re.search(r'<strong class="warn">⚠ unknown</strong> <span class="note">hidden', unknown)


@pytest.mark.parametrize(
    ("outcome", "word"), [("pass", "\u2713 PASS"), ("miss", "\u2717 MISS"), ("invalid", "! INVALID")]
)
def test_verdicts(outcome: Any, word: str) -> None:
    html = page(msgspec.structs.replace(RESULT, verdict=Verdict(outcome=outcome, line="So it is.", reasons=())))
    assert word in html
    assert f"<title>{outcome.upper()}" in html
    assert "PARTIAL" not in html
    assert "Mind, before" not in html


BARE = {
    "partial": True, "stopped": "interrupted", "loop": None, "soak": None, "memory": None, "energy": None, "baselines": (),
    "plan": None, "drive": None, "clock_jumps": (3.2, -1.0),
}  # fmt: skip


def test_a_run_that_stopped_early_says_so_loudly() -> None:
    document = Document(page(made_result(steps=3, **BARE)))
    assert document.text.count("PARTIAL") >= 2
    assert "stopped before its end: interrupted" in document.text
    assert document.text.index("PARTIAL", 30) < document.text.index("MISS", 30)
    assert "Not measured" in document.text
    assert "+3.20 s, -1.00 s" in document.text


@pytest.mark.parametrize("field", sorted(set(BARE) - {"partial", "stopped"}))
def test_every_part_may_be_absent(field: str) -> None:
    Document(page(made_result(**{field: BARE[field]})))


@pytest.mark.parametrize("lacking", ["predicted", "recorded"])
def test_a_drive_without_commands_is_left_out(lacking: str) -> None:
    assert "Predicted and recorded" not in page(changed(RESULT, "drive", **{lacking: ()}))


def test_without_matplotlib_there_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not figures.available()
    document = Document(page(RESULT))
    assert "svg" not in document.tags
    assert "matplotlib is not installed here (pip install 'jetvla[report]')" in document.text
    assert "No pictures" not in Document(page_with_matplotlib(monkeypatch)).text


def page_with_matplotlib(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.undo()
    return page(RESULT)


def test_without_jinja_there_is_a_word_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match="a report needs jinja2") as caught:
        page(RESULT)
    assert "jetvla[report]" in caught.value.hint


def test_size_of_a_long_run_is_bounded(tmp_path: Path) -> None:
    write_report(made_result(steps=4000), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 400_000


def test_a_folder_is_no_place_for_a_page(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        write_report(RESULT, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        write_report(RESULT, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_command_writes_beside_the_result(tmp_path: Path) -> None:
    write_result(tmp_path / "latency.json", RESULT)
    done = command(tmp_path / "latency.json")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'report.html'}\n"), done.stderr
    # Read back, so that what a file loses is lost in both.
    assert (tmp_path / "report.html").read_text() == page(read_result(tmp_path / "latency.json"))
    done = command(tmp_path / "latency.json", "--out", tmp_path / "new" / "page.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "page.html").exists()


@pytest.mark.parametrize("content", [None, "{}", '{"schema": 1}', "\x00"])
def test_the_command_refuses_what_is_no_result(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "latency.json").write_text(content)
    done = command(tmp_path / "latency.json")
    assert done.returncode == 2
    assert "error: ConfigError" in done.stderr
    assert "hint:" in done.stderr
    assert not (tmp_path / "report.html").exists()
