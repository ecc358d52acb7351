"""One file of a recording, being written: MCAP in chunks that end by time, so that a crash costs the last moment and nothing else.

What is added waits in memory until `sync`, which ends the chunk, writes it in one go and has the disk confirm it. A write that fails is
taken back to the end of the last good chunk. So at any moment the file is a row of whole chunks, perhaps with a torn one at the end, and
episodes/recording_repair.py can finish it. The file has its name from the start, and a lock (flock) as long as somebody writes it.

Knows nothing about events, or about other files.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bundle.errors import RecordingError
from episodes.recording_messages import TOPICS, definition
from episodes.recording_scan import METADATA_NAME
from runtime.recorder.messages import Message

LIBRARY = "jetvla"  # how a file's header begins that is ours
_CHUNK_BYTES = 8 << 20  # time ends chunks; this only bounds memory
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


def require_mcap() -> None:
    """Check that the mcap library is there.

    Raises:
        RecordingError: it is not, or is too old.
    """
    try:
        from mcap.writer import Writer
    except ImportError as error:
        raise RecordingError(
            "the flight recorder needs the mcap library", got=error, hint="pip install 'jetvla[record]'"
        ) from None
    if not hasattr(Writer, "flush"):
        raise RecordingError(
            "the mcap library cannot end a chunk by time",
            got="a version before 1.5",
            expected="mcap 1.5 or later",
            hint="pip install --upgrade 'jetvla[record]'",
        )


class RecordingFile:
    """A new file, open for writing. Every method raises OSError where the disk refuses; `abandon` then closes the file."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Make the file, which must not exist, and store what it says about its run.

        Raises:
            FileExistsError: it exists.
            OSError: the disk refuses.
        """
        from mcap.writer import CompressionType, Writer

        self.path = path
        self._sink = _Sink(path)
        try:
            # JPEG does not get smaller, and the rest is small: compression would cost time for nothing.
            self._writer = Writer(self._sink, chunk_size=_CHUNK_BYTES, compression=CompressionType.NONE)  # type: ignore[arg-type]
            self._writer.start(profile="ros2", library=f"{LIBRARY} flight recorder")
            self._writer.add_metadata(METADATA_NAME, dict(metadata))
            self._channels = {topic: self._register(topic, kind) for topic, kind in TOPICS.items()}
            self._counts = dict.fromkeys(TOPICS, 0)
            self._sink.flush()
            self._sink.confirm()
            _confirm_folder(path.parent)
        except BaseException:
            self.abandon()
            with suppress(OSError):  # on a full disk every attempt would leave an empty file
                path.unlink()
            raise

    @property
    def size(self) -> int:
        """Bytes, with what still waits in memory; the summary at the end will come on top."""
        return self._sink.tell()

    def add(self, message: Message) -> None:
        """Store a message with the next `sync`."""
        self._counts[message.topic] += 1
        self._writer.add_message(
            self._channels[message.topic],
            log_time=message.time_ns,
            publish_time=message.time_ns,
            sequence=self._counts[message.topic],
            data=message.data,
        )

    def sync(self) -> None:
        """Write what was added, and wait until the disk has it."""
        self._writer.flush()  # type: ignore[no-untyped-call]
        self._sink.confirm()

    def finish(self) -> None:
        """Write the summary and close."""
        self.sync()
        self._writer.finish()  # type: ignore[no-untyped-call]
        self._sink.flush()
        self._sink.confirm()
        self._sink.close()

    def abandon(self) -> None:
        """Close the file as it is; for after an OSError. Raises nothing, and may be called twice."""
        with suppress(OSError):
            self._sink.close()

    def _register(self, topic: str, kind: str) -> int:
        schema = self._writer.register_schema(kind, "ros2msg", definition(kind).encode())
        return self._writer.register_channel(topic, "cdr", schema)


class _Sink:
    """The stream under the MCAP writer: keeps what is written until `flush`, which writes all of it or leaves the file as it was."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self._written = 0
        self._waiting = bytearray()
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if (
                error.errno not in _NO_LOCKS
            ):  # without locks nobody will repair the file while it is written: repair needs one
                os.close(self._descriptor)
                raise

    def write(self, data: bytes) -> int:
        self._waiting += data
        return len(data)

    def tell(self) -> int:
        return self._written + len(self._waiting)

    def flush(self) -> None:
        rest = memoryview(self._waiting)
        try:
            position = self._written
            while rest:
                count = os.pwrite(self._descriptor, rest, position)
                position, rest = position + count, rest[count:]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._written)
            raise
        finally:
            rest.release()
        self._written = position
        self._waiting = bytearray()

    def confirm(self) -> None:
        """Wait until the disk has what was flushed."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _confirm_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
