"""fp16 builds: which stages and operations are fp32 all the same, and what manifest and report say about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from bundle.manifest import Manifest
from bundle.recording import Recording
from export import plan
from export.parity import LIMITS
from export.pipeline import BuildConfig
from export.weights import STAGES
from runtime.instruction import load_embedding, prompt_tensors
from tests.checkpoints import rewrite
from tests.export.builds import assert_complete, change, precisions, quietly, report, reused, weight_files
from tests.export.conftest import Built
from train.synthetic import SyntheticFiles, SyntheticOptions


def test_fp16_stages_that_cost_nothing_are_promoted_until_half_the_limit_is_left(built: Built) -> None:
    bundle = built(SyntheticOptions(), precision="fp16")
    manifest = assert_complete(bundle)
    assert manifest.precision == "fp16"
    assert manifest.parity.verdict == "PASS"
    assert manifest.parity.action_max_error <= LIMITS["fp16"].action_error_pass / 2
    assert precisions(bundle)["action_head"] == "fp32"
    assert precisions(bundle)["language"] == "fp32"
    log = (bundle / "reports" / "build.log").read_text()
    assert "with language in fp16" in log
    assert "so it is promoted" in log
    # No file of the rejected form is left.
    assert {name.split(".")[1] for name in manifest.files if name.startswith("language")} == {"fp32"}


def test_without_promotion_stages_stay_fp16(built: Built) -> None:
    bundle = built(SyntheticOptions(), precision="fp16", promote=False)
    manifest = assert_complete(bundle)
    assert precisions(bundle) == {"vision": "fp16", "language": "fp16", "action_head": "fp32"}
    assert manifest.parity.verdict in ("PASS", "WARN")
    assert manifest.parity.feature_cosine > LIMITS["fp16"].feature_cosine_pass
    # Rounding is seen, so the numbers are those of fp16.
    assert manifest.parity.action_max_error > 1e-4
    parity = report(bundle, "parity.json")
    assert parity["precision"] == "fp16"
    assert bool(parity["reasons"]) == (manifest.parity.verdict == "WARN")


def test_a_stage_for_which_fp32_is_not_free_stays_fp16(
    upstream: SyntheticFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_FREE_BYTES", 0)
    out = tmp_path / "policy.bundle"
    log = quietly(BuildConfig(checkpoint=upstream.checkpoint, out=out, precision="fp16"))
    assert "promoted" not in log
    assert precisions(out)["language"] == "fp16"


def test_promotion_takes_fp32_stages_from_the_old_bundle(bundle: BuildConfig) -> None:
    before = weight_files(bundle.target)
    quietly(change(bundle, precision="fp16", verify_frames=0))
    assert_complete(bundle.target)
    promoted = [stage for stage in STAGES if precisions(bundle.target)[stage] == "fp32"]
    assert "language" in promoted
    assert reused(bundle.target) == promoted
    for stage in promoted:
        assert weight_files(bundle.target)[stage] == before[stage]


# --- values that fp16 cannot hold -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Large:
    """Weights of a policy scaled up, where what follows undoes it; and the operations that must be fp32 because of it."""

    name: str
    stage: str
    scales: dict[str, float]
    widened: set[str]
    largest: tuple[float, float]


TEXT = "text_model.model.layers.1"
VISION = "vision_model.model.encoder.layers.1"
LARGE = (
    Large("the language FFN", "language", {f"{TEXT}.ffn.fc1": 3e4}, {"layers.1/fc1"}, (1e5, 1e6)),
    Large(
        "language values",
        "language",
        {"text_model.model.layers.0.self_attn.v_proj": 1e5},
        {"layers.0/qkv", "layers.0/MatMul_0", "layers.0/MatMul_1"},
        (1e5, 1e6),
    ),
    Large(
        "the vision FFN, fp16 between its products",
        "vision",
        {f"{VISION}.mlp.fc1": 5e4, f"{VISION}.mlp.fc2": 2e-5},
        {f"layers.1/{name}" for name in ("fc1", "Mul_0", "Sigmoid_0", "Mul_1", "fc2")},
        (1e5, 1e6),
    ),
)


def scaled(source: SyntheticFiles, target: Path, scales: dict[str, float]) -> Path:
    """Merged weights and biases scaled; keys that share a storage once."""

    def edit(content: dict[str, Any]) -> None:
        done = set()
        for name, tensor in content["state_dict"].items():
            for part, scale in scales.items():
                # A later bias is undone by nothing.
                if f".{part}." in name and ".lora_A." not in name and tensor.data_ptr() not in done:
                    if scale > 1 or not name.endswith("bias"):
                        tensor.mul_(scale)
                    done.add(tensor.data_ptr())

    return rewrite(source.checkpoint, target, edit)


def in_real_fp16(bundle: Path, stage: str) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """What a stage gives with arrays that really are fp16 at every edge, and the reference; for the last frame of each episode."""
    manifest, recording = Manifest.load(bundle), Recording.load(bundle)
    scale = np.float32(manifest.prompt.embed_scale)
    pairs = []
    for episode, steps in zip(recording.episodes, recording.steps, strict=True):
        graph, feeds, expected = (
            manifest.graph("vision"),
            {"frames": episode.frames[-1]},
            steps[-1].image_tokens * scale,
        )
        if stage == "language":
            prompt = prompt_tensors(
                bundle, manifest, load_embedding(bundle), manifest.prompt.buckets, token_ids=episode.token_ids
            )
            graph, expected = manifest.graph(stage, prompt.bucket), steps[-1].feature
            feeds = {"image_tokens": steps[-1].image_tokens[None] * scale, **vars(prompt)}
        with np.errstate(all="ignore"):
            (found,) = ReferenceEvaluator(onnx.load(bundle / graph.file)).run(None, feeds)
        pairs.append((np.asarray(found)[0], expected))
    return pairs


@pytest.mark.parametrize("large", LARGE, ids=lambda large: large.name)
def test_operations_that_leave_fp16s_range_are_computed_in_fp32(
    upstream: SyntheticFiles, tmp_path: Path, large: Large
) -> None:
    """Without it the first passes on a CPU and is NaN where fp16 is real."""
    path = scaled(upstream, tmp_path / "large.ckpt", large.scales)
    config = BuildConfig(
        checkpoint=path, base=upstream.base, out=tmp_path / "policy.bundle", precision="fp16", promote=False
    )
    log = quietly(config)
    pairs = in_real_fp16(config.target, large.stage)
    assert len(pairs) == 3  # both buckets
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, atol=2e-2)
    manifest = assert_complete(config.target)
    assert manifest.parity.verdict in ("PASS", "WARN")
    assert precisions(config.target)[large.stage] == "fp16"
    measured = report(config.target, "parity.json")["fp16"]
    assert set(measured) == {"vision", "language"}
    found = measured[large.stage]
    assert set(found["widened"]) == large.widened
    assert large.largest[0] < max(found["widened"].values()) < large.largest[1]
    assert found["largest"] < found["limit"] == 32752
    worst = max(found["widened"], key=lambda name: found["widened"][name])
    assert f"{large.stage}: {worst} reaches" in log
    assert "must be computed in fp32" in log
    assert f"{large.stage}: largest fp16 value {found['largest']:.3g} of 65504 ({found['operation']})" in log
    assert f"{large.stage}: in fp32, since it makes, reads or holds what fp16 cannot: {worst} (" in log


def test_the_margin_is_told_where_nothing_is_wrong(built: Built) -> None:
    bundle = built(SyntheticOptions(), precision="fp16", promote=False)
    measured = report(bundle, "parity.json")["fp16"]
    log = (bundle / "reports" / "build.log").read_text()
    for stage, least in (("vision", 255), ("language", 1)):
        assert least <= measured[stage]["largest"] < 1000
        assert measured[stage]["widened"] == {}
        assert f"{stage}: largest fp16 value {measured[stage]['largest']:.3g} of 65504" in log
    assert "must be computed in fp32" not in log
    assert report(built(SyntheticOptions()), "parity.json")["fp16"] == {}


def test_weights_that_fp16_cannot_hold_are_kept_in_fp32(upstream: SyntheticFiles, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["state_dict"][f"model.backbone.{TEXT}.ffn.fc1.base_layer.weight"][0, 0] = 70000.0

    path = rewrite(upstream.checkpoint, tmp_path / "wide.ckpt", edit)
    out = tmp_path / "policy.bundle"
    quietly(BuildConfig(checkpoint=path, base=upstream.base, out=out, precision="fp16", promote=False))
    assert assert_complete(out).parity.verdict in ("PASS", "WARN")
    for found, expected in in_real_fp16(out, "language"):
        np.testing.assert_allclose(found, expected, atol=2e-2)
    assert report(out, "parity.json")["fp16"]["language"]["widened"] == {"layers.1/fc1": pytest.approx(70000, rel=1e-3)}


def test_a_stage_that_was_linked_and_then_widened_is_this_builds_own(
    upstream: SyntheticFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle before had not seen the large values: its files stay as they are, and its records are not taken over."""
    path = scaled(upstream, tmp_path / "large.ckpt", LARGE[0].scales)
    config = BuildConfig(
        checkpoint=path, base=upstream.base, out=tmp_path / "policy.bundle", precision="fp16", promote=False
    )
    with monkeypatch.context() as patch:
        patch.setattr("export.fp16_range.LIMIT", 1e9)
        quietly(config)
    plain = Manifest.load(config.target).stages
    quietly(change(config, verify_frames=10))
    wide = assert_complete(config.target).stages
    assert reused(config.target) == ["vision", "action_head"]
    assert wide["language"].key != plain["language"].key
    assert {**wide, "language": None} == {**plain, "language": None}

    # The same operations give the same key, under which engines are kept.
    quietly(change(config, verify_frames=11))
    assert assert_complete(config.target).stages == wide


def test_a_stage_that_is_promoted_as_a_whole_has_no_range(upstream: SyntheticFiles, tmp_path: Path) -> None:
    path = scaled(upstream, tmp_path / "large.ckpt", LARGE[0].scales)
    out = tmp_path / "policy.bundle"
    log = quietly(BuildConfig(checkpoint=path, base=upstream.base, out=out, precision="fp16"))
    assert "must be computed in fp32" in log
    manifest = assert_complete(out)
    assert manifest.parity.verdict == "PASS"
    half = {stage for stage, precision in precisions(out).items() if precision == "fp16"}
    assert "language" not in half
    assert set(report(out, "parity.json")["fp16"]) == half
