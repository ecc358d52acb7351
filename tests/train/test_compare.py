"""The command: exit codes, what is printed, the picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bundle.errors import ConfigError
from tests.ledgers import digest, make_run
from train import ledger
from train.comparison import load_runs
from train.curves import draw_curves
from train.git_state import CodeFacts

ROOT = Path(__file__).resolve().parents[2]
RANK = {"model.lora.r": 64}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources may be edited while tests run."""
    code = CodeFacts(sources_sha256=digest("x"), commit=None, dirty=None, diff_sha256=None, versions={})
    monkeypatch.setattr(ledger, "code_facts", lambda: code)


def compare(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "train" / "compare.py"), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "120", "PYTHONIOENCODING": "utf-8"} | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def seeds(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / f"{name}{seed}", (0.9, best + seed / 100, 0.8), changes | {"loop.seed": seed})
        for name, best, changes in (("low", 0.1, {}), ("high", 0.3, RANK))
        for seed in range(2)
    ]


def test_an_effect(tmp_path: Path) -> None:
    seeds(tmp_path)

    done = compare("low0", "low1", "high0", "high1/run.json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "model.lora.r = 32 is better: val_loss 0.105" in done.stdout
    assert "once in 3 comparisons" in done.stdout
    assert done.stdout.count("hash ok") == 4
    assert "█▁▇" in done.stdout
    assert "2 of 3" in done.stdout
    assert "no factor: loop.seed" in done.stdout


def test_no_effect_is_attributed(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(
        tmp_path / "b", changes=RANK | {"data.window": 4}, end=lambda ledger: ledger.fail(ValueError("[red] x\ny"))
    )
    for path in (tmp_path / "b" / "checkpoints").iterdir():
        path.unlink()

    done = compare("a", "b", cwd=tmp_path)

    assert done.returncode == 3
    assert "No effect is attributed." in done.stdout
    assert "b is not finished: it failed (ValueError: [red] x)" in done.stdout
    assert "b has no checkpoint behind its number" in done.stdout
    assert "2 factors differ (data.window and model.lora.r)" in done.stdout
    assert "NO" in done.stdout
    assert "b, beside the point: checkpoints/last.safetensors does not exist" in done.stdout


def test_json(tmp_path: Path) -> None:
    seeds(tmp_path)

    done = compare("low0", "low1", "high0", "--json", cwd=tmp_path)
    result = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    assert done.returncode == 0
    assert result["verdict"] == ["one_run"]
    assert result["factors"] == ["model.lora.r"]
    assert [run["label"] for run in result["runs"]] == ["low0", "low1", "high0"]
    assert result["arms"][0]["mean"] == pytest.approx(0.105)
    assert result["scores"][2]["epoch"] == 2
    assert {entry["key"]: entry["values"] for entry in result["differences"]}["model.lora.r"] == ["32", "32", "64"]


def test_json_of_a_refusal(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", losses=(float("nan"),))

    done = compare("a", "b", "--json", cwd=tmp_path)
    result = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    assert done.returncode == 3
    assert result["verdict"] == "refused"
    assert {refusal["code"] for refusal in result["refusals"]} == {"no_metric", "checkpoint", "same_settings"}
    assert result["scores"][1]["value"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "nothing to compare"),
        (("a",), 2, "two or more runs"),
        (("a", "a/"), 2, "is named twice"),
        (("a", "b", "--plot", "x.jpg"), 2, ".png, .svg or .pdf"),
        (("a", "b", "--plot", "absent/x.png"), 2, "no such folder"),
        (("a", "b", "--unknown"), 2, "unknown"),
        (("a", "absent"), 1, "absent is not a run"),
        (("a", "b", "--metric", "x"), 1, "no run measured it"),
    ],
)
def test_refused_usage(tmp_path: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", changes=RANK)

    done = compare(*arguments, cwd=tmp_path)

    assert done.returncode == code
    assert words in done.stderr
    assert done.stdout == ""


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", changes=RANK)

    done = compare("a", "b", cwd=tmp_path, PYTHONIOENCODING="ascii")

    assert done.returncode == 0, done.stderr
    assert "#" in done.stdout


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make_run(tmp_path / "a", losses=(0.5, float("nan"), 0.01))
    make_run(tmp_path / "b", changes=RANK, losses=())
    make_run(tmp_path / "$c", extra=lambda epoch, loss: {})
    make_run(tmp_path / "_d", extra=lambda epoch, loss: {f"val_rmse_{axis}": loss for axis in "xyzw"})

    done = compare("a", "b", "$c", "_d", "--plot", "curves.png", cwd=tmp_path)

    assert done.returncode == 3, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert "curves: curves.png" in done.stderr


def test_pictures_show_every_run_and_axis(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folders = [make_run(tmp_path / name, changes={"model.lora.r": index}) for index, name in enumerate("abcdefghij")]

    draw_curves(load_runs(folders), tmp_path / "curves.svg")

    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert all(f"<!--  {name} -->" in text for name in "abcdefghij")
    assert "<!-- RMSE linear_x -->" in text


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = load_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b")])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(ConfigError, match=r"pip install 'jetvla\[report\]'"):
        draw_curves(runs, tmp_path / "x.png")

    assert not (tmp_path / "x.png").exists()
