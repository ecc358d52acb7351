"""The baselines compute what they are called: the same model through every way, of the dimensions of the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

import torch

import bench.torch_baselines
from bench.torch_baselines import NotHereError, decision, dimensions
from export.pipeline import BuildConfig, build
from train.checkpoint import load
from train.synthetic import SyntheticFiles, SyntheticOptions, make_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SyntheticFiles:
    return make_checkpoint(tmp_path_factory.mktemp("files"), SyntheticOptions(layout="fork", head="velocities"))


@pytest.fixture(scope="module")
def bundle(files: SyntheticFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "tiny.bundle"
    return build(BuildConfig(checkpoint=files.checkpoint, out=out, packing="upstream", verify_frames=9))


def task(bundle: Path, **changed: Any) -> dict[str, Any]:
    usual = {
        "dtype": "float32",
        "how": "eager",
        "window": False,
        "folder": str(bundle),
        "checkpoint": None,
        "packing": "upstream",
        "tokens": 12,
        "threads": 1,
        "window_frames": 8,
        "chunk": 10,
        "hidden": 40,
        "layers": 4,
    }
    return usual | changed


def test_the_dimensions_are_those_of_the_checkpoint(files: SyntheticFiles, bundle: Path) -> None:
    found, expected = dimensions(bundle), load(files.checkpoint, packing="upstream").base.kosmos
    for part, names in (
        ("text_config", ("embed_dim", "layers", "attention_heads", "ffn_dim", "vocab_size")),
        (
            "vision_config",
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size"),
        ),
    ):
        for name in names:
            assert getattr(getattr(found, part), name) == getattr(getattr(expected, part), name), name
    assert found.latent_query_num == expected.latent_query_num


def test_a_plain_export_computes_what_pytorch_does(bundle: Path) -> None:
    eager: Any = decision(task(bundle))()
    exported: Any = decision(task(bundle, how="ort"))()
    assert np.isfinite(eager.numpy()).all()
    assert float(eager.abs().max()) > 1e-4
    np.testing.assert_allclose(exported[0], eager.numpy(), atol=1e-4)


def test_types_and_the_whole_window(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    forward = bench.torch_baselines._Forward.forward

    def watched(self: Any, pixels: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        batches.append(len(pixels))
        return forward(self, pixels, *rest)

    monkeypatch.setattr(bench.torch_baselines._Forward, "forward", watched)
    one: Any = decision(task(bundle, dtype="bfloat16"))()
    whole: Any = decision(task(bundle, window=True))()
    assert batches == [1, 8]
    assert (one.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    assert one.shape == whole.shape


def test_a_checkpoint_gives_its_own_weights(files: SyntheticFiles, bundle: Path) -> None:
    own: Any = decision(task(bundle, checkpoint=str(files.checkpoint)))()
    random: Any = decision(task(bundle))()
    assert own.shape == random.shape
    assert not torch.allclose(own, random)


def test_no_compiler_is_said(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotHereError, match="needs a C"):
        decision(task(bundle, how="compile"))
