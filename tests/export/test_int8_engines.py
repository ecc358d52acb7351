"""Engines of a real INT8 variant, for a GPU that is not there: TensorRT-RTX reads the Q/DQ graphs that calib writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bundle.manifest import FloatPrecision, Manifest
from calib.config import QuantizeConfig
from calib.pipeline import quantize
from export import engine_builder
from export.console import Reporter
from export.engine_options import EngineOptions
from tests.export.builds import QUICK
from tests.export.conftest import Built
from train.synthetic import SyntheticOptions


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_int8_is_built_for_a_gpu_that_is_not_there(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: FloatPrecision
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(
        "calib.search._SAME", 1e9
    )  # as much INT8 as there can be, whatever the clock says of tiny stages
    made = built(SyntheticOptions(), precision=precision, promote=False, verify_frames=QUICK)
    bundle = Path(shutil.copytree(made, tmp_path / "policy.bundle"))
    told = Manifest.load(bundle).prompt.instructions
    quantize(
        QuantizeConfig(
            bundle,
            allow_random=True,
            frames=2,
            max_action_error=10.0,
            instruction=told[0].text if told else "go left",
            backend="ort:cpu",
            keep_float=("action_head",),
            threads=1,
        )
    )
    view = Manifest.load(bundle).int8()
    assert {name: stage.precision for name, stage in view.stages.items()} == {
        "vision": "int8",
        "language": "int8",
        "action_head": "fp32",
    }
    outcome = engine_builder.build_engines(
        bundle, EngineOptions(tensorrt="rtx", target=("sm86",), precision="int8"), Reporter(1, quiet=True)
    )
    assert {name.split("/")[1] for name in outcome.built} == {"vision", "language.s88", "language.s128", "action_head"}
