"""What a second build does: nothing, or only what a change reaches."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

import pytest

from bundle.manifest import Manifest
from export.pipeline import BuildConfig
from export.weights import STAGES
from tests.bundles import add_int8
from tests.checkpoints import GO_LEFT, GO_RIGHT, configs, rewrite
from tests.export.builds import (
    QUICK,
    assert_complete,
    change,
    command_line,
    contents,
    edit_weight,
    precisions,
    quietly,
    reused,
    weight_files,
)

TEXT_LORA = "backbone.text_model.model.layers.1.ffn.fc1.lora_B.default.weight"

WITHOUT_TORCH = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "peft", "onnx", "onnxruntime", "safetensors"}:
            raise ModuleNotFoundError(f"blocked by the test: {name}", name=name)

sys.meta_path.insert(0, Blocker())
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_the_same_build_again_does_nothing_and_needs_no_torch(bundle: BuildConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.target.rglob("*")}
    inode = bundle.target.stat().st_ino
    start = time.monotonic()
    done = command_line(bundle.checkpoint, "--out", bundle.target, "--verify-frames", QUICK, program=WITHOUT_TORCH)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{bundle.target}\n"
    assert (
        f"{bundle.target} is up to date: same checkpoint, same options; verified PASS. --force rebuilds it."
        in done.stderr
    )
    assert seconds < 5
    assert {path: path.stat().st_mtime_ns for path in bundle.target.rglob("*")} == before
    assert bundle.target.stat().st_ino == inode


def test_without_torch_a_build_that_has_work_to_do_fails(bundle: BuildConfig) -> None:
    """The blocker blocks: the test above would have noticed an import."""
    done = command_line(bundle.checkpoint, "--out", bundle.target, "--force", program=WITHOUT_TORCH)
    assert done.returncode == 1
    assert "blocked by the test: " in done.stderr


def test_a_touched_checkpoint_is_read_again_and_its_stages_are_linked(bundle: BuildConfig) -> None:
    before = weight_files(bundle.target)
    os.utime(bundle.checkpoint)
    log = quietly(bundle)
    assert "up to date" not in log
    assert log.count("reused") == len(STAGES)
    assert reused(bundle.target) == list(STAGES)
    assert weight_files(bundle.target) == before
    assert_complete(bundle.target)
    assert "up to date" in quietly(bundle)


@pytest.mark.parametrize(
    ("name", "rebuilt"),
    [
        (TEXT_LORA, "language"),
        ("backbone.vision_model.model.encoder.layers.0.mlp.fc1.lora_A.default.weight", "vision"),
        ("backbone.image_to_text_projection.latent_query", "vision"),
        ("act_head.actions.mlp.6.bias", "action_head"),
        ("action_token", None),
    ],
)
def test_only_what_a_change_reaches_is_rebuilt(bundle: BuildConfig, name: str, rebuilt: str | None) -> None:
    before, manifest = weight_files(bundle.target), Manifest.load(bundle.target)
    edit_weight(bundle.checkpoint, name)
    log = quietly(bundle)
    after = weight_files(bundle.target)
    kept = [stage for stage in STAGES if stage != rebuilt]
    assert reused(bundle.target) == kept
    for stage in STAGES:
        state = "reused" if stage in kept else "written"
        assert f"{stage}: fp32, {state}" in log
        assert (after[stage] == before[stage]) == (stage in kept)
        assert (after[stage][1] == before[stage][1]) == (stage in kept)
    new = assert_complete(bundle.target)
    assert new.source.checkpoint_sha256 != manifest.source.checkpoint_sha256
    if rebuilt is None:
        table = "token_embedding.npy"
        assert new.files[table] != manifest.files[table]


def test_another_scale_of_the_adapters_rebuilds_what_they_reach(bundle: BuildConfig) -> None:
    """alpha / r stands in the config, not in any tensor."""

    def edit(content: dict[str, Any]) -> None:
        configs(content)["train_setup"]["lora_alpha"] *= 2

    rewrite(bundle.checkpoint, bundle.checkpoint.with_suffix(".new"), edit).replace(bundle.checkpoint)
    quietly(bundle)
    assert reused(bundle.target) == ["action_head"]
    assert_complete(bundle.target)


def test_another_instruction_of_equal_length_rebuilds_no_stage(bundle: BuildConfig) -> None:
    quietly(change(bundle, instruction=(GO_LEFT,)))
    log = quietly(change(bundle, instruction=(GO_RIGHT,)))
    assert log.count("reused") == len(STAGES)
    assert Manifest.load(bundle.target).prompt.instructions[0].text == GO_RIGHT
    assert_complete(bundle.target)


def test_other_buckets_rebuild_the_language_stage(bundle: BuildConfig) -> None:
    quietly(change(bundle, max_prompt_tokens=100))
    assert reused(bundle.target) == ["vision", "action_head"]
    assert max(Manifest.load(bundle.target).prompt.buckets) >= 64 + 100
    assert_complete(bundle.target)


def test_another_precision_keeps_the_action_head(bundle: BuildConfig) -> None:
    before = weight_files(bundle.target)
    quietly(change(bundle, precision="fp16", promote=False))
    after = weight_files(bundle.target)
    assert reused(bundle.target) == ["action_head"]
    assert after["action_head"] == before["action_head"]
    for stage in ("vision", "language"):
        assert len(after[stage][1]) < 0.8 * len(before[stage][1])
    assert precisions(bundle.target) == {"vision": "fp16", "language": "fp16", "action_head": "fp32"}
    assert_complete(bundle.target)


def test_force_rebuilds_everything_to_the_same_bytes(bundle: BuildConfig) -> None:
    before = weight_files(bundle.target)
    log = quietly(change(bundle, force=True))
    assert log.count("written") == len(STAGES)
    assert reused(bundle.target) == []
    for stage, (inode, content) in weight_files(bundle.target).items():
        assert content == before[stage][1]
        assert inode != before[stage][0]


def test_a_rebuilt_bundle_has_no_int8_variant(bundle: BuildConfig) -> None:
    """It was made of the old weights. A build that has nothing to do leaves it where it is."""
    add_int8(bundle.target)
    said = "INT8 variant is not carried over"
    assert said not in quietly(bundle)
    assert Manifest.load(bundle.target).quantized is not None
    edit_weight(bundle.checkpoint, TEXT_LORA)
    assert said in quietly(bundle)
    manifest = Manifest.load(bundle.target)
    assert manifest.quantized is None
    assert not [name for name in contents(bundle.target) if "int8" in str(name)]
    assert said not in quietly(change(bundle, force=True))


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_a_damaged_file_of_the_old_bundle_is_not_reused(bundle: BuildConfig, damage: str) -> None:
    before = weight_files(bundle.target)
    path = bundle.target / Manifest.load(bundle.target).stages["language"].weights
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[5000] ^= 1
        path.write_bytes(content)
        os.utime(bundle.checkpoint)
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    log = quietly(bundle)
    assert "language: fp32, written" in log
    assert reused(bundle.target) == ["vision", "action_head"]
    assert_complete(bundle.target)
    assert {stage: data for stage, (_, data) in weight_files(bundle.target).items()} == {
        stage: data for stage, (_, data) in before.items()
    }


@pytest.mark.parametrize("name", ["manifest.json", "reports/build.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b""])
def test_an_unreadable_old_bundle_is_replaced(bundle: BuildConfig, name: str, content: bytes) -> None:
    (bundle.target / name).write_bytes(content)
    quietly(bundle)
    assert_complete(bundle.target)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.EMLINK])
def test_where_files_cannot_be_linked_they_are_copied(
    bundle: BuildConfig, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """FAT and exFAT, as on memory sticks, have no hard links; a target that is a link may lie on another disk."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    before = weight_files(bundle.target)
    edit_weight(bundle.checkpoint, TEXT_LORA)
    monkeypatch.setattr(os, "link", refuse)
    quietly(bundle)
    assert reused(bundle.target) == ["vision", "action_head"]
    assert_complete(bundle.target)
    for stage in ("vision", "action_head"):
        assert weight_files(bundle.target)[stage][1] == before[stage][1]
