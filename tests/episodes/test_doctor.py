"""The command: what it prints, what it exits with, and that one bad file does not hide the others."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from rich.console import Console

from bundle.errors import EpisodeError
from episodes.doctor_view import histogram, show
from episodes.findings import Examination, Problem
from episodes.reader import open_episode
from episodes.set_examination import examine_set
from episodes.sources import find_sources
from episodes.synthetic import write_synthetic

ROOT = Path(__file__).resolve().parents[2]
SIZE = {"height": 48, "width": 64, "length": 8}


def doctor(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "episodes" / "doctor.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


@pytest.fixture
def good(tmp_path) -> Path:
    folder = tmp_path / "good"
    folder.mkdir()
    for seed in range(2):
        write_synthetic(folder, "v1", side="left" if seed else "right", seed=seed, **SIZE)
    return folder


@pytest.fixture
def mixed(good) -> Path:
    """Two good files, one swapped V6 among four, one with NaN, one truncated, one whose end is corrupt, one that hangs."""
    for seed in range(4):
        path = write_synthetic(good, "v6", side="left", seed=10 + seed, **SIZE)
    with h5py.File(path, "r+") as file:
        file["images"][:] = file["images"][:][..., ::-1]
    with h5py.File(write_synthetic(good, "v1", side="left", seed=20, **SIZE), "r+") as file:
        file["actions"][3, 0] = np.nan
    os.truncate(write_synthetic(good, "v1", side="left", seed=21, **SIZE), 3000)
    with h5py.File(write_synthetic(good, "v5_jpeg", side="right", seed=22, **SIZE), "r+") as file:
        file["observations/images"][7] = np.zeros(0, np.uint8)
    os.mkfifo(good / "pipe.h5")
    return good


def test_a_good_set(good):
    done = doctor(good)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(" ok ") == 2
    assert "episode_20251106_120001_1box_hori_left_core_medium.h5" in done.stdout
    assert "2 episodes, 2 usable: 16 frames" in done.stdout
    assert "advice" not in done.stdout


def test_a_mixed_set(mixed):
    done = doctor(mixed, mixed / "pipe.h5")
    assert done.returncode == 1
    assert done.stdout.count(" ERROR ") == 4
    for expected in (
        "action 3 is not finite",
        "truncated or damaged",
        "1 of 8 frames: frame 7 is corrupt",
        "is a named pipe",
        "red and blue look swapped",
        "10 episodes, 6 usable",
        "4 episodes\n  warning: no instruction is stored",
    ):
        assert expected in done.stdout, expected
    assert done.stdout.count("swap?") == 1
    assert "…" not in done.stdout


def test_json(mixed):
    (mixed / "pipe.h5").unlink()
    done = doctor(mixed, "--json", "--jobs", 2)
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert result["set"]["episodes"] == len(result["episodes"]) == 9
    assert result["set"]["unusable"] == 3
    problems = {
        Path(one["path"]).name[8:23]: [problem["code"] for problem in one["problems"]] for one in result["episodes"]
    }
    assert problems["20251106_120000"] == []
    assert problems["20251106_120020"] == ["actions"]
    assert problems["20251106_120021"] == ["unreadable"]
    assert problems["20260407_120022"] == ["corrupt_frames"]
    assert problems["20260715_120013"] == ["instruction_assumed", "colour_order"]


def test_repair(mixed, tmp_path):
    (mixed / "pipe.h5").unlink()
    out = tmp_path / "new" / "repaired"
    done = doctor(mixed, "--repair", "--out", out, "--json")
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert len(result["repaired"]) == len(list(out.iterdir())) == 6
    assert [Path(file["path"]).name[8:23] for file in result["not_repaired"]] == [
        "20251106_120020",
        "20251106_120021",
        "20260407_120022",
    ]
    for path in out.iterdir():
        with open_episode(path) as episode:
            assert (episode.schema, episode.instruction_source) == ("v5", "stored")

    again = doctor(mixed, "--repair", "--out", out)
    assert again.returncode == 2
    assert "exists" in again.stderr

    more = doctor(mixed, "--repair", "--out", out, "--force", "--drop-corrupt")
    assert more.returncode == 1
    assert "7 frames, JPEG as stored, 1 unreadable frames at the end left out" in more.stdout
    assert more.stdout.count("not repaired: ") == 2
    assert len(list(out.iterdir())) == 7


def test_the_swapped_file_is_mended(mixed, tmp_path):
    (mixed / "pipe.h5").unlink()
    out = tmp_path / "out"
    swapped = mixed / "episode_20260715_120013_weak_left_left_curve.h5"
    assert doctor(swapped, "--repair", "--swap-colour", "--out", out).returncode == 0
    swapped.unlink()
    done = doctor(mixed / "*_weak_*.h5", out)
    assert done.returncode == 0
    assert "swapped" not in done.stdout


def test_lerobot(mixed, tmp_path):
    """Usable episodes go into a dataset, which the doctor then examines like files."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    (mixed / "pipe.h5").unlink()
    dataset, out = tmp_path / "dataset", tmp_path / "out"
    exported = doctor(mixed, "--export-lerobot", dataset)
    assert exported.returncode == 1
    assert f"exported: {dataset}, 6 episodes" in exported.stdout

    done = doctor(dataset, "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert [one["path"] for one in result["episodes"]] == [f"{dataset}#{index}" for index in range(6)]
    assert result["set"]["schemas"] == {"lerobot": 6}

    refused = doctor(dataset, "--repair", "--out", out)
    assert refused.returncode == 1
    assert refused.stdout.count("only HDF5 files are repaired") == 6

    both = doctor(mixed, "--repair", "--drop-corrupt", "--out", out, "--export-lerobot", tmp_path / "second")
    assert f"exported: {tmp_path / 'second'}, 7 episodes" in both.stdout

    again = doctor(mixed, "--export-lerobot", dataset)
    assert again.returncode == 1
    assert "exists" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.h5"], "no episodes match 'none.h5'"),
        ([".", "--repair"], "--repair without --out"),
        ([".", "--out", "x"], "--out without --repair"),
        ([".", "--swap-colour", "--force"], "--swap-colour, --force without --repair"),
        ([".", "--repair", "--out", "."], "would replace the original"),
        ([".", "--timeout-s", "0"], "out of range"),
        (["--nonsense"], "nonsense"),
        ([], "nothing to examine"),
    ],
)
def test_usage(good, arguments, said):
    done = doctor(*arguments, folder=good)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_a_narrow_terminal_shows_every_column():
    text = io.StringIO()
    told = Problem("colour_order", "warning", "red and blue look swapped", "look")
    one = Examination("e" * 60 + ".h5", 1, "v5", "jpeg", 120, 720, 1280, 30.0, None, "stored", problems=(told,))
    show([one], examine_set([one])[1], Console(file=text, width=80))
    table = text.getvalue().partition("\n\n")[0]
    assert max(len(line) for line in table.splitlines()) <= 80
    assert table.count("e") > 60
    for expected in ("v5 jpeg", "720x1280", "30.0", "stored", "swap?"):
        assert expected in table


def test_histogram():
    assert histogram([0, 1, 100, 50], ascii_only=False) == " ▁█▄"
    assert histogram([0, 1, 100, 50], ascii_only=True) == " .@="
    assert histogram([0, 0], ascii_only=False) == "  "
    assert histogram([], ascii_only=False) == ""


@pytest.mark.parametrize("argument", ["~nosuchuser/x*.h5", "a**b/*.h5", "no\0pe.h5"])
def test_arguments_that_are_no_paths_are_refused(argument: str):
    with pytest.raises(EpisodeError, match=r"neither a path nor a pattern|no episodes match"):
        find_sources([argument])


@pytest.mark.parametrize("seconds", ["nan", "inf", "0"])
def test_timeouts_that_are_no_times_are_refused(good, seconds: str):
    done = doctor(good, "--timeout-s", seconds)
    assert done.returncode in (1, 2)
    assert "out of range" in done.stderr
    assert "Traceback" not in done.stderr


def test_repairs_need_a_folder(good, tmp_path):
    (tmp_path / "file").touch()
    done = doctor(good, "--repair", "--out", tmp_path / "file")
    assert done.returncode == 1
    assert "cannot make the folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_modules_of_the_folder_that_one_stands_in_are_not_imported(good, tmp_path):
    (tmp_path / "numpy.py").write_text("raise SystemExit('not the real one')")
    assert doctor(good, folder=tmp_path).returncode == 0


def test_texts_that_hdf5_cannot_store_are_cleaned_in_the_copy(good, tmp_path):
    path = sorted(good.glob("*.h5"))[0]
    with h5py.File(path, "r+") as file:
        file.attrs["operator"] = np.bytes_(b"kim\0lee")
    done = doctor(path, "--repair", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.h5"))) == 1
