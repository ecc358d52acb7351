"""Keeps the newest good frame of a camera, on a thread of its own, whatever the camera does.

One rule makes it safe: a frame that is refused (runtime/cameras/checks.py), late, or never came does not become the newest one. So
the newest one ages, and whoever drives by it stops when it is too old. Nothing else needs to know what is wrong with a camera; notes
and statistics are for people.

A damaged picture is left out. A lost camera is closed and opened again, for ever, with pauses that grow from 0.2 to 2 seconds. Every
other exception of a camera counts as lost. A call into a camera that never returns keeps this thread and nobody else: `latest` goes on
answering, `close` gives up waiting. Knows nothing about kinds of cameras, or about how old is too old.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bundle.errors import FrameError, JetvlaError
from runtime.cameras.base import Camera, EndOfFrames, Frame
from runtime.cameras.checks import FrameChecks
from runtime.events import Note
from runtime.robot_file import CameraConfig

log = logging.getLogger("jetvla")

_READ_S = 0.25  # how long one read may wait; bounds how late a close is noticed
_SILENT_S = (
    5.0  # no good frame for so long: a new connection may help; discovery of a ROS topic takes up to a few seconds
)
_HANGS_S = 5.0  # a call into the camera that takes longer is worth a note; opening one may take three seconds
_REFUSED_S = 0.5  # so is refusing everything for so long
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 2.0
_JOIN_S = 3.0
_FPS_FRAMES = 30
_FPS_SPAN_S = 3.0
_BREATH_S = 0.001  # a camera that answers at once with nothing, or with nothing good, must not keep a core busy
_DAMAGED = "damaged"  # beside checks.Refusal: what could not even be decoded


@dataclass(frozen=True)
class GrabberStatistics:
    """What a grabber has seen so far.

    Attributes:
        taken: good frames.
        refused: frames that did not count, by reason: see checks.Refusal, and "damaged".
        reconnects: how often the camera was opened again.
        fps: good frames per second, lately.
        ended: the recording that plays as a camera is over.
        connected: the camera is open.
        last_error: why it was lost, or a frame was damaged, last; empty if neither ever happened.
    """

    taken: int
    refused: Mapping[str, int]
    reconnects: int
    fps: float
    ended: bool
    connected: bool
    last_error: str


class FrameGrabber:
    """The newest good frame of one camera. `start` it, ask it from any thread, `close` it."""

    def __init__(
        self,
        camera: Camera,
        config: CameraConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_note: Callable[[Note], None] = lambda note: None,
    ) -> None:
        """Args:
        camera: closed still; from now on only this grabber uses it.
        clock: what `Frame.captured_s` is measured by.
        on_note: told once when the camera is lost, hangs, gives nothing usable, is back, or has ended; called from any thread.
        """
        self._camera = camera
        self._checks = FrameChecks(config)
        self._frozen_after_s = config.frozen_after_s
        self._clock = clock
        self._on_note = on_note
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._stop = threading.Event()
        self._changed = threading.Condition()
        # Guarded by the condition's lock:
        self._newest: Frame | None = None
        self._ended = False
        self._over = False  # no frame will ever come any more
        self._taken = 0
        self._refused: Counter[str] = Counter()
        self._arrivals: deque[float] = deque(maxlen=_FPS_FRAMES)
        self._opened = 0
        self._connected = False
        self._lost_since: float | None = None
        self._error: Exception | None = None
        self._call: tuple[str, float] | None = None  # into the camera: which, since when
        self._hang_noted = False
        # The thread's own:
        self._good_s = 0.0  # when the last good frame came, or the camera was opened
        self._bad_noted: set[str] = set()

    def start(self) -> None:
        """Begin to connect and to take frames; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Stop and disconnect; safe to call twice. Waits a few seconds at most: a camera that hangs is left behind."""
        self._stop.set()
        with self._changed:
            self._over = True
            self._changed.notify_all()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                self._note("camera hangs", f"it did not let go within {_JOIN_S:g} s, and is left behind")

    def latest(self) -> Frame | None:
        """The newest good frame, however old; None if there was none yet."""
        self._look_for_a_hang()
        with self._changed:
            return self._newest

    def wait_newer(self, than: Frame | None, timeout_s: float) -> Frame | None:
        """A good frame that was captured after `than` (None: any); None if none came in time, or none will come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._is_newer(than), timeout_s)
            found = self._newest if self._is_newer(than) else None
        self._look_for_a_hang()
        return found

    @property
    def ended(self) -> bool:
        """The recording that plays as a camera is over."""
        with self._changed:
            return self._ended

    @property
    def statistics(self) -> GrabberStatistics:
        """The counts so far."""
        now = self._clock()
        with self._changed:
            recent = [arrival for arrival in self._arrivals if arrival > now - _FPS_SPAN_S]
            span = recent[-1] - recent[0] if recent else 0.0
            return GrabberStatistics(
                taken=self._taken,
                refused=dict(self._refused),
                reconnects=max(0, self._opened - 1),
                fps=(len(recent) - 1) / span if span > 0 else 0.0,
                ended=self._ended,
                connected=self._connected,
                last_error="" if self._error is None else _words(self._error),
            )

    @property
    def error(self) -> Exception | None:
        """Why the camera was lost last, could not be opened, or a frame was damaged; a JetvlaError says how to mend it."""
        with self._changed:
            return self._error

    def _is_newer(self, than: Frame | None) -> bool:
        return self._newest is not None and (than is None or self._newest.captured_s > than.captured_s)

    # --- the thread ---------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stop.is_set():
            taken = self._taken
            try:
                self._connect()
                self._take_frames()
            except EndOfFrames:
                with self._changed:
                    self._ended = self._over = True
                    self._changed.notify_all()
                self._disconnect()
                self._note("camera ended", "the recording is over")
                return
            except Exception as error:  # any at all: a driver's bug must not end the run without a word
                self._lose(error)
            self._disconnect()
            if self._taken > taken:
                pause_s = _FIRST_PAUSE_S
            self._stop.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _connect(self) -> None:
        with _Call(self, "open"):
            self._camera.open()
        with self._changed:
            self._opened += 1
            self._connected = True
        self._checks.reconnected()
        self._good_s = self._clock()

    def _disconnect(self) -> None:
        with self._changed:
            self._connected = False
        try:
            with _Call(self, "close"):
                self._camera.close()
        except Exception as error:  # nothing more can be done with it
            log.warning("closing the camera failed: %s", _words(error))

    def _take_frames(self) -> None:
        """Until told to stop.

        Raises:
            _Lost: the camera gives nothing that counts.
            Exception: whatever the camera raises.
        """
        reason: str | None = None
        dark_s = -math.inf  # when the last picture came whose fault a new connection would not mend
        while not self._stop.is_set():
            frame, damage = self._read()
            now = self._clock()
            if frame is not None or damage is not None:
                reason = self._checks.refuse(frame, now) if frame is not None else _DAMAGED
                if frame is not None and reason is None:
                    self._accept(frame, now)
                    continue
                with self._changed:
                    self._refused[str(reason)] += 1
                    self._error = damage or self._error
                if reason == "too dark":
                    dark_s = now
                if reason == "frozen":
                    raise _Lost(f"the same picture for more than {self._frozen_after_s:g} s")
            self._stop.wait(_BREATH_S)
            silent = now - self._good_s
            if silent > _REFUSED_S and reason is not None and reason not in self._bad_noted:
                self._bad_noted.add(reason)
                self._note("frames refused", f"{reason}; no good one for {silent:.1f} s")
            if now - max(self._good_s, dark_s) > _SILENT_S:
                raise _Lost(f"no good picture for {silent:.1f} s ({reason or 'none came'})")

    def _read(self) -> tuple[Frame | None, FrameError | None]:
        """A frame, or what is wrong with it; neither if none came."""
        try:
            with _Call(self, "read"):
                return self._camera.read(_READ_S), None
        except FrameError as error:
            return None, error

    def _accept(self, frame: Frame, now: float) -> None:
        with self._changed:
            self._newest = frame
            self._taken += 1
            self._arrivals.append(now)
            lost_since, self._lost_since = self._lost_since, None
            self._changed.notify_all()
        self._good_s = now
        self._bad_noted.clear()
        if lost_since is not None:
            self._note("camera back", f"after {now - lost_since:.1f} s")

    def _lose(self, error: Exception) -> None:
        now = self._clock()
        with self._changed:
            self._error = error
            first = self._lost_since is None
            if first:
                self._lost_since = now
        if first and not self._stop.is_set():
            self._note("camera lost", _words(error))

    # --- what people are told -----------------------------------------------------------------------------------------------------

    def _look_for_a_hang(self) -> None:
        """Only another thread can notice that this one is stuck: whoever asks for frames does."""
        now = self._clock()
        with self._changed:
            if self._call is None or self._hang_noted or now - self._call[1] < _HANGS_S:
                return
            self._hang_noted = True
            if self._lost_since is None:
                self._lost_since = now
            which, since = self._call
        self._note("camera hangs", f"{which}() has not returned for {now - since:.1f} s")

    def _note(self, kind: str, text: str) -> None:
        try:
            self._on_note(Note(self._clock(), kind, text))
        except Exception:  # whoever listens must not stop the pictures
            log.exception("a note was not taken: %s: %s", kind, text)


class _Lost(Exception):
    """The camera answers, but with nothing that counts."""


class _Call:
    """While it is entered, a call into the camera is under way."""

    def __init__(self, grabber: FrameGrabber, which: str) -> None:
        self._grabber, self._which = grabber, which

    def __enter__(self) -> None:
        with self._grabber._changed:
            self._grabber._call = self._which, self._grabber._clock()

    def __exit__(self, *error: object) -> None:
        with self._grabber._changed:
            self._grabber._call = None
            self._grabber._hang_noted = False


def _words(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, JetvlaError):
        return error.what if error.got is None else f"{error.what} (got {error.got})"
    return str(error) if isinstance(error, _Lost) else f"{type(error).__name__}: {error}"
