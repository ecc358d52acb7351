"""When a bundle is up to date: the same request, the same inputs, the same code - and nothing less."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bundle.errors import BundleError, ConfigError
from bundle.manifest import Manifest
from export import builder
from export import config as config_module
from export.config import BuildConfig, Input, code_sha256, is_up_to_date, request_sha256
from export.engine_options import EngineOptions
from tests.checkpoints import configs, read
from tests.export.builds import QUICK, assert_complete, change, quietly, report
from tests.export.conftest import MakeSynthetic
from train.synthetic import SyntheticFiles, SyntheticOptions

PLAIN = BuildConfig(checkpoint=Path("policy.ckpt"))
# Another value for every option that decides what is built.
OTHER: dict[str, Any] = {
    "checkpoint": Path("other.ckpt"),
    "precision": "fp16",
    "promote": False,
    "base": Path("base"),
    "config": Path("config.json"),
    "packing": "upstream",
    "x_attn_causal": False,
    "infer_from": Path("episode.h5"),
    "instruction": ("go",),
    "max_prompt_tokens": 65,
    "pad_prompt_to": 64,
    "prompt_template": "{instruction}",
    "tokenizer": Path("tokenizer.json"),
    "resize": "bilinear",
    "pixel_norm": "none",
    "action_range": (-1.0, 1.0),
    "action_names": ("linear_x",),
    "classes": ("F",),
    "class_speed": 1.0,
    "verify_frames": 1,
    "verify_episode": Path("episode.h5"),
    "backend": "ort:cuda",
}


# --- the request ----------------------------------------------------------------------------------------------------------


def test_every_option_is_part_of_the_request_or_meant_not_to_be() -> None:
    ignored = {"out": Path("elsewhere"), "force": True, "dry_run": True, "engines": EngineOptions(refit=True)}
    assert {item.name for item in fields(BuildConfig)} == OTHER.keys() | ignored.keys()
    plain = request_sha256(PLAIN)
    assert plain == request_sha256(BuildConfig(checkpoint=Path("policy.ckpt")))
    changed = {name: request_sha256(change(PLAIN, **{name: value})) for name, value in OTHER.items()}
    assert plain not in changed.values()
    assert len(set(changed.values())) == len(changed)
    for name, value in ignored.items():
        assert request_sha256(change(PLAIN, **{name: value})) == plain


def test_values_that_look_alike_are_not_the_same_request() -> None:
    requests = [
        change(PLAIN, instruction=("a", "b")),
        change(PLAIN, instruction=("a b",)),
        change(PLAIN, instruction=("b", "a")),
        change(PLAIN, action_names=("a", "b")),
        change(PLAIN, x_attn_causal=True),
        change(PLAIN, x_attn_causal=False),
        change(PLAIN, x_attn_causal=None),
    ]
    assert len({request_sha256(request) for request in requests}) == len(requests)


@pytest.mark.parametrize("folder", ["bundle", "export", "runtime", "train"])
def test_other_code_is_another_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Sources count by name and content; what is no source does not."""
    for name in ("bundle", "export", "runtime/backends", "train"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "code.py").write_text("x = 1\n")
    monkeypatch.setattr(config_module, "_ROOT", tmp_path)
    before = code_sha256()
    assert code_sha256() == before
    (tmp_path / folder / "notes.txt").write_text("nothing")
    (tmp_path / folder / "__pycache__").mkdir()
    (tmp_path / folder / "__pycache__" / "code.pyc").write_bytes(b"1")
    assert code_sha256() == before
    (tmp_path / folder / "new.py").write_text("")
    added = code_sha256()
    (tmp_path / folder / "new.py").rename(tmp_path / folder / "named.py")
    renamed = code_sha256()
    (tmp_path / folder / "named.py").write_text("x = 2\n")
    assert len({before, added, renamed, code_sha256()}) == 4
    assert code_sha256(["bundle/code.py"]) != code_sha256(["export/code.py"])


def test_the_code_of_this_checkout_is_what_is_hashed() -> None:
    assert code_sha256() == code_sha256()
    assert code_sha256(["export/stages.py"]) != code_sha256(["export/ops.py"])


# --- inputs ---------------------------------------------------------------------------------------------------------------


def test_an_input_is_its_path_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    known = Input.of(path)
    assert known == Input.of(path)
    assert known.bytes == 3
    monkeypatch.chdir(tmp_path)
    assert Input.of(Path("file")) == known
    os.utime(path, ns=(0, 123_456_789))
    assert Input.of(path).modified_ns == 123_456_789
    assert Input.of(path) != known
    shutil.copy2(path, tmp_path / "copy")
    assert Input.of(tmp_path / "copy") != Input.of(path)


def test_inputs_are_everything_that_was_read(bundle: BuildConfig, upstream: SyntheticFiles) -> None:
    recorded = {Path(item["path"]).name for item in report(bundle.target, "build.json")["inputs"]}
    assert recorded == {"policy.ckpt", "config.json", "tokenizer.json"}
    assert is_up_to_date(bundle)
    assert Path(report(bundle.target, "build.json")["inputs"][-1]["target"]).parent == upstream.base


@pytest.mark.parametrize(
    "touched", ["policy.ckpt", "base/config.json", "base/tokenizer.json", "base/model.safetensors", "stated.json"]
)
def test_a_touched_input_makes_a_bundle_out_of_date(synthetic: MakeSynthetic, tmp_path: Path, touched: str) -> None:
    """The base's weights count only where some of them are taken."""
    files = synthetic(SyntheticOptions())
    shutil.copyfile(files.checkpoint, tmp_path / "policy.ckpt")
    shutil.copytree(files.base, tmp_path / "base")
    (tmp_path / "stated.json").write_text(json.dumps(configs(read(files.checkpoint))))
    config = BuildConfig(
        checkpoint=tmp_path / "policy.ckpt",
        config=tmp_path / "stated.json",
        out=tmp_path / "policy.bundle",
        verify_frames=QUICK,
    )
    quietly(config)
    assert is_up_to_date(config)
    os.utime(tmp_path / touched)
    assert is_up_to_date(config) == (touched == "base/model.safetensors")
    (tmp_path / touched).unlink()
    assert is_up_to_date(config) == (touched == "base/model.safetensors")


def test_another_option_makes_a_bundle_out_of_date(bundle: BuildConfig) -> None:
    assert is_up_to_date(bundle)
    assert is_up_to_date(change(bundle, force=True, dry_run=True))
    assert not is_up_to_date(change(bundle, verify_frames=QUICK + 1))
    assert not is_up_to_date(change(bundle, out=bundle.target.with_name("other.bundle")))


Edit = Callable[[Path], object]


@pytest.mark.parametrize(
    "damage",
    [
        lambda bundle: shutil.rmtree(bundle),
        lambda bundle: (bundle / "reports" / "build.json").unlink(),
        lambda bundle: (bundle / "golden.npz").unlink(),
        lambda bundle: (bundle / "token_embedding.npy").write_bytes(b""),
        lambda bundle: (bundle / "reports" / "build.json").write_text("{}"),
    ],
    ids=["folder", "report", "golden step", "embedding", "report's content"],
)
def test_a_damaged_bundle_is_out_of_date_and_is_mended(bundle: BuildConfig, damage: Edit) -> None:
    damage(bundle.target)
    assert not is_up_to_date(bundle)
    quietly(bundle)
    assert_complete(bundle.target)


def test_without_its_manifest_a_folder_is_not_a_bundle_any_more(bundle: BuildConfig) -> None:
    (bundle.target / "manifest.json").unlink()
    assert not is_up_to_date(bundle)
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        quietly(bundle)


# --- what must not look up to date ------------------------------------------------------------------------------------------


def test_the_same_relative_path_in_another_folder_is_another_checkpoint(
    synthetic: MakeSynthetic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "policy.bundle"
    built_from = []
    for seed in (0, 1):
        files = synthetic(SyntheticOptions(seed=seed))
        monkeypatch.chdir(files.checkpoint.parent)
        quietly(BuildConfig(checkpoint=Path(files.checkpoint.name), out=out, verify_frames=QUICK))
        built_from.append(Manifest.load(out).source.checkpoint_sha256)
    assert len(set(built_from)) == 2


def test_a_link_that_points_to_another_checkpoint_is_another_input(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    """Lightning can keep last.ckpt as a link to the newest checkpoint."""
    link = tmp_path / "last.ckpt"
    config = BuildConfig(
        checkpoint=link,
        base=synthetic(SyntheticOptions()).base,
        out=tmp_path / "policy.bundle",
        verify_frames=QUICK,
    )
    built_from = []
    for seed in (0, 1):
        link.unlink(missing_ok=True)
        link.symlink_to(synthetic(SyntheticOptions(seed=seed)).checkpoint)
        quietly(config)
        built_from.append(Manifest.load(config.target).source.checkpoint_sha256)
    assert len(set(built_from)) == 2


def test_a_changed_parent_of_the_config_is_a_changed_input(upstream: SyntheticFiles, tmp_path: Path) -> None:
    settings = configs(read(upstream.checkpoint))
    (tmp_path / "child.json").write_text(json.dumps({"parent": "parent.json"}))
    config = BuildConfig(
        checkpoint=upstream.checkpoint,
        config=tmp_path / "child.json",
        out=tmp_path / "policy.bundle",
        verify_frames=QUICK,
    )
    windows = []
    for window in (8, 5):
        (tmp_path / "parent.json").write_text(json.dumps({**settings, "window_size": window}))
        quietly(config)
        windows.append(Manifest.load(config.target).dimensions.window)
    assert windows == [8, 5]


def test_a_tokenizer_that_appears_is_taken(synthetic: MakeSynthetic, tmp_path: Path) -> None:
    """The way to mend a bundle that cannot tokenise: put the file into the base and build again."""
    files = synthetic(SyntheticOptions())
    shutil.copytree(files.base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer.json"))
    config = BuildConfig(
        checkpoint=files.checkpoint, base=tmp_path / "base", out=tmp_path / "policy.bundle", verify_frames=QUICK
    )
    quietly(config)
    assert not (config.target / "tokenizer.json").exists()
    shutil.copyfile(files.base / "tokenizer.json", tmp_path / "base" / "tokenizer.json")
    quietly(config)
    assert (config.target / "tokenizer.json").exists()


def test_a_checkpoint_that_training_replaces_during_a_build_is_another_one(
    synthetic: MakeSynthetic, bundle: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle holds the file that was read, so the one that took its name is not in it yet."""
    real = builder.make_plan
    newer = synthetic(SyntheticOptions(seed=1)).checkpoint

    def plan_while_training_saves(*arguments: Any) -> Any:
        planned = real(*arguments)
        shutil.copyfile(newer, bundle.checkpoint.with_suffix(".new")).replace(bundle.checkpoint)
        return planned

    os.utime(bundle.checkpoint)
    with monkeypatch.context() as patched:
        patched.setattr(builder, "make_plan", plan_while_training_saves)
        quietly(bundle)
    before = Manifest.load(bundle.target).source.checkpoint_sha256
    quietly(bundle)
    assert Manifest.load(bundle.target).source.checkpoint_sha256 != before


@pytest.mark.parametrize("name", ["manifest.json", "reports/build.json"])
def test_text_that_is_not_unicode_is_damage(bundle: BuildConfig, name: str) -> None:
    (bundle.target / name).write_bytes(b'{"request": "\xff"}')
    assert not is_up_to_date(bundle)


# --- what a config refuses --------------------------------------------------------------------------------------------------


def test_strings_become_paths_and_instructions_are_stripped() -> None:
    config = BuildConfig(checkpoint="a/b.ckpt", base="c", instruction=("  go left ",))  # type: ignore[arg-type]
    assert (config.checkpoint, config.base) == (Path("a/b.ckpt"), Path("c"))
    assert config.instruction == ("go left",)
    assert config.target == Path("b.bundle")
    assert BuildConfig(checkpoint="a/b.ckpt", out="d/e").target == Path("d/e")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"pad_prompt_to": 1}, ("pad_prompt_to is not usable", "got:      1", "expected: 0, or 2 to 2048 tokens")),
        ({"max_prompt_tokens": 1}, ("max_prompt_tokens is too small", "got:      1", "expected: at least 2")),
        ({"precision": "int4"}, ("unknown precision", "got:      'int4'", "expected: fp32, fp16")),
        ({"packing": "none"}, ("unknown packing", "expected: upstream, fork_overwrite, auto")),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], texts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        change(PLAIN, **options)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"pixel_norm": "CLIP"}, {"resize": "nearest"}, {"verify_frames": -1}, {"backend": "auto"}]
)
def test_options_that_no_build_understands_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        change(PLAIN, **options)


def test_bundles_of_two_runs_have_two_names(tmp_path: Path) -> None:
    """Checkpoints are called `last` in every run of our trainer."""
    for run in ("first", "second"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / "run.json").write_text("{}")
        config = BuildConfig(checkpoint=tmp_path / run / "checkpoints" / "last.safetensors")
        assert config.target == Path(f"{run}-last.bundle")
    (tmp_path / "first" / "run.json").unlink()
    assert BuildConfig(checkpoint=tmp_path / "first" / "checkpoints" / "last.safetensors").target == Path("last.bundle")
