"""Config files: both kinds, parents, overrides, and where their paths start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.errors import ConfigError
from tests.train.test_robovlms_config import fork_config
from train.load_config import load_run_config

LEAST = """
name = "run"
[base]
model = "kosmos"
[data]
sources = [{files = ["episodes/*.h5"]}]
"""


def write(path: Path, text: str | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


@pytest.fixture
def least(tmp_path: Path) -> Path:
    return write(tmp_path / "run.toml", LEAST)


def test_toml(least: Path) -> None:
    loaded = load_run_config(least)

    assert (loaded.config.name, loaded.config.base.model, loaded.root) == ("run", "kosmos", least.parent)
    assert loaded.files == (least.resolve(),)
    assert (loaded.notes.ignored, loaded.notes.assumed, loaded.notes.unknown) == ((), (), ())


def test_json_with_our_keys(tmp_path: Path, least: Path) -> None:
    values = load_run_config(least).config.as_dict()

    assert load_run_config(write(tmp_path / "run.json", values)).config == load_run_config(least).config


def test_a_parent_is_changed_by_its_child(tmp_path: Path) -> None:
    write(tmp_path / "a" / "base.toml", LEAST + '[model]\nhidden = 64\n[output]\nruns = "runs"\n[loop]\nepochs = 3\n')
    write(tmp_path / "a" / "b" / "middle.toml", 'parent = "../base.toml"\nname = "middle"\n[loop]\nbatch_size = 2\n')
    child = write(
        tmp_path / "c" / "child.toml", 'parent = "../a/b/middle.toml"\n[loop]\nepochs = 9\n[model.lora]\nr = 4\n'
    )

    loaded = load_run_config(child)

    loop, model = loaded.config.loop, loaded.config.model
    assert (loaded.config.name, loop.epochs, loop.batch_size, model.hidden, model.lora.r) == ("middle", 9, 2, 64, 4)
    assert [path.name for path in loaded.files] == ["child.toml", "middle.toml", "base.toml"]
    # Relative paths are those of the file that states them.
    assert (loaded.root / loaded.config.base.model).resolve() == tmp_path / "a" / "kosmos"
    assert (loaded.root / loaded.config.data.sources[0].files[0]).resolve() == tmp_path / "a" / "episodes" / "*.h5"
    assert (loaded.root / loaded.config.output.runs).resolve() == tmp_path / "a" / "runs"


def test_a_list_replaces_the_parents(tmp_path: Path, least: Path) -> None:
    child = write(tmp_path / "child.toml", 'parent = "run.toml"\n[data]\nsources = [{files = ["/other/*.h5"]}]\n')

    assert [source.files for source in load_run_config(child).config.data.sources] == [("/other/*.h5",)]


def test_circles_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", 'parent = "b.toml"\n')
    write(tmp_path / "b.toml", 'parent = "a.toml"\n')

    with pytest.raises(ConfigError, match=r"inherits from itself[\s\S]*a\.toml.*b\.toml"):
        load_run_config(tmp_path / "a.toml")


def test_robovlms_json(tmp_path: Path) -> None:
    path = write(tmp_path / "lab.json", fork_config(learnig_rate=3))

    loaded = load_run_config(path, ["loop.epochs=2", "base.weights="])

    assert (loaded.config.model.head, loaded.config.loop.epochs) == ("velocities", 2)
    assert loaded.notes.unknown == ("learnig_rate: did you mean learning_rate?",)
    assert loaded.files == (path.resolve(),)


def test_robovlms_json_with_a_parent_and_little_else(tmp_path: Path) -> None:
    write(tmp_path / "parent.json", fork_config())
    path = write(
        tmp_path / "child.json", {"parent": "/elsewhere/parent.json", "learning_rate": 1e-5, "exp_name": "child"}
    )

    loaded = load_run_config(path)

    assert (loaded.config.name, loaded.config.optimizer.learning_rate) == ("child", 1e-5)
    assert len(loaded.files) == 2


def test_our_config_over_a_robovlms_one(tmp_path: Path) -> None:
    write(tmp_path / "lab" / "lab.json", fork_config(model_load_path="old.pt"))
    ours = write(tmp_path / "ours.toml", 'parent = "lab/lab.json"\n[optimizer]\nclip_norm = 1.0\n')

    loaded = load_run_config(ours)

    assert (loaded.config.optimizer.clip_norm, loaded.config.base.weights) == (1.0, "lab/old.pt")
    assert any("gradients are not clipped" in text for text in loaded.notes.assumed)


def test_relative_paths_of_a_lab_are_found_above_its_configs(tmp_path: Path) -> None:
    (tmp_path / ".vlms" / "kosmos").mkdir(parents=True)
    (tmp_path / "episodes").mkdir()
    values = fork_config(
        vlm__pretrained_model_name_or_path=".vlms/kosmos", train_dataset__data_dir="episodes", model_load_path="no.pt"
    )
    loaded = load_run_config(write(tmp_path / "configs" / "december" / "lab.json", values))

    assert Path(loaded.config.base.model) == tmp_path / ".vlms" / "kosmos"
    assert Path(loaded.config.data.sources[0].files[0]) == tmp_path / "episodes" / "episode_20251*.h5"
    assert loaded.config.base.weights == "no.pt"
    assert f".vlms/kosmos was found in {tmp_path}" in loaded.notes.assumed


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("loop.epochs=3", "loop", "epochs", 3),
        ("optimizer.learning_rate=1e-4", "optimizer", "learning_rate", 1e-4),
        ("optimizer.learning_rate = 1", "optimizer", "learning_rate", 1.0),
        ("loop.precision=bf16", "loop", "precision", "bf16"),
        ('loop.precision="bf16"', "loop", "precision", "bf16"),
        ("data.action_range=[-1, 1]", "data", "action_range", (-1.0, 1.0)),
        ("data.action_range=auto", "data", "action_range", "auto"),
        ("data.actions=['angular_z']", "data", "actions", ("angular_z",)),
        ("output.tensorboard=false", "output", "tensorboard", False),
        ("output.runs=2025", "output", "runs", "2025"),
        ("output.runs=/a b/c=d", "output", "runs", "/a b/c=d"),
        ("data.fps=", "data", "fps", None),
        ("model.lora.r=4", "model", "lora", None),
    ],
)
def test_overrides(least: Path, override: str, section: str, key: str, expected: object) -> None:
    config = load_run_config(least, [override]).config

    if expected is not None or key == "fps":
        assert getattr(getattr(config, section), key) == expected
    else:
        assert config.model.lora.r == 4


@pytest.mark.parametrize("name", ["2025-11-14", "1e3", "true", "7", "left"])
def test_a_name_is_a_text_whatever_it_looks_like(least: Path, name: str) -> None:
    assert load_run_config(least, [f"name={name}"]).config.name == name


def test_later_overrides_win(least: Path) -> None:
    assert load_run_config(least, ["loop.epochs=3", "loop.epochs=4"]).config.loop.epochs == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.epoch=3", r"did you mean `loop\.epochs`"),
        ("lerning_rate=3", r"did you mean `optimizer\.learning_rate`"),
        ("loop.epochs.more=3", "nothing below"),
        ("loop.epochs", "is not usable[\\s\\S]*key=value"),
        ("=3", "is not usable[\\s\\S]*key=value"),
        ("loop.epochs=many", r"run\.toml with loop\.epochs=many: `loop\.epochs` is not usable"),
        ("loop.epochs=", r"`loop\.epochs` is not usable"),
        ("loop=3", "`loop` is not usable"),
        ("loop.epochs=1\nname='x'", r"`loop\.epochs` is not usable"),
    ],
)
def test_overrides_that_are_refused(least: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(least, [override])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"name = ", "is not TOML"),
        ("a.toml", b"\xff\xfe", "is not TOML"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"[1]", "is no training config"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.yaml", b"", r"expected: \.toml or \.json"),
        ("a.toml", b"parent = 3\n", "`parent` is not usable"),
        ("a.toml", b'parent = "gone.toml"\n', r"gone\.toml does not exist"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        load_run_config(tmp_path / name)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml does not exist"):
        load_run_config(tmp_path / "gone.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match="is not TOML"):
        load_run_config(tmp_path / "folder.toml")


@given(
    content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode), suffix=st.sampled_from([".toml", ".json"])
)
def test_any_bytes_are_refused_as_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)

    with pytest.raises(ConfigError):
        load_run_config(path)


@given(text=st.text(max_size=30))
def test_any_override_is_applied_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = write(tmp_path_factory.getbasetemp() / "fixed.toml", LEAST)

    try:
        config = load_run_config(path, [f"output.runs={text}"]).config
    except ConfigError:
        return
    assert isinstance(config.output.runs, str)
