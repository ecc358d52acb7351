"""What a person and a shell see: messages on stderr, the path alone on stdout, and exit codes that can be relied on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from export import build_engines
from export.console import Reporter, human_bytes
from export.pipeline import BuildConfig
from tests.checkpoints import GO_LEFT, GO_RIGHT
from tests.export.builds import QUICK, SCRIPT, command_line
from train.synthetic import SyntheticFiles


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> object:
    """The command line within this process: its exit code."""

    def main(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        return build_engines.main()

    return main


# --- numbers and reporters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_900, "999.9 kB"),
        (1_000_000, "1.0 MB"),
        (16 << 20, "16.8 MB"),
        (1_000_000_000, "1.00 GB"),
        (6_950_000_000, "6.95 GB"),
        (2_000_000_000_000, "2000.00 GB"),
    ],
)
def test_bytes_are_counted_as_disks_are_sold(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_a_reporter_numbers_its_steps_and_keeps_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(2)
    with reporter.step("Read"):
        reporter.result("4 files [in brackets] /tmp")
    with reporter.step("Write"):
        reporter.warn("nearly full")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "[1/2] Read",
        "      4 files [in brackets] /tmp",
        "[2/2] Write",
        "      warning: nearly full",
    ]
    lines = reporter.log.splitlines()
    assert [line.split("s ", 1)[1] for line in lines] == shown.err.splitlines()
    assert all(float(line.split("s ", 1)[0]) >= 0 for line in lines)
    assert set(reporter.seconds) == {"Read", "Write"}


def test_warnings_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """File names and numbers may hold brackets, which are no markup."""
    reporter = Reporter(1)
    reporter.warn("weights of policy[1].ckpt, shape [/3, 4]")
    assert "warning: weights of policy[1].ckpt, shape [/3, 4]" in capsys.readouterr().err


def test_a_quiet_reporter_prints_nothing_and_logs_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(1, quiet=True)
    with reporter.step("Read"), reporter.bytes_bar("hashing", 10) as bytes_done, reporter.count_bar("x", 2) as done:
        bytes_done(5)
        done()
        reporter.result("good")
        reporter.warn("bad")
        reporter.table(Table("a"))
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert [line.split("s ", 1)[1].strip() for line in reporter.log.splitlines()] == [
        "[1/1] Read",
        "good",
        "warning: bad",
    ]


def test_without_a_terminal_there_are_no_bars_and_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(1)
    with reporter.bytes_bar("hashing", 10) as advance:
        advance(10)
    reporter.warn("careful")
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "\r" not in shown


# --- the command line -------------------------------------------------------------------------------------------------------


def test_help_explains_every_option(run: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run("--help")  # type: ignore[operator]
    assert exit_.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "python export/build_engines.py CKPT --out BUNDLE" in shown
    assert "Exit codes: 0 built or up to date, 1 failed, 2 usage, 3 parity failed." in shown
    for name in vars(BuildConfig(checkpoint=Path("x"))):
        if name != "checkpoint":
            assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("a.ckpt", "b.ckpt"),
        ("a.ckpt", "--precision", "int4"),
        ("a.ckpt", "--packing", "mine"),
        ("a.ckpt", "--resize", "nearest"),
        ("a.ckpt", "--nonsense"),
        ("a.ckpt", "--max-prompt-tokens", "many"),
        ("a.ckpt", "--action-range", "1"),
    ],
)
def test_wrong_usage_is_exit_code_two(
    run: object, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)  # type: ignore[operator]
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "--help" in shown.err or "required" in shown.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("a.ckpt", "--max-prompt-tokens", "1"),
        ("a.ckpt", "--instruction", " "),
        ("a.ckpt", "--verify-frames", "-3"),
        ("a.ckpt", "--backend", "auto"),
    ],
)
def test_options_that_mean_nothing_are_an_error_without_a_traceback(
    run: object,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    upstream: SyntheticFiles,
    arguments: tuple[str, ...],
) -> None:
    try:
        code = run(upstream.checkpoint, *arguments[1:], "--out", tmp_path / "policy.bundle")  # type: ignore[operator]
    except SystemExit as exit_:
        code = exit_.code
    assert code in (1, 2)
    assert "hint: " in capsys.readouterr().err


def test_a_build_in_another_folder_prints_its_path_alone(
    upstream: SyntheticFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a script, from a folder that is not the repository, with relative paths and several instructions."""
    (tmp_path / "base").symlink_to(upstream.base)
    (tmp_path / "policy.ckpt").symlink_to(upstream.checkpoint)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = command_line(
        *("policy.ckpt", "--base", "base", "--instruction", GO_LEFT, "--instruction", GO_RIGHT),
        *("--verify-frames", QUICK),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "policy.bundle\n"
    for title in ("[1/5] Read checkpoint", "[2/5] Plan", "[3/5] Export", "[4/5] Verify", "[5/5] Publish"):
        assert title in done.stderr
    assert "\x1b" not in done.stderr
    manifest = (tmp_path / "policy.bundle" / "manifest.json").read_text()
    assert GO_LEFT in manifest
    assert GO_RIGHT in manifest


def test_the_switch_for_the_resampler_takes_all_its_forms(
    run: object, upstream: SyntheticFiles, tmp_path: Path
) -> None:
    """True, false, or not stated; as a flag like the other switches, or with its value."""
    seen = {}
    for form in ("--x-attn-causal", "--no-x-attn-causal", "--x-attn-causal True", "--x-attn-causal False", ""):
        reporter_log = tmp_path / "log"
        arguments = [*form.split(), "--dry-run", "--out", tmp_path / "policy.bundle"]
        with reporter_log.open("w") as file:
            saved, sys.stderr = sys.stderr, file
            try:
                assert run(upstream.checkpoint, *arguments) == 0  # type: ignore[operator]
            finally:
                sys.stderr = saved
        (line,) = [line for line in reporter_log.read_text().splitlines() if "x_attn_causal" in line]
        seen[form] = line.split("x_attn_causal ")[1].split(" (")[0], "stated" in line
    assert seen == {
        "--x-attn-causal": ("True", True),
        "--no-x-attn-causal": ("False", True),
        "--x-attn-causal True": ("True", True),
        "--x-attn-causal False": ("False", True),
        "": ("False", False),
    }


def test_an_interrupted_build_says_so(
    run: object, upstream: SyntheticFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_engines, "build", interrupted)
    assert run(upstream.checkpoint) == 1  # type: ignore[operator]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "interrupted; nothing was replaced, and finished engines are kept." in shown.err


def test_colours_are_only_for_terminals_and_no_color_is_respected(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "nothing.ckpt")]
    shown = {}
    for name, extra in (
        ("forced", {"FORCE_COLOR": "1"}),
        ("plain", {}),
        ("forbidden", {"FORCE_COLOR": "1", "NO_COLOR": "1"}),
    ):
        environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**environment, **extra})
        assert done.returncode == 1
        assert done.stdout == ""
        assert "CheckpointError" in done.stderr
        shown[name] = done.stderr
    assert "\x1b[1;31merror:" in shown["forced"]
    assert "\x1b" not in shown["plain"]
    assert "31m" not in shown["forbidden"]
