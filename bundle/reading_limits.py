"""What reading a stranger's file may cost: one budget for everything that parses what others wrote.

Whatever a file says, reading it ends within 10 s of CPU time and takes at most 1 GB more than a sound file of its size: sizes are held
against these limits and against the file before anything is allocated, nesting and counts are bounded, only regular files are opened,
and what a parser raises becomes a typed error. Every limit is ten times or more beyond what labs' files have. Knows nothing about what
files mean.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from bundle.errors import InputFileError, JetvlaError

# Text: training configs, a base's config.json, adapter_config.json have 1 to 50 kB, and some ten levels.
CONFIG_BYTES = 4 << 20
PLAIN_DEPTH = 64
PLAIN_VALUES = 200_000
TEXT_BYTES = 64 << 20  # of lists that grow with the data: runs, splits, measurements
INTEGER_DIGITS = 40  # 128 bits; larger ones are no dimension, count or seed of anything

# Checkpoints: RoboVLMs' own have 2,700 tensors and 0.6 MB of pickle, optimizer states included.
PICKLE_BYTES = 32 << 20
PICKLE_STEPS = 1_000_000
PICKLE_COPIES = 8 << 20  # bytes and items that calls in a pickle copy
SAFETENSORS_HEADER_BYTES = 16 << 20
ZIP_DIRECTORY_BYTES = 16 << 20
TENSORS = 50_000
TENSOR_DIMENSIONS = 8

# Pictures: a 4K camera has 8.3 million pixels; cameras write one scan, progressive encoders ten; a colour profile takes 255 segments.
PICTURE_PIXELS = 40_000_000  # 120 MB decoded
PICTURE_SCANS = 64
PICTURE_SCANNED_PIXELS = PICTURE_SCANS * 8_300_000  # each scan visits every pixel
PICTURE_SEGMENTS = 1024  # beside the pixels
PICTURE_HEADER_BYTES = 8_000_000  # before the pixels of a JPEG

# Episodes, datasets and recordings. Decoded, a camera's pictures are three to thirty times as large as in the file, drawn ones a
# hundred times; a video of a room in which nothing moves, two thousand times.
EPISODE_FRAMES = 250_000  # seven hours at ten a second
EPISODE_VALUE_BYTES = 64 << 20  # of actions, texts or times
EPISODE_TEXT = 65_536  # characters; an instruction has a hundred
EPISODE_CHUNK_BYTES = 512 << 20  # of HDF5, unpacked; some recorders put a whole episode into one
EPISODE_CHUNKS = 2_000_000
EPISODE_CHUNKS_A_FRAME = 4096
EPISODE_SOURCES = 4096  # other files that hold parts of one
EPISODE_LINKS = 16
EPISODE_ATTRIBUTES = 4096
EPISODE_ATTRIBUTE_BYTES = 1 << 20
FREE_PIXEL_BYTES = 256 << 20  # decoded, however few bytes hold them
PIXEL_BYTES_A_BYTE = 200
FREE_VIDEO_BYTES = 2 << 30
VIDEO_BYTES_A_BYTE = 2000
TABLE_ROWS = 5_000_000  # of Parquet
TABLE_VALUES = 40_000_000
TABLE_HEADER_ITEMS = 1_000_000
TABLE_FREE_BYTES, TABLE_BYTES_A_BYTE = 64 << 20, 2  # unpacked; pictures and sensor values hardly shrink
RECORDING_CHUNK_BYTES = 128 << 20  # of MCAP, unpacked
RECORDING_FREE_BYTES, RECORDING_BYTES_A_BYTE = 256 << 20, 50
# Of a record of our own recorder, which ends chunks at 8 MB and the message that exceeds them.
RECORDED_RECORD_BYTES = 64 << 20
RECORDING_MESSAGES, RECORDING_BYTES_A_MESSAGE = 200_000, 64

_SHOWN = 80
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular_file(
    path: Path, *, error: type[JetvlaError] = InputFileError, hint: str = "correct the path."
) -> os.stat_result:
    """Refuse what is no regular file (links are followed): a pipe or a device never ends, or never begins.

    Raises:
        error: there is none, it is of another kind, or the path is no path.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise error(f"{path} does not exist", hint="correct the path.") from None
    except (OSError, ValueError) as problem:
        raise error(f"{_shown(path)} cannot be opened", got=problem, expected="a file", hint=hint) from None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise error(f"{path} is {kind}", got=kind, expected="a file", hint=hint)
    return found


def open_regular(path: Path, *, error: type[JetvlaError] = InputFileError, hint: str = "correct the path.") -> BinaryIO:
    """A regular file, opened for reading without a buffer; it cannot become a pipe between the check and the opening.

    Raises:
        error: as `check_regular_file`, or no permission.
    """
    check_regular_file(path, error=error, hint=hint)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as problem:
        raise error(f"{path} cannot be opened", got=problem, expected="a file", hint=hint) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path} was exchanged while it was opened", expected="a file", hint=hint)
    return os.fdopen(descriptor, "rb", buffering=0)


def read_limited(
    path: Path, limit: int, *, error: type[JetvlaError] = InputFileError, hint: str = "correct the path."
) -> bytes:
    """A whole file of at most `limit` bytes, whatever size it claims to have.

    Raises:
        error: as `open_regular`, larger, or unreadable.
    """
    with open_regular(path, error=error, hint=hint) as file:
        pieces, length = [], 0
        try:
            while length <= limit and (piece := file.read(limit + 1 - length)):
                pieces.append(piece)
                length += len(piece)
        except OSError as problem:
            raise error(f"{path} cannot be read", got=problem, hint=hint) from None
    if length > limit:
        raise error(f"{path} is too large", got=f"more than {limit} bytes", expected=f"at most {limit}", hint=hint)
    return b"".join(pieces)


def read_bytes(path: Path, limit: int = CONFIG_BYTES) -> bytes:
    """`read_limited` for callers with words of their own for a file that cannot be read.

    Raises:
        OSError: none, no regular file, larger than `limit` bytes, or unreadable; strerror says it.
    """
    try:
        return read_limited(path, limit)
    except InputFileError as error:
        if not is_there(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        found = error.what.removeprefix(f"{path} ")
        raise OSError(
            errno.EINVAL, found if error.expected is None else f"{found}; {error.expected}", str(path)
        ) from None


def read_json(
    path: Path,
    limit: int = CONFIG_BYTES,
    *,
    error: type[JetvlaError] = InputFileError,
    hint: str = "correct the path.",
) -> Any:
    """A JSON file within the budget; see `parse_json`.

    Raises:
        error: as `read_limited` and `parse_json`.
    """
    return parse_json(read_limited(path, limit, error=error, hint=hint), origin=str(path), error=error, hint=hint)


def parse_json(
    text: bytes | str,
    *,
    origin: str,
    error: type[JetvlaError] = InputFileError,
    hint: str = "write the file again.",
) -> Any:
    """JSON with bounded nesting, counts and integers. The caller has bounded its size.

    Args:
        origin: what to call it in messages, usually its file.

    Raises:
        error: not JSON, not UTF-8, or beyond the budget.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise _deep(origin, error, hint) from None
    except ValueError as problem:
        raise error(f"{origin} is not JSON", got=problem, hint=hint) from None
    check_plain(value, origin=origin, error=error, hint=hint)
    return value


def check_plain(
    value: object,
    *,
    origin: str,
    error: type[JetvlaError] = InputFileError,
    hint: str = "write the file again.",
) -> None:
    """Hold plain data against the budget as the tree that it is written out as: a list that stands in itself, or lists of the same list
    many times over, are small in memory and endless for everything that walks them.

    Raises:
        error: too deep, too many values, or integers too large.
    """
    bound = 10**INTEGER_DIGITS
    waiting: list[tuple[object, int]] = [(value, 0)]
    count = 0
    while waiting:
        each, depth = waiting.pop()
        count += 1
        if isinstance(each, int) and not -bound < each < bound:
            raise error(
                f"{origin} holds an integer beyond all use",
                got=f"{each.bit_length()} bits",
                expected=f"at most {INTEGER_DIGITS} digits",
                hint=hint,
            )
        if isinstance(each, str) and not each.isascii():
            _check_text(each, origin, error, hint)
        if not isinstance(each, dict | list | tuple | set | frozenset):
            continue
        if depth >= PLAIN_DEPTH:
            raise _deep(origin, error, hint)
        if count + len(waiting) + len(each) > PLAIN_VALUES:
            raise error(
                f"{origin} holds too many values", got="more", expected=f"at most {PLAIN_VALUES} written out", hint=hint
            )
        waiting += [(inner, depth + 1) for inner in (each.values() if isinstance(each, dict) else each)]
        if isinstance(each, dict):
            waiting += [(key, depth + 1) for key in each if not (isinstance(key, str) and key.isascii())]


def is_there(path: Path) -> bool:
    """Whether a path that stands in somebody's file leads to anything; a text that is no path does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _check_text(text: str, origin: str, error: type[JetvlaError], hint: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        found = ascii(text[:_SHOWN])
        raise error(f"{origin} holds a text that is none", got=found, expected="Unicode", hint=hint) from None


def _integer(digits: str) -> int:
    if (count := len(digits.lstrip("-"))) > INTEGER_DIGITS:
        raise ValueError(f"an integer of {count} digits, more than {INTEGER_DIGITS}")
    return int(digits)


def _deep(origin: str, error: type[JetvlaError], hint: str) -> JetvlaError:
    return error(f"{origin} is nested too deeply", got="more", expected=f"at most {PLAIN_DEPTH} levels", hint=hint)


def _shown(path: Path) -> str:
    """A path that may be no path: short, and without characters that a terminal obeys."""
    text = repr(str(path))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
