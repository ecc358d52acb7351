"""Every window exactly once per epoch, over any number of processes; order and views are functions of seed and epoch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.run_config import AugmentConfig, LoopConfig
from train.sampling import Step, View, Window, epoch_plan, epoch_views, shard, steps_per_epoch
from train.windows import window_starts

NO_CHANGE = AugmentConfig()
ROOT = Path(__file__).resolve().parents[2]
loops = st.builds(
    LoopConfig,
    batch_size=st.integers(1, 5),
    accumulate=st.integers(1, 5),
    windows_per_episode=st.integers(1, 6),
    seed=st.integers(-5, 5),
)


def windows_of(plan: list[Step]) -> list[Window]:
    return [window for step in plan for batch in step for window in batch]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=6),
    loop=loops,
    window=st.integers(1, 9),
    epoch=st.integers(0, 3),
    world=st.integers(1, 4),
    mirror=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_window_once_over_all_processes(
    lengths: list[int], loop: LoopConfig, window: int, epoch: int, world: int, mirror: float
) -> None:
    plan = epoch_plan(lengths, loop, AugmentConfig(mirror=mirror, blur=1.0), window=window, epoch=epoch)

    seen: Counter[tuple[int, int]] = Counter()
    for step in plan:
        shares = [shard(step, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) * world < len(step) + world  # no more padding than needed
        seen.update((each.view.episode, each.start) for share in shares for batch in share for each in batch)
    expected = [(index, start) for index, length in enumerate(lengths) for start in window_starts(length, window)]
    assert seen == Counter(expected)
    assert len(plan) == steps_per_epoch(lengths, loop, window=window)

    batches = [batch for step in plan for batch in step]
    assert all(len(batch) == loop.batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= loop.batch_size
    assert all(len(step) == loop.accumulate for step in plan[:-1])
    assert 1 <= len(plan[-1]) <= loop.accumulate


@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=6), loop=loops)
def test_an_episode_has_one_view_in_an_epoch(lengths: list[int], loop: LoopConfig) -> None:
    augment = AugmentConfig(mirror=0.5, brightness=0.2, share=0.5)
    plan = epoch_plan(lengths, loop, augment, window=4, epoch=1)
    assert {each.view for each in windows_of(plan)} == set(epoch_views(len(lengths), loop.seed, augment, epoch=1))


@given(lengths=st.lists(st.integers(4, 25), min_size=1, max_size=5), together=st.integers(1, 6))
def test_runs_stay_together(lengths: list[int], together: int) -> None:
    loop = LoopConfig(windows_per_episode=together)
    found = [
        (each.view.episode, each.start) for each in windows_of(epoch_plan(lengths, loop, NO_CHANGE, window=4, epoch=0))
    ]
    for position, (episode, start) in enumerate(found):
        if start % together:
            assert found[position - 1] == (episode, start - 1)


def test_order_and_views_differ_between_epochs_and_seeds_and_are_the_same_again() -> None:
    augment = AugmentConfig(mirror=0.5, hue=0.1)

    def plan(seed: int, epoch: int) -> list[Step]:
        return epoch_plan([30, 30, 30], LoopConfig(seed=seed), augment, window=8, epoch=epoch)

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1)
    assert plan(0, 0) != plan(1, 0)
    starts = [each.start for each in windows_of(plan(0, 0))]
    assert starts != sorted(starts)
    draws = [view.draw for epoch in range(3) for view in epoch_views(3, 0, augment, epoch=epoch)]
    assert None not in draws
    assert len(set(draws)) == 9


def test_the_plan_is_the_same_in_another_process() -> None:
    program = """
import json
from train.run_config import AugmentConfig, LoopConfig
from train.sampling import epoch_plan
plan = epoch_plan([20, 3, 11], LoopConfig(batch_size=2, seed=3), AugmentConfig(mirror=0.5, crop=0.1), window=8, epoch=2)
print(json.dumps([[[(w.view.episode, w.view.mirrored, w.view.draw, w.start) for w in b] for b in s] for s in plan]))
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(json.loads(outputs[0])) == 2


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 25), (0.5, 50), (1.0, 100)])
def test_shares_are_kept_exactly_where_they_can_be(share: float, count: int) -> None:
    for epoch in range(3):
        views = epoch_views(100, 0, AugmentConfig(mirror=share, blur=1.0, share=share), epoch=epoch)
        assert sum(view.mirrored for view in views) == count
        assert sum(view.draw is not None for view in views) == count


def test_a_share_of_less_than_one_episode_is_kept_over_epochs() -> None:
    mirrored = [epoch_views(1, 0, AugmentConfig(mirror=0.25), epoch=epoch)[0].mirrored for epoch in range(400)]
    assert 70 <= sum(mirrored) <= 130


def test_without_strengths_nothing_is_drawn() -> None:
    assert epoch_views(3, 0, AugmentConfig(share=1.0), epoch=0) == tuple(View(i, False, None) for i in range(3))


def test_a_process_without_work_gets_empty_batches() -> None:
    a, b, c = ((Window(View(0, False, None), start),) for start in range(3))
    assert [shard((a, b, c), rank, 2) for rank in range(2)] == [(a, c), (b, ())]
    assert [shard((a,), rank, 3) for rank in range(3)] == [(a,), ((),), ((),)]
    with pytest.raises(ValueError, match="rank must be 0 to 1"):
        shard((a,), 2, 2)


def test_a_share_of_windows_is_told_to_stop() -> None:
    augment = AugmentConfig(mirror=0.5, stop=0.3, stop_words=("Stop", "Halt"))
    told = Counter(
        window.view.told and window.view.told.words
        for epoch in range(4)
        for window in windows_of(epoch_plan([60] * 10, LoopConfig(), augment, window=4, epoch=epoch))
    )
    total = sum(told.values())
    assert 0.25 < (told["Stop"] + told["Halt"]) / total < 0.35
    assert min(told["Stop"], told["Halt"]) > total // 10
    plan = epoch_plan([60] * 10, LoopConfig(), augment, window=4, epoch=1)
    assert plan == epoch_plan([60] * 10, LoopConfig(), augment, window=4, epoch=1)
    assert plan != epoch_plan([60] * 10, LoopConfig(), augment, window=4, epoch=2)
