"""Two cameras as one: as old as the older picture, and never one without the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from runtime.cameras.base import Frame
from runtime.cameras.pair import PairedFrames


def frame(number: int, captured_s: float) -> Frame:
    return Frame(np.full((2, 2, 3), number, np.uint8), captured_s, source_stamp_s=float(number))


@dataclass
class Source:
    """A camera that shows what it is told; a wait ends at once and is remembered."""

    now: Frame | None = None
    ended: bool = False
    waited: list[float] = field(default_factory=list)

    def latest(self) -> Frame | None:
        return self.now

    def wait_newer(self, than: Frame | None, timeout_s: float) -> Frame | None:
        self.waited.append(timeout_s)
        return None if self.now is than else self.now


def test_a_pair_is_as_old_as_its_older_picture() -> None:
    static, hand = Source(frame(1, 10.0)), Source(frame(2, 9.5))
    pair = PairedFrames(static, hand).latest()
    assert pair is not None
    assert pair.hand is not None
    assert (pair.pixels[0, 0, 0], pair.hand[0, 0, 0]) == (1, 2)
    assert (pair.captured_s, pair.source_stamp_s) == (9.5, 1.0)
    hand.now = frame(3, 10.5)
    newer = PairedFrames(static, hand).latest()
    assert newer is not None
    assert newer.captured_s == 10.0


def test_a_hand_camera_that_froze_makes_every_later_pair_old() -> None:
    static, hand = Source(frame(1, 10.0)), Source(frame(2, 10.0))
    frames = PairedFrames(static, hand)
    for second in range(11, 15):
        static.now = frame(second, float(second))
        pair = frames.latest()
        assert pair is not None
        assert pair.captured_s == 10.0


def test_there_is_no_pair_without_both() -> None:
    for static, hand in ((None, frame(1, 1.0)), (frame(1, 1.0), None)):
        frames = PairedFrames(Source(static), Source(hand))
        assert frames.latest() is None
        assert frames.wait_newer(None, 0.1) is None


def test_a_newer_pair_is_one_with_a_newer_static_picture() -> None:
    static, hand = Source(frame(1, 1.0)), Source(frame(2, 1.0))
    frames = PairedFrames(static, hand)
    first = frames.wait_newer(None, 0.1)
    assert first is not None
    hand.now = frame(3, 1.1)
    assert frames.wait_newer(first, 0.1) is None
    static.now = frame(4, 1.2)
    second = frames.wait_newer(first, 0.1)
    assert second is not None
    assert second.hand is not None
    assert (second.pixels[0, 0, 0], second.hand[0, 0, 0]) == (4, 3)


def test_the_first_pair_waits_for_the_later_camera_within_the_same_time() -> None:
    times = iter([0.0, 4.0])
    static, hand = Source(frame(1, 1.0)), Source()
    assert PairedFrames(static, hand, clock=lambda: next(times)).wait_newer(None, 15.0) is None
    assert (static.waited, hand.waited) == ([15.0], [11.0])


def test_it_is_over_when_one_is() -> None:
    assert not PairedFrames(Source(), Source()).ended
    assert PairedFrames(Source(ended=True), Source()).ended
    assert PairedFrames(Source(), Source(ended=True)).ended
