"""What a validation measures, on instructions, tokenizers and numbers that are not the usual ones."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import train.validation
from bundle.errors import TrainingError
from tests.train.runs import RunFiles
from train.launch import launch
from train.ledger import RunRecord, read_run
from train.validation import _as_deployed

SHORT = {"loop.max_steps": 1, "loop.epochs": 1}


@pytest.fixture
def told(run_files: RunFiles, tmp_path: Path) -> Callable[..., RunRecord]:
    """A run of one step on the same episodes with another instruction."""

    def start(instruction: str | None, settings: dict[str, Any] | None = None) -> RunRecord:
        episodes = tmp_path / "episodes"
        shutil.copytree(run_files.episodes, episodes)
        if instruction is not None:
            for path in episodes.glob("*.h5"):
                with h5py.File(path, "r+") as file:
                    del file["language_instruction"]
                    file["language_instruction"] = np.array([instruction.encode()])
        changed = {**SHORT, "data.sources": [{"files": [str(episodes / "*.h5")]}], **(settings or {})}
        done = launch(run_files.config(tmp_path / "run.json", changed), console=Console(quiet=True))
        return read_run(done.folder)

    return start


def sensitivity(record: RunRecord) -> float:
    found = record.epochs[-1].value("instruction_sensitivity")
    assert found is not None
    return found


def test_an_instruction_that_names_no_side_is_said_backwards(told: Callable[..., RunRecord]) -> None:
    assert sensitivity(told("Navigate to the gray basket")) > 0


def test_words_that_a_tokenizer_does_not_tell_apart_are_no_defect_of_the_packing(
    told: Callable[..., RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer to which left and right are one unknown token."""
    import train.run_setup

    real = train.run_setup.tokenize
    monkeypatch.setattr(train.run_setup, "tokenize", lambda text, *rest: real(text.replace("right", "left"), *rest))
    assert sensitivity(told(None)) > 0


def test_a_prompt_of_one_word_cannot_be_said_otherwise(
    told: Callable[..., RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.run_setup

    monkeypatch.setattr(train.run_setup, "tokenize", lambda *_: [0, 9, 2])
    record = told("go", {"data.prompt_template": "{instruction}"})
    assert record.status == "finished"
    assert math.isnan(sensitivity(record))


def test_a_loss_that_is_not_a_number_is_called_so(
    told: Callable[..., RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train.validation.loss_terms

    def broken(*arguments: Any) -> dict[str, Tensor]:
        return {name: value * math.nan for name, value in real(*arguments).items()}

    monkeypatch.setattr(train.validation, "loss_terms", broken)
    with pytest.raises(TrainingError, match="the validation loss is not finite"):
        told(None)


def test_one_axis_that_only_turns(told: Callable[..., RunRecord]) -> None:
    record = told(None, {"data.actions": ["angular_z"], "data.action_range": [-1.0, 1.0]})
    assert record.epochs[-1].value("val_rmse_angular_z") is not None
    assert record.epochs[-1].value("val_direction_accuracy") is None


@pytest.mark.parametrize("length", [1, 3, 4, 7])
def test_every_frame_is_judged_once_with_the_history_it_has(length: int) -> None:
    """Entry (window, position) is the frame that it predicts for and the history it saw."""
    window = 4
    starts = range(max(length - window, 0) + 1)
    chunks = torch.tensor([[[start + at, at + 1] for at in range(window)] for start in starts])
    found = _as_deployed(chunks, length)
    assert found.tolist() == [[frame, min(frame + 1, window)] for frame in range(length)]
