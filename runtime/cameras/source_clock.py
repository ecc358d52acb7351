"""Turns a source's own time stamps into times of this machine, so that pictures that wait somewhere on their way look as old as they are.

Two clocks differ by an unknown amount, so the delay itself cannot be known; but how much longer a picture took than the quickest one can.
That is what a queue somewhere on the way adds: a stream that has fallen two seconds behind still delivers thirty pictures a second, and
only its stamps tell. The quickest one so far sets the difference of the clocks. It may grow by a little over time, as quartz clocks drift
apart, too slowly to hide a queue; where stamps go back, the source has set its clock, and the difference is learned anew.
"""

from __future__ import annotations

_DRIFT = 2e-4  # seconds per second; quartz drifts by less than 1e-4


class SourceClock:
    """What is known about one source's clock; make a new one for each connection."""

    def __init__(self) -> None:
        self._difference_s: float | None = None
        self._stamp_s = 0.0
        self._arrival_s = 0.0

    def captured_s(self, stamp_s: float | None, arrival_s: float) -> float:
        """When a picture was taken, by time.monotonic(), as if the quickest one so far had taken no time: never after its arrival.

        Args:
            stamp_s: by the source's clock; None where it has none, which gives the arrival.
            arrival_s: when it came, by time.monotonic(); not earlier than that of the picture before.
        """
        if stamp_s is None:
            return arrival_s
        difference = arrival_s - stamp_s
        if self._difference_s is None or stamp_s < self._stamp_s:
            self._difference_s = difference
        else:
            drifted = self._difference_s + _DRIFT * (arrival_s - self._arrival_s)
            self._difference_s = min(difference, drifted)
        self._stamp_s, self._arrival_s = stamp_s, arrival_s
        return min(arrival_s, stamp_s + self._difference_s)
