"""fp16 builds: which stages are promoted to fp32 and when, and what the manifest says about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bundle.errors import ExportError
from export import plan
from export.parity import LIMITS
from export.pipeline import BuildConfig, build
from export.weights import STAGES
from tests.checkpoints import rewrite
from tests.export.builds import assert_complete, change, left_over, precisions, quietly, report, reused, weight_files
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


def test_weights_that_fp16_cannot_hold_stop_an_fp16_build(upstream: SyntheticFiles, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["state_dict"]["model.backbone.text_model.model.layers.0.ffn.fc2.base_layer.weight"][0, 0] = 1e6

    path = rewrite(upstream.checkpoint, tmp_path / "wide.ckpt", edit)
    out = tmp_path / "out" / "policy.bundle"
    with pytest.raises(ExportError, match="does not fit fp16") as caught:
        build(BuildConfig(checkpoint=path, base=upstream.base, out=out, precision="fp16"))
    assert "hint: build with --precision fp32." in str(caught.value)
    assert left_over(out.parent) == []
