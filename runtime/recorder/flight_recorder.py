"""The flight recorder: writes what the robot saw, decided and was told, and can be relied on to be in nobody's way.

    recorder = FlightRecorder(robot_file.recorder, on_problem=print)
    recorder.start(info); recorder.take(event) ...; recorder.close()

`take` puts the event into a bounded queue, which costs microseconds; a thread of the recorder's own does everything slow
(recording_session.py), and what the last crash left is repaired by processes of their own (recover.py). When the disk refuses (full,
gone, read-only) that is reported once, what is lost is counted, and recording goes on when it may. The robot drives on in any case.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from runtime.events import Event, RunInfo
from runtime.recorder.event_queue import EventQueue
from runtime.recorder.messages import Clock
from runtime.recorder.recording_file import require_mcap
from runtime.recorder.recording_session import Plan, RecorderStatus, RecordingSession
from runtime.recorder.recover import recover_folder
from runtime.robot_file import Recorder

_POLL_S = 0.05
_CLOSE_S = 20.0


class FlightRecorder:
    """A Listener (runtime/events.py): `start`, `take` and `close` never raise."""

    def __init__(
        self,
        config: Recorder,
        *,
        on_problem: Callable[[str], None] = lambda text: None,
        sync_s: float = 0.25,
        retry_s: float = 5.0,
    ) -> None:
        """Check what can be checked; touches no disk.

        Args:
            config: folder, limits, quality.
            on_problem: called, on threads of the recorder's, with a line when recording stops, loses something, or goes on. Where there
                is a file, it has that line too, as a note of kind "recorder".
            sync_s: how much a crash may cost, beside the time that the disk takes to confirm.
            retry_s: between attempts while the disk refuses.

        Raises:
            RecordingError: the mcap library is absent or too old.
        """
        require_mcap()
        self._plan = Plan.of(config, sync_s=sync_s, retry_s=retry_s)
        self._on_problem = on_problem
        self._queue = EventQueue()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._session: RecordingSession | None = None

    @property
    def status(self) -> RecorderStatus:
        """How it stands now; any thread may ask."""
        return RecorderStatus() if self._session is None else self._session.status

    def start(self, info: RunInfo) -> None:
        """Begin a recording, once."""
        if self._thread is None and not self._closing.is_set():
            self._session = RecordingSession(self._plan, info, Clock.read(), self._tell)
            self._thread = threading.Thread(target=self._run, args=(self._session,), name="recorder", daemon=True)
            self._thread.start()
            threading.Thread(target=self._recover, name="recorder-repair", daemon=True).start()

    def take(self, event: Event) -> None:
        """Record an event, later. From any thread, in microseconds."""
        if not self._closing.is_set():
            self._queue.put(event)

    def close(self) -> None:
        """Write what waits and finish the file; gives up on a disk that hangs, after 20 s. May be called twice."""
        self._closing.set()
        if self._thread is None or self._thread is threading.current_thread():
            return
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            self._tell("the disk does not answer: the recording is left unfinished; the next start repairs it")

    def _run(self, session: RecordingSession) -> None:
        try:
            while not self._closing.wait(_POLL_S):
                session.record(*self._queue.take_all())
            session.record(*self._queue.take_all())
            session.close()
        except Exception as error:  # of ours; whoever drives must learn that nothing is recorded any more
            self._closing.set()
            session.give_up(error)

    def _recover(self) -> None:
        for path in recover_folder(self._plan.folder, self._tell, self._closing):
            self._tell(f"repaired {path.name}, which a crash or a power cut had left unfinished")

    def _tell(self, text: str) -> None:
        with suppress(Exception):  # whoever fails to show it must not end the recording
            self._on_problem(f"recorder: {text}")
