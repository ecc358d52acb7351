"""A sample of scripts/try_hostile_checkpoints: no code runs, nothing hangs or grows, every refusal is typed, no damage is loaded."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import pytest

from tests.hostile_checkpoints import Case, adapter_folder, cases
from tests.hostile_run import load_case, run_case, sound_digest
from train.checkpoint import load
from train.synthetic import SyntheticFiles

# One in so many of each kind.
_EVERY = {
    "code": 30, "flip": 30, "cut": 8, "bomb": 20, "lie": 6, "weight": 27, "config": 30, "text": 13, "safetensors": 14, "place": 7,
    "adapter": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What code makes if it runs."""
    return tmp_path_factory.mktemp("marker") / "ran"


@pytest.fixture(scope="module")
def everything(upstream: SyntheticFiles, marker: Path) -> list[Case]:
    return list(cases(upstream, marker))


def test_there_are_hundreds_and_each_has_a_name_of_its_own(everything: list[Case]) -> None:
    names = [case.name for case in everything]
    assert len(names) == len(set(names)) >= 300
    assert {name.partition("/")[0] for name in names} == set(_EVERY)


def test_the_code_in_them_is_live(everything: list[Case], marker: Path, tmp_path: Path) -> None:
    """Without it, that nothing runs would say nothing."""
    found = {case.name: case for case in everything}
    for name in ("os.system", "builtins.eval", "by STACK_GLOBAL", "by INST", "by BUILD"):
        with found[f"code/{name} in bare"].make(tmp_path).open("rb") as file, contextlib.suppress(TypeError):
            pickle.load(file)  # noqa: S301 - it is to run
        assert marker.exists(), name
        marker.unlink()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_sample_of_them_is_refused_within_the_budget(
    everything: list[Case], marker: Path, upstream: SyntheticFiles, tmp_path: Path
) -> None:
    digest = sound_digest(upstream)
    sample = []
    for kind, every in _EVERY.items():
        sample += [case for case in everything if case.name.startswith(f"{kind}/")][::every]
    broken = []
    for index, case in enumerate(sample):
        folder = tmp_path / str(index)
        folder.mkdir()
        outcome = run_case(case, folder, upstream, digest, marker)
        faults = set(outcome.faults())
        if outcome.kind != "killed":  # how fast the machine is, is no matter of the code; what never ends is
            faults.discard("more than 10 s")
        broken += [f"{case.name}: {fault}; {outcome.said}" for fault in faults]
    assert not broken
    assert len(sample) >= 36


def test_what_is_sound_is_the_same(upstream: SyntheticFiles) -> None:
    case = Case("sound", lambda folder: upstream.checkpoint)
    assert load_case(case, upstream.checkpoint, sound_digest(upstream)) == ("same", "")


def test_the_adapters_would_be_read_if_they_were_whole(upstream: SyntheticFiles, tmp_path: Path) -> None:
    whole = adapter_folder(upstream, tmp_path, lambda config: None)
    assert load(whole, packing="upstream").raw.kind == "peft"
