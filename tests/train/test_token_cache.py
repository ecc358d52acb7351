from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from bundle.errors import StorageError
from tests.checkpoints import file_size_limit
from tests.train.runs import RunFiles
from train.fast_forward import pixels_of
from train.load_config import load_run_config
from train.run_setup import Gathered, gather
from train.token_cache import TokenCache
from train.trainable import build_policy


@pytest.fixture
def gathered(run_files: RunFiles, tmp_path: Path) -> Gathered:
    return gather(load_run_config(run_files.config(tmp_path / "run.json")))


def cache(gathered: Gathered, folder: Path, *, base: str = "a", norm: str = "clip") -> TokenCache:
    policy = build_policy(gathered.config, gathered.base, action_range=(-1.0, 1.0)).eval()
    return TokenCache(folder, policy, base_sha256=base, store=gathered.store, pixel_norm=norm)


def test_tokens_are_those_of_the_frames(gathered: Gathered, tmp_path: Path) -> None:
    episode = gathered.train[0]
    found = cache(gathered, tmp_path / "tokens")
    policy = build_policy(gathered.config, gathered.base, action_range=(-1.0, 1.0)).eval()
    frames = np.asarray(gathered.store.frames(episode))
    for mirrored, shown in ((False, frames), (True, frames[:, :, ::-1])):
        with torch.no_grad():
            expected = policy.image_tokens(pixels_of(shown, "clip", torch.device("cpu")))
        tokens = found.tokens(episode, mirrored=mirrored)
        assert isinstance(tokens, np.memmap)
        np.testing.assert_allclose(tokens, expected.numpy(), atol=1e-5)


def test_they_are_computed_once(gathered: Gathered, tmp_path: Path) -> None:
    folder, seen = tmp_path / "tokens", []
    cache(gathered, folder).prepare(gathered.train, [False, True], seen.append)
    assert seen == [len(episode) for episode in gathered.train for _ in range(2)]
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(times) == 2 * len(gathered.train)
    cache(gathered, folder).prepare(gathered.train, [False, True], seen.append)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


@pytest.mark.parametrize("changed", [{"base": "b"}, {"norm": "none"}])
def test_what_decides_them_is_in_their_name(gathered: Gathered, tmp_path: Path, changed: dict[str, str]) -> None:
    episode = gathered.train[0]
    cache(gathered, tmp_path / "tokens").tokens(episode, mirrored=False)
    cache(gathered, tmp_path / "tokens", **changed).tokens(episode, mirrored=False)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_a_resampler_behind_the_base_is_in_their_name(gathered: Gathered, tmp_path: Path) -> None:
    """Left as it starts, it is not trained, so tokens are cached; no hash of the base knows it."""
    episode, config = gathered.train[0], gathered.config
    model = replace(config.model, vision_resampler=True, freeze_resampler=True)
    seeds = (config.loop, replace(config.loop, seed=config.loop.seed + 1))
    others = [dataclasses.replace(gathered, config=replace(config, model=model, loop=loop)) for loop in seeds]
    for each in (gathered, *others):
        policy = build_policy(each.config, each.base, action_range=(-1.0, 1.0)).eval()
        shown = pixels_of(np.asarray(each.store.frames(episode)), "clip", torch.device("cpu"))
        with torch.no_grad():
            expected = policy.image_tokens(shown)
        tokens = cache(each, tmp_path / "tokens").tokens(episode, mirrored=False)
        np.testing.assert_allclose(tokens, expected.numpy(), atol=1e-5)


def test_a_damaged_file_is_made_again(gathered: Gathered, tmp_path: Path) -> None:
    episode = gathered.train[0]
    found = cache(gathered, tmp_path / "tokens")
    expected = np.array(found.tokens(episode, mirrored=False))
    path = next((tmp_path / "tokens").iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    np.testing.assert_array_equal(found.tokens(episode, mirrored=False), expected)


def test_a_full_disk_leaves_nothing(gathered: Gathered, tmp_path: Path) -> None:
    found = cache(gathered, tmp_path / "tokens")
    gathered.store.prepare(gathered.train)
    with file_size_limit(1000), pytest.raises(StorageError):
        found.tokens(gathered.train[0], mirrored=False)
    assert list((tmp_path / "tokens").iterdir()) == []
