"""Gives an unfinished recording its end: cuts what is torn, and appends the summary by which other programs find their way.

Works in place, because a copy would need the room that may be what ran out. Nothing whole is ever cut, and a repair that is killed
leaves a file that can be repaired again. A file that is being written is locked by its writer, and refused.

Needs the mcap library for the records that are written.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from bundle.atomic import disk_errors
from bundle.errors import RecordingError
from episodes.recording_scan import FOOTER, MAGIC, METADATA_NAME, ChunkPlace, Scan, has_end, scan

if TYPE_CHECKING:
    from mcap.data_stream import RecordBuilder
    from mcap.records import McapRecord


class BeingWrittenError(RecordingError):
    """Somebody writes the recording, or its disk has no locks."""


def is_finished(path: Path) -> bool:
    """Whether a recording has its end; looks at the last bytes only.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return has_end(file, os.fstat(file.fileno()).st_size)


def repair(path: Path) -> bool:
    """Finish an unfinished MCAP file in place; False where it was finished already.

    Raises:
        BeingWrittenError: somebody writes it.
        RecordingError: no MCAP file, finished and damaged, nothing that the flight recorder writes, or the mcap library is absent.
        StorageError: the disk is full or refuses; the file stays as readable as it was.
    """
    with disk_errors(path), _locked(path) as file:
        found = scan(path, ours=True)
        if found.finished:
            return False
        if METADATA_NAME not in found.metadata:
            raise RecordingError(
                f"{path} has no end, and is no flight recording",
                expected="a file of the flight recorder; no other is changed",
                hint="the mcap command line tool repairs any: mcap recover",
            )
        file.truncate(_whole(found))
        file.seek(0, os.SEEK_END)
        file.write(_end(found, file.tell()))
        file.flush()
        os.fsync(file.fileno())
    return True


def _locked(path: Path) -> BinaryIO:
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        raise RecordingError(
            f"there is no {path}", expected="a flight recording", hint="check the path and that the disk is mounted."
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise BeingWrittenError(
            f"{path} cannot be locked",
            got=error.strerror,
            expected="a recording that nobody is writing",
            hint="wait until the run has ended; on a network disk without locks, copy the file to a local one first.",
        ) from None
    return file


def _whole(found: Scan) -> int:
    """Where the file is cut. The indexes of the last chunk are written anew where they are not all there."""
    if found.chunks and not found.chunks[-1].is_indexed:
        last = found.chunks[-1]
        if last.start + last.length + last.index_length == found.good_end:
            last.index_offsets.clear()
            last.index_length = 0
            return last.start + last.length
    return found.good_end


def _end(found: Scan, start: int) -> bytes:
    """All that follows the data that begin at byte 0 and end at `start`."""
    from mcap.data_stream import RecordBuilder
    from mcap.records import DataEnd

    out = RecordBuilder()
    if found.chunks and not found.chunks[-1].index_offsets:
        _write_indexes(found.chunks[-1], out, start)
    DataEnd(0).write(out)
    data = _bytes(out)
    return data + _summary(found, start + len(data))


def _write_indexes(chunk: ChunkPlace, out: RecordBuilder, start: int) -> None:
    from mcap.records import MessageIndex

    for channel, entries in chunk.index_entries.items():
        chunk.index_offsets[channel] = start + out.count
        MessageIndex(channel, entries).write(out)
    chunk.index_length = out.count


def _summary(found: Scan, start: int) -> bytes:
    from mcap.data_stream import RecordBuilder
    from mcap.opcode import Opcode
    from mcap.records import Footer, SummaryOffset

    out = RecordBuilder()
    offsets: list[SummaryOffset] = []
    for opcode, records in _groups(found):
        first = out.count
        for record in records:
            if isinstance(record, bytes):
                out.write(record)
            else:
                record.write(out)
        if out.count > first:
            offsets.append(SummaryOffset(Opcode(opcode), out.count - first, start + first))
    offsets_start = start + out.count
    for offset in offsets:
        offset.write(out)
    summary = _bytes(out)
    head = (
        bytes([FOOTER]) + (20).to_bytes(8, "little") + start.to_bytes(8, "little") + offsets_start.to_bytes(8, "little")
    )
    Footer(start, offsets_start, zlib.crc32(head, zlib.crc32(summary))).write(out)
    return summary + _bytes(out) + MAGIC


def _groups(found: Scan) -> Iterable[tuple[int, list[McapRecord | bytes]]]:
    """The records of the summary, kind by kind."""
    from mcap.opcode import Opcode
    from mcap.records import ChunkIndex, MetadataIndex

    yield Opcode.SCHEMA, [_record(Opcode.SCHEMA, body) for body in found.schemas.values()]
    yield Opcode.CHANNEL, [_record(Opcode.CHANNEL, channel.body) for channel in found.channels.values()]
    yield Opcode.STATISTICS, [_statistics(found)]
    yield (
        Opcode.CHUNK_INDEX,
        [
            ChunkIndex(
                chunk_length=chunk.length,
                chunk_start_offset=chunk.start,
                compression=chunk.compression,
                compressed_size=chunk.compressed,
                message_end_time=chunk.last_ns,
                message_index_length=chunk.index_length,
                message_index_offsets=chunk.index_offsets,
                message_start_time=chunk.first_ns,
                uncompressed_size=chunk.uncompressed,
            )
            for chunk in found.chunks
        ],
    )
    yield (
        Opcode.METADATA_INDEX,
        [MetadataIndex(offset=start, length=length, name=name) for name, start, length in found.metadata_places],
    )


def _statistics(found: Scan) -> McapRecord:
    from mcap.records import Statistics

    counts = dict.fromkeys(found.channels, 0)
    for message in found.messages:
        counts[message.channel] += 1
    times = [message.time_ns for message in found.messages]
    return Statistics(
        attachment_count=0,  # the recorder writes none
        channel_count=len(found.channels),
        channel_message_counts=counts,
        chunk_count=len(found.chunks),
        message_count=len(times),
        message_end_time=max(times, default=0),
        message_start_time=min(times, default=0),
        metadata_count=len(found.metadata_places),
        schema_count=len(found.schemas),
    )


def _bytes(out: RecordBuilder) -> bytes:
    data: bytes = out.end()  # type: ignore[no-untyped-call]
    return data


def _record(opcode: int, body: bytes) -> bytes:
    return bytes([opcode]) + len(body).to_bytes(8, "little") + body
