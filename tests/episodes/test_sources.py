"""Files, folders and globs name episodes, each once and in natural order."""

from __future__ import annotations

from pathlib import Path

import pytest

from bundle.errors import EpisodeError
from episodes.lerobot import export_lerobot
from episodes.sources import find_sources


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("e10.h5", "e2.h5", "e1.HDF5", "notes.txt", "deep/e3.h5"):
        (tmp_path / name).touch()
    return tmp_path


def names(*arguments: object) -> list[str]:
    return [path.name for path in find_sources([str(argument) for argument in arguments])]


def test_a_folder(folder):
    assert names(folder) == ["e1.HDF5", "e2.h5", "e10.h5"]


def test_globs(folder):
    assert names(folder / "e*") == ["e1.HDF5", "e2.h5", "e10.h5"]
    assert names(folder / "*") == ["e3.h5", "e1.HDF5", "e2.h5", "e10.h5"]
    assert names(folder / "**" / "e3.h5") == ["e3.h5"]


def test_a_file_is_taken_whatever_it_is_called(folder):
    assert names(folder / "notes.txt") == ["notes.txt"]


def test_relative_to_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert names("*.h5") == ["e2.h5", "e10.h5"]
    assert find_sources(["e2.h5"]) == (Path("e2.h5"),)


def test_each_file_once(folder):
    (folder / "link.h5").symlink_to(folder / "e2.h5")
    assert names(folder / "e2.h5", folder / "*.h5", folder) == ["e1.HDF5", "e2.h5", "e10.h5"]


def test_a_link_that_leads_nowhere_is_not_passed_over(folder):
    """An episode on a disk that is not mounted must not be missing from a report without a word."""
    (folder / "e3.h5").symlink_to(folder / "gone" / "e3.h5")
    assert names(folder) == ["e1.HDF5", "e2.h5", "e3.h5", "e10.h5"]
    assert "e3.h5" in names(folder / "*.h5")


def test_brackets_in_an_existing_name_are_no_pattern(tmp_path):
    (tmp_path / "set[1]").mkdir()
    (tmp_path / "set[1]" / "e.h5").touch()
    assert names(tmp_path / "set[1]") == ["e.h5"]


@pytest.mark.parametrize(
    ("argument", "got", "hint"),
    [
        ("none.h5", "no such file or folder", "mounted"),
        ("none*.h5", "no such file or folder", "mounted"),
        ("empty", "nothing ending in .h5 or .hdf5", "mounted"),
        ("outer", "nothing ending in .h5 or .hdf5", "outer/**/*.h5"),
    ],
)
def test_nothing_matches(tmp_path, argument, got, hint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "e.h5").touch()
    with pytest.raises(EpisodeError, match="no episodes match") as caught:
        find_sources([str(tmp_path / argument)])
    assert caught.value.got == got
    assert hint in caught.value.hint


def test_flight_recordings_are_told_apart_from_nothing(tmp_path):
    (tmp_path / "RUN.mcap").touch()
    with pytest.raises(EpisodeError, match="no episodes match") as caught:
        find_sources([str(tmp_path)])
    assert "from_recording.py" in caught.value.hint
    assert find_sources([str(tmp_path / "RUN.mcap")]) == (tmp_path / "RUN.mcap",)


def test_a_lerobot_dataset_stands_for_its_episodes(synthetic, tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    folder = tmp_path / "set"
    export_lerobot([synthetic("v1")] * 11, folder)
    assert names(folder) == [f"set#{index}" for index in range(11)]
    assert names(tmp_path / "s*") == names(folder)
    assert names(f"{folder}#9", f"{folder}#10") == ["set#9", "set#10"]
    assert len(names(folder, f"{folder}#3")) == 11
