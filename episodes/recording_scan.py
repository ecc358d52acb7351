"""Walks through an MCAP file from its beginning to where it stops being whole, and says what is where.

A finished file has an index at its end, but what a crash left has none, so nothing here relies on one: one pass, in which every chunk is
checked by its checksum. In a finished file any damage is an error. An unfinished one is good up to the first damage; what follows is
what was being written when the end came.

Reads the format itself (https://mcap.dev/spec) rather than through the mcap library, which stops at a torn record without telling where.
Knows nothing about what the messages mean.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from bundle.errors import RecordingError
from bundle.reading_limits import (
    RECORDED_RECORD_BYTES,
    RECORDING_BYTES_A_BYTE,
    RECORDING_BYTES_A_MESSAGE,
    RECORDING_CHUNK_BYTES,
    RECORDING_FREE_BYTES,
    RECORDING_MESSAGES,
    check_regular_file,
)
from episodes.recording_chunks import Damage, unpack

MAGIC = b"\x89MCAP0\r\n"
METADATA_NAME = "jetvla"  # of what a flight recording says about its run
HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX = range(1, 8)
ATTACHMENT, METADATA, DATA_END = 0x09, 0x0C, 0x0F
_DATA = frozenset({HEADER, SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX, ATTACHMENT, METADATA, DATA_END})
_PRIVATE = 0x80  # and above: of other programs, to be skipped
_RECORD = struct.Struct("<BQ")
_MESSAGE = struct.Struct("<HIQQ")
_CHUNK = struct.Struct("<QQQI")
_FOOTER_BYTES = 9 + 20 + 8
_PACKED = ("zstd", "lz4")  # how others write chunks
_MOST_TEXTS = 10_000  # of one metadata record
COPY_AGAIN = "copy it again from the robot; if it is like this there too, the disk has damaged it: leave it out."


@dataclass(frozen=True)
class Channel:
    """One kind of message in the file; `schema` is the name of its type, `body` the record as it is stored."""

    topic: str
    schema: str
    encoding: str
    schema_id: int
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class MessagePlace:
    """A message: `offset` within the records of `chunk`. `data` only where it was asked for."""

    channel: int
    time_ns: int
    chunk: int
    offset: int
    length: int
    data: bytes | None = field(repr=False)


@dataclass
class ChunkPlace:
    """A chunk record: where it starts, its body, and the indexes behind it (offset by channel)."""

    start: int
    length: int
    records_start: int
    compression: str
    compressed: int
    uncompressed: int
    first_ns: int
    last_ns: int
    counts: dict[int, int]
    index_entries: dict[int, list[tuple[int, int]]]
    index_offsets: dict[int, int] = field(default_factory=dict)
    index_length: int = 0

    @property
    def is_indexed(self) -> bool:
        """All of its indexes are there."""
        return self.index_offsets.keys() == self.counts.keys()


@dataclass
class Scan:
    """What is in a file.

    Attributes:
        finished: it has its end.
        good_end: where its data end: at the record that ends them, or where an unfinished file stops being whole.
        size: of the file.
        metadata: by name, and where each is (start, length).
        schemas: records as they are stored, by number.
        unpacked: bytes of the records of all chunks.
        ours: nothing but what the flight recorder writes is read.
    """

    path: Path
    finished: bool
    size: int
    ours: bool = False
    good_end: int = len(MAGIC)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    metadata_places: list[tuple[str, int, int]] = field(default_factory=list)
    schemas: dict[int, bytes] = field(default_factory=dict)
    channels: dict[int, Channel] = field(default_factory=dict)
    chunks: list[ChunkPlace] = field(default_factory=list)
    messages: list[MessagePlace] = field(default_factory=list)
    unpacked: int = 0


def has_end(file: BinaryIO, size: int) -> bool:
    """Whether an MCAP file has its footer; looks at the last bytes only."""
    if size < len(MAGIC) + _FOOTER_BYTES:
        return False
    file.seek(size - _FOOTER_BYTES)
    tail = file.read(_FOOTER_BYTES)
    return tail[:9] == _RECORD.pack(FOOTER, 20) and tail[-len(MAGIC) :] == MAGIC


def scan(path: Path, wanted: Collection[str] = (), *, ours: bool = False) -> Scan:
    """Walk through a file.

    Args:
        wanted: topics whose messages are kept in memory; of others only the place is noted.
        ours: read nothing but what the flight recorder writes, and so unpack nothing.

    Raises:
        RecordingError: missing, unreadable, no MCAP file, finished and damaged, or not ours where it has to be.
    """
    try:
        if path.exists() and not path.is_dir():  # said below
            check_regular_file(path, error=RecordingError, hint=COPY_AGAIN)
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size < len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
                file.seek(0)
                raise RecordingError(
                    f"{path} is no MCAP file",
                    got=f"{size} bytes, starting with {file.read(16)!r}" if size else "an empty file (0 bytes)",
                    expected="a flight recording",
                    hint=COPY_AGAIN,
                )
            found = Scan(path, has_end(file, size), size, ours)
            _walk(file, found, wanted)
    except OSError as error:
        raise RecordingError(
            f"cannot read {path}",
            got=error.strerror or error,
            expected="a flight recording, a file NAME.mcap",
            hint="check the path and that the disk with the recordings is mounted.",
        ) from None
    return found


def read_records(file: BinaryIO, chunk: ChunkPlace) -> bytes:
    """The records of a chunk, decompressed.

    Raises:
        RecordingError: they cannot be decompressed.
        OSError: they cannot be read.
    """
    file.seek(chunk.records_start)
    try:
        return unpack(file.read(chunk.compressed), chunk.compression, chunk.uncompressed)
    except Damage as damage:
        raise RecordingError(f"the chunk at byte {chunk.start} is damaged", got=damage, hint=COPY_AGAIN) from None


def _walk(file: BinaryIO, found: Scan, wanted: Collection[str]) -> None:
    position = len(MAGIC)
    seen_header = False
    while position < found.size:
        try:
            opcode, length = _RECORD.unpack(_read(file, position, _RECORD.size, found.size))
            body = position + _RECORD.size
            known = opcode in _DATA or (opcode >= _PRIVATE and found.finished)
            if not known or length > found.size - body:
                raise Damage(f"a record of kind {opcode} and {length} bytes")
            if not seen_header and opcode != HEADER:
                raise Damage("no header")
            seen_header = True
            if opcode == DATA_END:
                break
            try:
                _take(file, found, opcode, position, length, wanted)
            except (struct.error, ValueError, IndexError) as error:
                raise Damage(f"a record of kind {opcode}: {error}") from None
        except Damage as damage:
            if found.finished:
                raise RecordingError(
                    f"{found.path} is damaged at byte {position} of {found.size}",
                    got=damage,
                    expected="records as they were written",
                    hint=COPY_AGAIN,
                ) from None
            break
        position = body + length
        found.good_end = position


def _take(file: BinaryIO, found: Scan, opcode: int, start: int, length: int, wanted: Collection[str]) -> None:
    if found.ours and (opcode == ATTACHMENT or length > RECORDED_RECORD_BYTES):
        raise _foreign(found, f"a record of kind {opcode} and {length} bytes at byte {start}")
    if opcode not in (SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX, METADATA):
        return
    if length > RECORDING_CHUNK_BYTES:
        raise Damage(f"a record of {length} bytes")
    body = _read(file, start + _RECORD.size, length, found.size)
    _require_few(found, found)
    if opcode == METADATA:
        name, position = _text(body, 0)
        found.metadata[name] = _texts(body, position)
        found.metadata_places.append((name, start, _RECORD.size + length))
    elif opcode == CHUNK:
        _take_chunk(found, body, start, wanted)
    elif opcode == MESSAGE_INDEX:
        if found.chunks:
            _take_index(found.chunks[-1], body, start)
    else:
        _take_inner(found, opcode, body, -1, start + _RECORD.size, wanted, None)


def _take_index(chunk: ChunkPlace, body: bytes, start: int) -> None:
    """Indexes have no checksum; they are compared with what they speak of."""
    channel, length = struct.unpack_from("<HI", body)
    entries = list(struct.iter_unpack("<QQ", body[6:]))
    if length != len(body) - 6 or sorted(entries) != sorted(chunk.index_entries.get(channel, [])):
        raise Damage(f"an index that does not fit its chunk, of channel {channel}")
    if entries:  # others write empty ones too
        chunk.index_offsets[channel] = start
    chunk.index_length += _RECORD.size + len(body)


def _take_chunk(found: Scan, body: bytes, start: int, wanted: Collection[str]) -> None:
    first, last, uncompressed, checksum = _CHUNK.unpack_from(body)
    compression, position = _text(body, _CHUNK.size)
    (compressed,) = struct.unpack_from("<Q", body, position)
    position += 8
    if found.ours and compression in _PACKED:
        raise _foreign(found, f"a chunk that {compression} has compressed, at byte {start}")
    if compressed != len(body) - position or uncompressed > RECORDING_CHUNK_BYTES:
        raise Damage(f"a chunk of {compressed} bytes")
    found.unpacked += uncompressed
    most = RECORDING_FREE_BYTES + RECORDING_BYTES_A_BYTE * found.size
    if found.unpacked > most:
        raise Damage(f"chunks that unpack to {found.unpacked} bytes, more than {most}")
    records = unpack(body[position:], compression, uncompressed)
    if checksum and zlib.crc32(records) != checksum:
        raise Damage("a chunk with a wrong checksum")
    place = start + _RECORD.size + position
    length = _RECORD.size + len(body)
    chunk = ChunkPlace(start, length, place, compression, compressed, uncompressed, first, last, {}, {})
    # Whole chunks only: what is found is kept aside until all of it is known to be good.
    part = Scan(found.path, found.finished, found.size, schemas=dict(found.schemas), channels=dict(found.channels))
    inner = 0
    while inner < len(records):
        opcode, length = _RECORD.unpack_from(records, inner)
        stop = inner + _RECORD.size + length
        if stop > len(records):
            raise Damage("a chunk with a torn record")
        if opcode in (SCHEMA, CHANNEL, MESSAGE):
            data = records[inner + _RECORD.size : stop]
            _take_inner(part, opcode, data, len(found.chunks), inner + _RECORD.size, wanted, chunk)
        _require_few(found, part)
        inner = stop
    found.schemas, found.channels = part.schemas, part.channels
    found.messages += part.messages
    found.chunks.append(chunk)


def _foreign(found: Scan, got: str) -> RecordingError:
    """No Damage: behind that, a repair would cut off what is whole."""
    return RecordingError(
        f"{found.path} was not written by the flight recorder",
        got=got,
        expected=f"messages without compression, records of at most {RECORDED_RECORD_BYTES} bytes, no attachments",
        hint="the mcap command line tool repairs any: mcap recover",
    )


def _require_few(found: Scan, part: Scan) -> None:
    """Refuse messages that take more memory than the bytes that hold them: compressed, those without content take none."""
    count = len(found.messages) + (len(part.messages) if part is not found else 0)
    if count > RECORDING_MESSAGES + found.size // RECORDING_BYTES_A_MESSAGE:
        said = f"{count} messages in {found.size} bytes"
        raise _foreign(found, said) if found.ours else Damage(said)


def _take_inner(
    found: Scan, opcode: int, body: bytes, chunk: int, offset: int, wanted: Collection[str], place: ChunkPlace | None
) -> None:
    """A record that may stand in a chunk or outside; `offset` is where its body is."""
    if opcode == SCHEMA:
        found.schemas[int.from_bytes(body[:2], "little")] = body
    elif opcode == CHANNEL:
        number, schema = struct.unpack_from("<HH", body)
        topic, position = _text(body, 4)
        encoding, _ = _text(body, position)
        if schema and schema not in found.schemas:
            raise Damage(f"channel {number} without its schema")
        name = _text(found.schemas[schema], 2)[0] if schema else ""
        found.channels[number] = Channel(topic, name, encoding, schema, body)
    else:
        channel, _, time_ns, _ = _MESSAGE.unpack_from(body)
        if channel not in found.channels:
            raise Damage(f"a message of channel {channel}, which is not described")
        keep = found.channels[channel].topic in wanted
        data = body[_MESSAGE.size :] if keep else None
        length = len(body) - _MESSAGE.size
        found.messages.append(MessagePlace(channel, time_ns, chunk, offset + _MESSAGE.size, length, data))
        if place is not None:
            place.counts[channel] = place.counts.get(channel, 0) + 1
            place.index_entries.setdefault(channel, []).append((time_ns, offset - _RECORD.size))


def _read(file: BinaryIO, position: int, count: int, size: int) -> bytes:
    if position + count > size:
        raise Damage("the file ends within a record")
    file.seek(position)
    data = file.read(count)
    if len(data) < count:  # it became shorter while it was read
        raise Damage("the file ends within a record")
    return data


def _text(body: bytes, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<I", body, position)
    stop = position + 4 + length
    if stop > len(body):
        raise Damage(f"a text of {length} bytes")
    return body[position + 4 : stop].decode("utf-8"), stop


def _texts(body: bytes, position: int) -> dict[str, str]:
    (length,) = struct.unpack_from("<I", body, position)
    position, stop = position + 4, position + 4 + length
    if stop > len(body):
        raise Damage(f"texts of {length} bytes")
    texts: dict[str, str] = {}
    while position < stop:
        if len(texts) >= _MOST_TEXTS:
            raise Damage(f"more than {_MOST_TEXTS} texts in one record")
        key, position = _text(body, position)
        texts[key], position = _text(body, position)
    return texts
