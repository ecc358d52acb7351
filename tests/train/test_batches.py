"""Batches hold each frame once and what should be predicted; workers change nothing but the speed."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from bundle.errors import EpisodeError, TrainingError
from episodes.actions import classify_actions
from tests.training_data import LEFT, RIGHT, episode, read, write_schema, write_v1
from train.action_classes import NINE
from train.augmentation import Augmenter, mirror_actions, mirror_frame, mirror_text
from train.batches import Batch, BatchStream, make_batch, validation_windows
from train.episode_set import TrainingEpisode
from train.frame_store import FrameStore
from train.inputs import instructions_of
from train.run_config import AugmentConfig, DataConfig, LoopConfig, SourceConfig
from train.sampling import View, Window, epoch_plan
from train.told import Told
from train.windows import action_chunks, normalize_actions

SIZE = 8
AUGMENT = AugmentConfig(mirror=0.5, brightness=0.3, hue=0.1, crop=0.2, share=0.7)
RANGE = (-1.0, 1.0)
RECORDED = View(0, mirrored=False, draw=None)


@dataclasses.dataclass(frozen=True)
class Set:
    """Episodes, their frames, and how a batch is made of them."""

    episodes: tuple[TrainingEpisode, ...]
    store: FrameStore
    data: DataConfig

    def batch(self, *windows: Window, augmenter: Augmenter | None = None, **options: Any) -> Batch:
        return make_batch(
            windows, self.episodes, self.store, self.data, augmenter, **{"action_range": RANGE, **options}
        )

    def stream(self, plan: list[tuple[Window, ...]], **options: Any) -> BatchStream:
        augmenter = Augmenter(AUGMENT)
        return BatchStream(plan, self.episodes, self.store, self.data, augmenter, action_range=RANGE, **options)


def make(folder: Path, *, window: int = 4, actions: tuple[str, ...] = ("linear_x", "linear_y")) -> Set:
    data = DataConfig(sources=(SourceConfig(files=("*.h5",)),), window=window, chunk=3, actions=actions)
    store = FrameStore(folder / "cache", size=SIZE, resize="bilinear")
    return Set(read(folder, actions=actions), store, data)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Set:
    """Three schemas of 6 to 9 frames, and an episode of 2."""
    folder = tmp_path_factory.mktemp("episodes")
    write_schema(folder, "v1", seed=0, length=6)
    write_schema(folder, "v5", seed=1, length=9)
    write_schema(folder, "v6", seed=2, length=7)
    write_v1(folder, "short.h5", length=2)
    return make(folder)


def by_hand(given: Set, window: Window, augmenter: Augmenter) -> Iterator[np.ndarray]:
    """The frames of a window, one by one."""
    frames = given.store.frames(given.episodes[window.view.episode])
    for number in range(window.start, window.start + given.data.window):
        frame = np.array(frames[min(number, len(frames) - 1)])
        frame = mirror_frame(frame) if window.view.mirrored else frame
        yield frame if window.view.draw is None else augmenter.apply(frame, window.view.draw)


def same(one: Batch, other: Batch) -> None:
    for field in dataclasses.fields(Batch):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if isinstance(first, np.ndarray):
            assert first.dtype == second.dtype
            assert_array_equal(first, second)
        else:
            assert first == second


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    loop=st.builds(
        LoopConfig,
        batch_size=st.integers(1, 6),
        windows_per_episode=st.integers(1, 5),
        accumulate=st.just(2),
        seed=st.integers(0, 9),
    )
)
def test_batches_are_what_their_windows_say(drawn: Set, loop: LoopConfig) -> None:
    augmenter = Augmenter(AUGMENT)
    lengths = [len(each) for each in drawn.episodes]
    for windows in (batch for step in epoch_plan(lengths, loop, AUGMENT, window=4, epoch=0) for batch in step):
        batch = drawn.batch(*windows, augmenter=augmenter)
        count, unique = len(windows), len(batch.frames)
        assert batch.frames.shape == (unique, SIZE, SIZE, 3)
        assert batch.frames.dtype == np.uint8
        assert batch.frame_of.shape == (count, 4)
        assert batch.view_of.shape == batch.frame_number.shape == batch.instruction_of.shape == (unique,)
        assert batch.actions.shape == batch.physical.shape == (count, 4, 3, 2)
        assert batch.mask.shape == batch.classes.shape == (count, 4, 3)
        assert {array.dtype for array in (batch.frame_of, batch.view_of, batch.frame_number, batch.classes)} == {
            np.dtype(np.int64)
        }
        pairs = [(batch.views[view], number) for view, number in zip(batch.view_of, batch.frame_number, strict=True)]
        assert len(set(pairs)) == unique
        assert set(batch.frame_of.ravel()) == set(range(unique))
        for row, window in enumerate(windows):
            source = drawn.episodes[window.view.episode]
            assert_array_equal(batch.frames[batch.frame_of[row]], list(by_hand(drawn, window, augmenter)))
            recorded = mirror_actions(source.actions, drawn.data.actions) if window.view.mirrored else source.actions
            targets, mask = action_chunks(recorded, window.start, 4, 3)
            assert_array_equal(batch.mask[row], mask)
            assert_array_equal(batch.physical[row], targets)
            assert_array_equal(batch.actions[row], normalize_actions(targets, *RANGE) * mask[..., None])
            assert_array_equal(batch.classes[row].ravel(), classify_actions(targets.reshape(-1, 2)))
            text = mirror_text(source.instruction) if window.view.mirrored else source.instruction
            words = {batch.instructions[batch.instruction_of[frame]] for frame in batch.frame_of[row]}
            assert words == {text}


def test_overlapping_windows_share_frames(drawn: Set) -> None:
    batch = drawn.batch(Window(RECORDED, 0), Window(RECORDED, 1), Window(RECORDED, 2))
    assert len(batch.frames) == 6
    assert_array_equal(batch.frame_of, [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]])
    assert_array_equal(batch.frame_number, range(6))
    assert batch.views == (RECORDED,)


def test_a_mirrored_window_is_another_one(drawn: Set) -> None:
    mirrored = View(0, mirrored=True, draw=None)
    batch = drawn.batch(Window(RECORDED, 1), Window(mirrored, 1))
    assert len(batch.frames) == 8
    assert batch.views == (RECORDED, mirrored)
    assert "left" in batch.instructions[0]
    assert batch.instructions[1] == batch.instructions[0].replace("left", "right")
    assert_array_equal(batch.frames[batch.frame_of[1]], batch.frames[batch.frame_of[0]][:, :, ::-1])
    assert_array_equal(batch.physical[1], batch.physical[0] * np.array([1, -1], np.float32))
    sideways = batch.classes[0] >= 5
    assert sideways.any()
    assert_array_equal(batch.classes[1][sideways], batch.classes[0][sideways] + 1)  # forward left, forward right


def test_a_short_episode_is_padded_at_its_end(drawn: Set) -> None:
    index = next(index for index, each in enumerate(drawn.episodes) if len(each) == 2)
    batch = drawn.batch(Window(View(index, mirrored=False, draw=None), 0))
    assert_array_equal(batch.frame_of, [[0, 1, 1, 1]])
    assert_array_equal(batch.mask[0], [[True, True, False], [True, False, False], [False] * 3, [False] * 3])
    assert not batch.actions[~batch.mask].any()
    assert not batch.physical[~batch.mask].any()
    assert not batch.classes[~batch.mask].any()


def test_masked_actions_are_zero_whatever_the_range(drawn: Set) -> None:
    batch = drawn.batch(Window(RECORDED, 2), action_range=(0.0, 2.0))
    assert (~batch.mask).any()
    assert not batch.actions[~batch.mask].any()
    assert batch.actions[batch.mask].min() == -1


def test_three_axes(tmp_path: Path) -> None:
    write_v1(tmp_path, "a.h5", length=5)
    given = make(tmp_path, actions=("linear_x", "linear_y", "angular_z"))
    batch = given.batch(Window(View(0, mirrored=True, draw=None), 0))
    assert batch.actions.shape == (1, 4, 3, 3)
    np.testing.assert_allclose(batch.physical[0, 1, 1], [0.2, 0.02, -0.002], rtol=1e-6)


def test_frames_are_left_out_on_request(drawn: Set) -> None:
    window = Window(View(0, mirrored=True, draw=None), 1)
    full, bare = drawn.batch(window), drawn.batch(window, with_frames=False)
    assert bare.frames.shape == (0, SIZE, SIZE, 3)
    same(dataclasses.replace(full, frames=bare.frames), bare)


def test_no_windows_give_something_to_compute_and_nothing_to_learn(drawn: Set) -> None:
    batch = drawn.batch()
    assert batch.frames.shape[0] == 1
    assert_array_equal(batch.frame_of, [[0, 0, 0, 0]])
    assert batch.instructions == (drawn.episodes[0].instruction,)
    assert not batch.mask.any()
    assert not batch.actions.any()


def test_a_drawn_view_needs_an_augmenter(drawn: Set) -> None:
    with pytest.raises(ValueError, match="no augmenter"):
        drawn.batch(Window(View(0, mirrored=False, draw=1), 0))


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (("linear_x", "linear_y"), [1.15, -1.15], 6),
        (("linear_y", "linear_x"), [1.15, 0.0], 3),
        (("linear_x",), [-1.15], 2),
        (("angular_z", "linear_x"), [1.15, 1.15], 1),
        (("angular_z",), [1.15], 0),
    ],
)
def test_classes_go_by_name(names: tuple[str, ...], values: list[float], expected: int) -> None:
    actions = np.array([[values, values]], np.float32)
    assert_array_equal(NINE.labels(actions, names), [[expected, expected]])


def test_validation_sees_every_window_as_recorded() -> None:
    episodes = [episode("a.h5", length=5, instruction=LEFT), episode("b.h5", length=2, instruction=RIGHT)]
    first, second = validation_windows(episodes, 4)
    assert first == (Window(RECORDED, 0), Window(RECORDED, 1))
    assert second == (Window(View(1, mirrored=False, draw=None), 0),)


# --- streams ----------------------------------------------------------------------------------------------------------------


def plan_of(given: Set) -> list[tuple[Window, ...]]:
    lengths = [len(each) for each in given.episodes]
    steps = epoch_plan(lengths, LoopConfig(batch_size=3, accumulate=2), AUGMENT, window=4, epoch=0)
    return [*(batch for step in steps for batch in step), ()]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(drawn: Set, workers: int) -> None:
    plan = plan_of(drawn)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    stream = drawn.stream(plan, workers=workers)
    assert len(stream) == len(plan)
    for _ in range(2):  # iterating again starts again
        found = list(stream)
        assert len(found) == len(plan)
        for windows, batch in zip(plan, found, strict=True):
            same(batch, drawn.batch(*windows, augmenter=Augmenter(AUGMENT)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_empty_plan(drawn: Set, workers: int) -> None:
    assert list(drawn.stream([], workers=workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_are_ours(tmp_path: Path, workers: int) -> None:
    write_v1(tmp_path, "a.h5", length=5)
    write_v1(tmp_path, "b.h5", length=5)
    given = make(tmp_path)
    given.store.prepare(given.episodes[:1])
    (tmp_path / "b.h5").unlink()
    plan = [(Window(View(index, mirrored=False, draw=None), 0),) for index in (0, 1)]
    stream = iter(given.stream(plan, workers=workers))
    next(stream)
    with pytest.raises(EpisodeError, match=r"episode file not found: .*b\.h5(.|\n)*hint: check the path"):
        next(stream)


def test_workers_end_when_iteration_does(drawn: Set) -> None:
    others = set(multiprocessing.active_children())
    for _ in drawn.stream(plan_of(drawn), workers=2):
        break
    assert set(multiprocessing.active_children()) <= others


class Dies:
    """An augmenter in whose hands a worker is killed."""

    def apply(self, frame: np.ndarray, draw: int) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        return frame


def test_a_worker_that_dies_ends_the_run_with_a_hint(drawn: Set) -> None:
    plan = [(Window(View(0, mirrored=False, draw=1), 0),)]
    stream = BatchStream(
        plan,
        drawn.episodes,
        drawn.store,
        drawn.data,
        Dies(),  # type: ignore[arg-type]
        action_range=RANGE,
        workers=1,
    )
    with pytest.raises(TrainingError, match=r"a process that prepares batches died(.|\n)*lower loop\.workers"):
        list(stream)


def test_bugs_in_workers_stay_bugs(drawn: Set) -> None:
    with pytest.raises(IndexError) as error:
        list(drawn.stream([(Window(View(99, mirrored=False, draw=None), 0),)], workers=1))
    traceback.clear_frames(error.tb)  # torch's iterator lives in them, and its worker with it


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_main_process(drawn: Set, sent: signal.Signals) -> None:
    # Ctrl-C reaches the whole process group; a scheduler's SIGTERM every process of the job.
    others = set(multiprocessing.active_children())
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        stream = iter(drawn.stream(plan_of(drawn), workers=2))
        next(stream)
        children = set(multiprocessing.active_children()) - others
        assert len(children) == 2
        for child in children:
            assert child.pid is not None
            os.kill(child.pid, sent)
        assert len(list(stream)) == len(plan_of(drawn)) - 1
        assert seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert set(multiprocessing.active_children()) <= others


def test_a_window_that_is_told_to_stop_stands_still(drawn: Set) -> None:
    stopped = dataclasses.replace(RECORDED, told=Told("Stop", "Stop"))
    batch = drawn.batch(Window(RECORDED, 0), Window(stopped, 0))

    assert set(batch.instructions) == {drawn.episodes[0].instruction, "Stop"}
    assert np.any(batch.physical[0] != 0)
    assert not np.any(batch.physical[1])
    assert np.any(batch.mask[1])
    assert_array_equal(batch.mask[1], batch.mask[0])
    assert not np.any(batch.classes[1])  # the class that stands still
    words = [batch.instructions[batch.instruction_of[frame]] for frame in batch.frame_of[1]]
    assert set(words) == {"Stop"}


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_window_that_is_told_to_steer_does_what_its_words_say(drawn: Set, mirrored: bool) -> None:
    view = dataclasses.replace(RECORDED, mirrored=mirrored, told=Told("Slide left", "L"))
    batch = drawn.batch(Window(view, 0))

    assert batch.instructions == ("Slide left",)
    assert_array_equal(batch.mask, drawn.batch(Window(RECORDED, 0)).mask)
    done = batch.physical[batch.mask]
    assert_array_equal(done, np.broadcast_to(np.float32([0.0, 0.6]), done.shape))
    assert {NINE.names[label] for label in batch.classes[batch.mask]} == {"L"}


@pytest.mark.parametrize(("mirrored", "heard"), [(False, "Head left"), (True, "Head right")])
def test_other_words_for_what_was_recorded_leave_its_actions_alone(drawn: Set, mirrored: bool, heard: str) -> None:
    view = dataclasses.replace(RECORDED, mirrored=mirrored)
    batch = drawn.batch(Window(dataclasses.replace(view, told=Told("Head left")), 0))

    assert batch.instructions == (heard,)
    assert_array_equal(batch.physical, drawn.batch(Window(view, 0)).physical)
    assert {heard} <= set(instructions_of([dataclasses.replace(drawn.episodes[0], words=("Head left",))]))
