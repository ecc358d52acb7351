"""One run's recording: which file is written, when the disk confirms it, when the next begins, and what to do while the disk refuses.

Used by the recorder's thread alone; only `status` is for others.
"""

from __future__ import annotations

import os
import platform
import struct
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runtime.events import Decision, Note, Published, RunInfo
from runtime.recorder.disk_budget import make_room, next_number, recording_name
from runtime.recorder.event_queue import Lost, Waiting
from runtime.recorder.jpeg import JpegEncoder
from runtime.recorder.messages import Clock, MessageMaker, run_metadata
from runtime.recorder.recording_file import RecordingFile
from runtime.recorder.recover import recover_file
from runtime.robot_file import Recorder

_MB, _GB = 1_000_000, 1_000_000_000
_LARGEST_RESERVE = 64 * _MB
_ATTEMPTS = 5
_TELL_S = 10.0  # between two lines about losses
_NOT_AS_TYPED = (TypeError, ValueError, OverflowError, LookupError, AttributeError, struct.error)


@dataclass(frozen=True)
class Plan:
    """Where and how to record; sizes in bytes, times in seconds.

    Attributes:
        total: of all recordings in the folder.
        largest: of one file.
        reserve: kept free within `total`, because room is made now and then and not with every byte.
    """

    folder: Path
    total: int
    largest: int
    reserve: int
    quality: int
    sync_s: float
    retry_s: float

    @classmethod
    def of(cls, config: Recorder, *, sync_s: float, retry_s: float) -> Plan:
        """From the robot file. The current file is never removed, so it may have half of the folder at most."""
        total = round(config.max_total_gb * _GB)
        largest = min(round(config.max_file_mb * _MB), total // 2)
        reserve = min(total // 20, _LARGEST_RESERVE)
        folder = Path(config.folder).expanduser()
        return cls(folder, total, largest, reserve, config.jpeg_quality, sync_s, retry_s)


@dataclass(frozen=True)
class RecorderStatus:
    """How it stands.

    Attributes:
        file: that is being written; None before the start, after the end, and while the disk refuses.
        trouble: why nothing is written; empty while all is well.
        confirmed: bytes that the disk has, in all files of this run.
        lost: events that are in no file.
    """

    file: Path | None = None
    trouble: str = ""
    confirmed: int = 0
    lost: Lost = field(default_factory=Lost)


class RecordingSession:
    """See the module."""

    def __init__(self, plan: Plan, info: RunInfo, clock: Clock, tell: Callable[[str], None]) -> None:
        """Touches no disk. `tell` is called when recording stops, goes on, or loses something."""
        self.status = RecorderStatus()
        self._plan = plan
        self._info = info
        self._clock = clock
        self._tell = tell
        self._jpeg = JpegEncoder(plan.quality)
        self._maker = MessageMaker(clock, info, self._jpeg)
        self._run = uuid.uuid4().hex
        # Local time, as people look for it; only a name.
        self._started = f"{datetime.fromtimestamp(clock.wall_ns / 1e9):%Y%m%d-%H%M%S}"
        self._number, self._part = 0, 0
        self._file: RecordingFile | None = None
        self._broken: list[Path] = []
        self._unconfirmed = Lost()  # what the file has in memory only
        self._untold = Lost()
        self._tell_at = 0.0
        self._faults: set[str] = set()
        self._finished_bytes = 0
        self._roomy_until = 0
        self._sync_at = self._retry_at = time.monotonic()

    def record(self, waiting: list[Waiting], lost: Lost) -> None:
        """Record events, and do whatever is due."""
        if lost:
            self._lose(lost)
        if self._file is None and time.monotonic() >= self._retry_at:
            self._open()
        for item in waiting:
            if self._file is None:
                self._lose(_counted(item))
            else:
                self._add(self._file, item)
            self._sync_if_due()
        self._sync_if_due()

    def close(self) -> None:
        """Finish the file."""
        self._tell_at = 0.0
        if self._file is not None:
            self._sync(self._file)
        if self._file is not None:
            self._finish(self._file)
        for path in self._broken:
            recover_file(path, self._tell)
        self._jpeg.close()
        self.status = replace(self.status, file=None)

    def give_up(self, error: Exception) -> None:
        """An error that should not be: leave the file as it is, and say so."""
        file, self._file = self._file, None
        if file is not None:
            file.abandon()
        self._jpeg.close()
        text = f"recording ended for good: {type(error).__name__}: {error}; driving goes on"
        self.status = replace(self.status, file=None, trouble=text)
        self._say(text)

    # --- events ---------------------------------------------------------------------------------------------------------------

    def _add(self, file: RecordingFile, item: Waiting) -> None:
        try:
            messages = self._maker.messages(item)
        except _NOT_AS_TYPED as error:
            self._lose(_counted(item))
            if (fault := type(error).__name__) not in self._faults:  # each kind once; after that they only count
                self._faults.add(fault)
                self._say(f"an event could not be recorded: {fault}: {error}")
            return
        for message in messages:
            file.add(message)
        self._unconfirmed += _counted(item)

    def _lose(self, lost: Lost) -> None:
        self._untold += lost
        self.status = replace(self.status, lost=self.status.lost + lost)

    def _say(self, text: str) -> None:
        """Tell, and record."""
        if self._file is not None:
            self._file.add(self._maker.note(Note(time.monotonic(), "recorder", text)))
        self._tell(text)

    # --- files ----------------------------------------------------------------------------------------------------------------

    def _sync_if_due(self) -> None:
        if self._file is not None and time.monotonic() >= self._sync_at:
            self._sync(self._file)

    def _sync(self, file: RecordingFile) -> None:
        if self._untold and time.monotonic() >= self._tell_at:
            untold, self._untold = self._untold, Lost()
            self._tell_at = time.monotonic() + _TELL_S
            self._say(
                f"not recorded: {untold}, for what was told before, or because disk or processor could not follow"
            )
        try:
            file.sync()
        except OSError as error:
            self._stop(error)
            return
        self._sync_at = time.monotonic() + self._plan.sync_s
        self._unconfirmed = Lost()
        self.status = replace(self.status, confirmed=self._finished_bytes + file.size)
        if file.size >= self._plan.largest:
            self._finish(file)
            if self._file is None and not self.status.trouble:
                self._open()
        elif file.size >= self._roomy_until:
            self._make_room(file)

    def _make_room(self, file: RecordingFile | None) -> None:
        make_room(self._plan.folder, None if file is None else file.path, self._plan.total - self._plan.reserve)
        self._roomy_until = (0 if file is None else file.size) + self._plan.reserve // 2

    def _open(self) -> None:
        """Begin the next file, after finishing what an earlier failure left."""
        resumed = bool(self.status.trouble)
        try:
            self._plan.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(None)
            self._file = self._create()
        except OSError as error:
            self._stop(error)
            return
        self._part += 1
        while self._broken:
            recover_file(self._broken.pop(), self._tell)
        self._maker.new_file()
        self._sync_at = time.monotonic() + self._plan.sync_s
        self.status = replace(self.status, file=self._file.path, trouble="")
        if resumed:
            lost, self._untold = self._untold, Lost()
            self._say(f"recording goes on in {self._file.path.name}; not recorded meanwhile: {lost}")

    def _create(self) -> RecordingFile:
        """The next part of this run, or of a run of a new number where that name is taken."""
        facts = {"run": self._run, "part": str(self._part), "jpeg_quality": str(self._plan.quality)}
        facts |= {f"version_{name}": _version(name) for name in ("jetvla", "mcap", "numpy", "pillow")}
        facts |= {"version_python": platform.python_version(), "machine": f"{platform.machine()} {platform.release()}"}
        metadata = run_metadata(self._info, self._clock, facts)
        for attempt in range(_ATTEMPTS):
            self._number = self._number or next_number(self._plan.folder)
            name = recording_name(self._number, self._info.robot, self._started, self._part)
            try:
                return RecordingFile(self._plan.folder / name, metadata)
            except FileExistsError:
                self._number = 0 if attempt < _ATTEMPTS - 1 else self._number
        raise FileExistsError(f"{name} and others exist")

    def _finish(self, file: RecordingFile) -> None:
        try:
            file.finish()
        except OSError as error:
            self._stop(error)
            return
        self._finished_bytes += file.size
        self._file = None
        self.status = replace(self.status, file=None, confirmed=self._finished_bytes)

    def _stop(self, error: OSError) -> None:
        """The disk refuses: close, tell once, try again later."""
        if self._file is not None:
            self._file.abandon()
            self._broken.append(self._file.path)
            with suppress(OSError):
                self._finished_bytes += self._file.path.stat().st_size
            self._file = None
        self._lose(self._unconfirmed)
        self._unconfirmed = Lost()
        self._retry_at = time.monotonic() + self._plan.retry_s
        why = os.strerror(error.errno) if error.errno else str(error)
        first = not self.status.trouble
        self.status = replace(self.status, file=None, trouble=why)
        if first:
            self._say(
                f"recording stopped: {why} ({self._plan.folder}); it goes on when the disk lets it, tried every "
                f"{self._plan.retry_s:g} s; driving goes on"
            )


def _version(name: str) -> str:
    """Empty where a package is used without being installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _counted(item: Waiting) -> Lost:
    if isinstance(item.event, Decision):
        return Lost(decisions=1, pictures=int(item.pictured))
    return Lost(commands=1) if isinstance(item.event, Published) else Lost(notes=1)
