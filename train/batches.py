"""Micro-batches as numpy arrays: the distinct frames of their windows, and what should be predicted, in-process or by worker processes.

Windows of an episode overlap; a batch holds each frame once and windows point at it. No randomness here: a batch is a function of its
windows, so workers change nothing but the speed. Knows nothing about models.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from bundle.errors import JetvlaError, TrainingError
from train.action_classes import NINE, ClassTable
from train.augmentation import Augmenter, mirror_actions, mirror_frame, mirror_text
from train.episode_set import TrainingEpisode
from train.frame_store import FrameStore
from train.run_config import DataConfig
from train.sampling import MicroBatch, View, Window
from train.windows import action_chunks, normalize_actions, window_starts

_LAST_SECONDS = 60  # of a worker after SIGTERM


@dataclass(frozen=True, eq=False)
class Batch:
    """B windows of W frames, made of U distinct frames.

    Attributes:
        frames: uint8 [U, s, s, 3] as the views have them, or [U, C, s, s, 3] of several cameras; [0, s, s, 3] where they were not
            asked for.
        frame_of: int64 [B, W], index into the U frames; where an episode is shorter than W, the rest points at its last frame.
        views: the distinct views.
        view_of: int64 [U], index into views.
        frame_number: int64 [U], in the episode of the view.
        instructions: the distinct texts, mirrored where the view is.
        instruction_of: int64 [U], index into instructions.
        actions: float32 [B, W, n, A] in [-1, 1]; masked ones are 0.
        physical: float32 [B, W, n, A] as recorded (mirrored where the view is); masked ones are 0.
        mask: bool [B, W, n], where there is an action.
        classes: int64 [B, W, n] of the physical actions, out of a table; an axis that is not learned counts as 0.
    """

    frames: NDArray[np.uint8]
    frame_of: NDArray[np.int64]
    views: tuple[View, ...]
    view_of: NDArray[np.int64]
    frame_number: NDArray[np.int64]
    instructions: tuple[str, ...]
    instruction_of: NDArray[np.int64]
    actions: NDArray[np.float32]
    physical: NDArray[np.float32]
    mask: NDArray[np.bool_]
    classes: NDArray[np.int64]


def make_batch(
    windows: Sequence[Window],
    episodes: Sequence[TrainingEpisode],
    store: FrameStore,
    data: DataConfig,
    augmenter: Augmenter | None,
    *,
    action_range: tuple[float, float],
    classes: ClassTable = NINE,
    with_frames: bool = True,
) -> Batch:
    """The windows as arrays.

    Args:
        windows: for none, which fills up the share of a process without work, one window of a single frame with every action masked,
            so that the forward pass has something to do and the loss nothing.
        episodes: what views count into.
        augmenter: for views with a draw; None where there are none.
        action_range: physical values that become -1 and +1.
        classes: what actions are labelled as.
        with_frames: False leaves `frames` empty, for cached image tokens.

    Raises:
        EpisodeError, StorageError: see FrameStore.frames.
    """
    idle = not windows
    windows = windows or (Window(View(0, mirrored=False, draw=None), 0),)
    frames: dict[tuple[View, int], int] = {}
    frame_of = np.empty((len(windows), data.window), np.int64)
    steps = np.arange(data.window)
    physical, masks = [], []
    for row, window in enumerate(windows):
        episode = episodes[window.view.episode]
        numbers = np.zeros(data.window, int) if idle else np.minimum(window.start + steps, len(episode) - 1)
        frame_of[row] = [frames.setdefault((window.view, int(number)), len(frames)) for number in numbers]
        recorded = mirror_actions(episode.actions, data.actions) if window.view.mirrored else episode.actions
        if window.view.told is not None and window.view.told.motion is not None:
            recorded = np.broadcast_to(window.view.told.action(data.actions), recorded.shape)
        targets, mask = action_chunks(recorded, window.start, data.window, data.chunk)
        physical.append(targets)
        masks.append(mask & (not idle))
    views = tuple(dict.fromkeys(view for view, _ in frames))
    texts = [_instruction(view, episodes) for view in views]
    instructions = tuple(dict.fromkeys(texts))
    view_of = np.array([views.index(view) for view, _ in frames], np.int64)
    stacked, mask = np.stack(physical), np.stack(masks)
    normalized = normalize_actions(stacked, *action_range)
    return Batch(
        frames=_frames(frames, episodes, store, augmenter)
        if with_frames
        else np.empty((0, store.size, store.size, 3), np.uint8),
        frame_of=frame_of,
        views=views,
        view_of=view_of,
        frame_number=np.array([number for _, number in frames], np.int64),
        instructions=instructions,
        instruction_of=np.array([instructions.index(text) for text in texts], np.int64)[view_of],
        actions=np.where(mask[..., None], normalized, np.float32(0)),
        physical=np.where(mask[..., None], stacked, np.float32(0)),
        mask=mask,
        classes=np.where(mask, classes.labels(stacked, data.actions), 0),
    )


def _frames(
    wanted: Iterable[tuple[View, int]],
    episodes: Sequence[TrainingEpisode],
    store: FrameStore,
    augmenter: Augmenter | None,
) -> NDArray[np.uint8]:
    """The distinct frames in their order, uint8 [U, s, s, 3], or [U, C, s, s, 3]."""
    opened: dict[int, NDArray[np.uint8]] = {}
    found = []
    for view, number in wanted:
        if view.episode not in opened:
            opened[view.episode] = store.frames(episodes[view.episode])
        frame = np.asarray(opened[view.episode][number])
        if view.mirrored:
            frame = mirror_frame(frame)
        if view.draw is not None:
            if augmenter is None:
                raise ValueError("a view is augmented and there is no augmenter")
            frame = augmenter.apply(frame, view.draw)
        found.append(frame)
    return np.stack(found)


def _instruction(view: View, episodes: Sequence[TrainingEpisode]) -> str:
    if view.told is not None and view.told.motion is not None:
        return view.told.words
    text = episodes[view.episode].instruction if view.told is None else view.told.words
    return mirror_text(text) if view.mirrored else text


def validation_windows(episodes: Sequence[TrainingEpisode], window: int) -> list[MicroBatch]:
    """Every window of every episode as recorded, one micro-batch for each episode."""
    views = [View(index, mirrored=False, draw=None) for index in range(len(episodes))]
    return [
        tuple(Window(view, start) for start in window_starts(len(episode), window))
        for view, episode in zip(views, episodes, strict=True)
    ]


class BatchStream:
    """The batches of a plan, in its order, prepared ahead by worker processes. Iterating again starts again.

    Args:
        plan: micro-batches, of this process.
        workers: processes; 0 prepares each batch when it is asked for.
        episodes, store, data, augmenter, action_range, classes, with_frames: as for make_batch.
    """

    def __init__(
        self,
        plan: Sequence[MicroBatch],
        episodes: Sequence[TrainingEpisode],
        store: FrameStore,
        data: DataConfig,
        augmenter: Augmenter | None,
        *,
        action_range: tuple[float, float],
        classes: ClassTable = NINE,
        with_frames: bool = True,
        workers: int = 0,
    ) -> None:
        make = partial(
            make_batch,
            episodes=episodes,
            store=store,
            data=data,
            augmenter=augmenter,
            action_range=action_range,
            classes=classes,
            with_frames=with_frames,
        )
        self._prepared = _Prepared(plan, make)
        self._workers = workers

    def __len__(self) -> int:
        return len(self._prepared.plan)

    def __iter__(self) -> Iterator[Batch]:
        """The batches.

        Raises:
            EpisodeError, StorageError: as make_batch, also from workers.
            TrainingError: a worker died.
        """
        with closing(self._results()) as results:  # workers end here, not when the garbage is collected
            for result in results:
                if isinstance(result, _Failure):
                    raise result.kind(result.what, got=result.got, expected=result.expected, hint=result.hint)
                yield result

    def _results(self) -> Generator[Batch | _Failure, None, None]:
        if self._workers == 0 or not self._prepared:
            yield from (self._prepared[index] for index in range(len(self._prepared)))
            return
        with _started_quietly():
            batches = iter(
                DataLoader(
                    self._prepared,
                    batch_size=None,
                    num_workers=min(self._workers, len(self._prepared)),
                    collate_fn=_unchanged,
                    worker_init_fn=_start_worker,
                    generator=torch.Generator(),  # of its own: workers must not shift the global one's stream
                )
            )
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                "a process that prepares batches died",
                got=str(error).strip().splitlines()[0],
                expected="workers that live as long as the epoch",
                hint="usually memory ran out: lower loop.workers (0 needs no other process).",
            ) from error


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker: exceptions whose arguments are keywords do not survive pickling."""

    kind: type[JetvlaError]
    what: str
    got: str | None
    expected: str | None
    hint: str


class _Prepared(Dataset[Batch | _Failure]):
    """The batches of a plan by number."""

    def __init__(self, plan: Sequence[MicroBatch], make: Callable[[MicroBatch], Batch]) -> None:
        self.plan = plan
        self._make = make

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch | _Failure:
        try:
            return self._make(self.plan[index])
        except JetvlaError as error:
            got, expected = (None if value is None else str(value) for value in (error.got, error.expected))
            return _Failure(type(error), error.what, got, expected, error.hint)


def _unchanged(result: Any) -> Any:
    """Instead of the loader's own conversion to tensors."""
    return result


@contextmanager
def _started_quietly() -> Iterator[None]:
    """Workers that start in here never see Ctrl-C, which is the main process's to handle; nor does the user see torch count cores."""
    signals = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    """Schedulers send SIGTERM to every process of a job; workers go on for as long as the main process needs to save and stop."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_LAST_SECONDS))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
