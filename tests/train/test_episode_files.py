"""What `files` of a source means, and what is refused before any file is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bundle.errors import ConfigError
from train.episode_files import find_files
from train.run_config import SourceConfig


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def found(root: Path, *patterns: str) -> list[str]:
    files = find_files([SourceConfig(files=patterns)], root=root)
    return [path.relative_to(root).as_posix() for path, _ in files]


def test_digits_sort_as_numbers(tmp_path: Path) -> None:
    make(tmp_path, "ep_10.h5", "ep_2.h5", "ep_1.h5", "ep_1b.h5")
    assert found(tmp_path, "*.h5") == ["ep_1.h5", "ep_1b.h5", "ep_2.h5", "ep_10.h5"]


def test_files_folders_globs_and_absolute_paths(tmp_path: Path) -> None:
    make(tmp_path, "a/1.h5", "a/2.hdf5", "a/3.H5", "a/readme.txt", "a/deep/4.h5", "b/5.h5", "b/6.h5")
    assert found(tmp_path, "a") == ["a/1.h5", "a/2.hdf5", "a/3.H5"]
    assert found(tmp_path, "a/**/*.h5") == ["a/1.h5", "a/deep/4.h5"]
    assert found(tmp_path, "b/6.h5") == ["b/6.h5"]
    assert found(tmp_path, "[ab]/[15].h5") == ["a/1.h5", "b/5.h5"]
    assert found(tmp_path, f"{tmp_path}/b/*") == ["b/5.h5", "b/6.h5"]
    assert found(tmp_path, f"{tmp_path}/b") == ["b/5.h5", "b/6.h5"]


def test_paths_above_the_root(tmp_path: Path) -> None:
    make(tmp_path, "data/1.h5", "configs/run.toml")
    for pattern in ("../data", "../data/1.h5", "../data/*.h5"):
        files = find_files([SourceConfig(files=(pattern,))], root=tmp_path / "configs")
        assert [path.resolve() for path, _ in files] == [tmp_path / "data" / "1.h5"]


def test_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "home/1.h5")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for pattern in ("~/1.h5", "~/*.h5", "~"):
        files = find_files([SourceConfig(files=(pattern,))], root=tmp_path)
        assert [path for path, _ in files] == [tmp_path / "home" / "1.h5"]


def test_brackets_in_names_and_roots_are_not_patterns(tmp_path: Path) -> None:
    make(tmp_path, "set[1]/ep[a].h5")
    assert found(tmp_path / "set[1]", "ep[a].h5") == ["ep[a].h5"]
    assert found(tmp_path / "set[1]", "*.h5") == ["ep[a].h5"]


def test_patterns_of_one_source_may_overlap(tmp_path: Path) -> None:
    make(tmp_path, "1.h5", "2.h5")
    assert found(tmp_path, "2.h5", "*.h5", "./1.h5") == ["1.h5", "2.h5"]


def test_sources_keep_their_order_and_their_files(tmp_path: Path) -> None:
    make(tmp_path, "z/1.h5", "a/2.h5")
    sources = (SourceConfig(files=("z",), kind="sim"), SourceConfig(files=("a",)))
    files = find_files(sources, root=tmp_path)
    assert [(path.name, source.kind) for path, source in files] == [("1.h5", "sim"), ("2.h5", "real")]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("nothing/*.h5", "Relative paths start at the config's folder"),
        ("texts", "Relative paths start at"),
        ("missing.h5", "check the path and that the disk"),
        ("outer", r'pass "outer/\*\*/\*\.h5"'),
    ],
)
def test_a_pattern_without_episodes_is_named(tmp_path: Path, pattern: str, hint: str) -> None:
    make(tmp_path, "texts/readme.txt", "outer/inner/1.h5", "1.h5")
    with pytest.raises(ConfigError, match=rf"no episodes match '{pattern.replace('*', '[*]')}'(.|\n)*{hint}"):
        find_files([SourceConfig(files=("1.h5", pattern))], root=tmp_path)


def test_a_file_in_two_sources(tmp_path: Path) -> None:
    make(tmp_path, "1.h5", "2.h5")
    (tmp_path / "link.h5").symlink_to(tmp_path / "2.h5")
    sources = (SourceConfig(files=("1.h5",)), SourceConfig(files=("*.h5",)))
    with pytest.raises(ConfigError, match=r"1\.h5 belongs to two of data\.sources(.|\n)*sources 0 and 1"):
        find_files(sources, root=tmp_path)
    with pytest.raises(ConfigError, match=r"belongs to two"):
        find_files((SourceConfig(files=("2.h5",)), SourceConfig(files=("link.h5",))), root=tmp_path)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    make(tmp_path, "a/1.h5", "b/1.h5")
    with pytest.raises(ConfigError, match=r"two episodes are called 1\.h5(.|\n)*a and .*b"):
        find_files([SourceConfig(files=("*/1.h5",))], root=tmp_path)


def make_dataset(folder: Path, episodes: int, version: str = "v3.0") -> None:
    features = {"action": {"dtype": "float32", "shape": [2], "names": ["linear_x", "linear_y"]}}
    info = {"codebase_version": version, "fps": 6, "total_episodes": episodes, "features": features, "data_path": "x"}
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))


def test_a_lerobot_dataset_stands_for_its_episodes(tmp_path: Path) -> None:
    make_dataset(tmp_path / "sets" / "a", 11)
    make_dataset(tmp_path / "sets" / "b", 2)
    make(tmp_path, "sets/1.h5", "sets/a/meta/2.h5", "sets/a.h5")
    every = [f"sets/a#{number}" for number in range(11)]
    assert found(tmp_path, "sets/a") == every
    assert found(tmp_path, f"{tmp_path}/sets/a/") == every
    assert found(tmp_path, "sets/*") == ["sets/1.h5", *every, "sets/a.h5", "sets/b#0", "sets/b#1"]
    assert found(tmp_path, "sets/a#10") == ["sets/a#10"]
    assert found(tmp_path, "sets") == ["sets/1.h5", "sets/a.h5"]  # what a folder holds are files


def test_a_dataset_in_two_sources(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", 3)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert found(tmp_path, "a", "a#1") == ["a#0", "a#1", "a#2"]
    with pytest.raises(ConfigError, match=r"#0 belongs to two of data\.sources"):
        find_files((SourceConfig(files=("a",)), SourceConfig(files=("link",))), root=tmp_path)
    make_dataset(tmp_path / "other" / "a", 1)
    with pytest.raises(ConfigError, match="two episodes are called a#0"):
        found(tmp_path, "a", "other/a")


def test_a_dataset_that_cannot_be_opened(tmp_path: Path) -> None:
    make(tmp_path, "damaged/meta/info.json")
    make_dataset(tmp_path / "old", 3, version="v2.1")
    make_dataset(tmp_path / "empty", 0)
    for name, message in (("damaged", "is damaged"), ("old", "another version"), ("empty", "no episodes match")):
        with pytest.raises(ConfigError, match=message):
            found(tmp_path, name)
