"""Whatever lies in the recorder's folder under the name of a recording, a start stays small and says what it left alone."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

pytest.importorskip("mcap")
pytest.importorskip("zstandard")

import zstandard

from episodes.recording_repair import is_finished
from runtime.recorder import recover
from runtime.recorder.recover import recover_file, recover_folder
from tests.recordings import cut_off, drive, record

ROOT = Path(__file__).resolve().parents[3]
NAME = "000007-x-20260101-000000.mcap"
MB = 1 << 20

START = """
import json, resource, sys, time
from runtime.recorder.flight_recorder import FlightRecorder
from runtime.robot_file import Recorder
from tests.recordings import drive, record, run_info

record(__import__("pathlib").Path(sys.argv[2]), drive(3, time.monotonic()))  # what any start takes
lines = []
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
recorder = FlightRecorder(Recorder(folder=sys.argv[1]), on_problem=lines.append)
recorder.start(run_info())
until = time.monotonic() + 60
while not lines and time.monotonic() < until:
    time.sleep(0.01)
recorder.close()
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([lines, grown, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def text(value: str) -> bytes:
    return struct.pack("<I", len(value)) + value.encode()


def item(opcode: int, body: bytes) -> bytes:
    return struct.pack("<BQ", opcode, len(body)) + body


def unfinished(path: Path, *records: bytes) -> Path:
    """A file that begins as a recording of ours does, and has no end."""
    head = item(1, text("ros2") + text("jetvla flight recorder")) + item(0x0C, text("jetvla") + text(""))
    path.write_bytes(b"\x89MCAP0\r\n" + head + b"".join(records))
    return path


def chunk(records: bytes, size: int, compression: str) -> bytes:
    checksum = zlib.crc32(records) if not compression else 0
    head = struct.pack("<QQQI", 0, 1, size, checksum) + text(compression) + struct.pack("<Q", len(records))
    return item(6, head + records)


def packed(count: int) -> bytes:
    """Messages without content that zstd makes three thousand times smaller; as many MB as `count`."""
    channel = item(4, struct.pack("<HH", 1, 0) + text("/cmd_vel") + text("cdr") + text(""))
    size = count * MB
    message = item(5, struct.pack("<HIQQ", 1, 0, 0, 0))
    records = channel + message * ((size - len(channel)) // len(message))
    return chunk(zstandard.ZstdCompressor().compress(records), len(records), "zstd")


def test_a_small_file_that_unpacks_to_gigabytes_costs_a_start_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    path = unfinished(folder / NAME, packed(120) * 20)  # 2.4 GB
    before = path.read_bytes()
    assert len(before) < MB
    done = subprocess.run(
        [sys.executable, "-c", START, folder, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines, grown_kb, child_kb = json.loads(done.stdout)
    (line,) = lines
    assert line.startswith(f"recorder: left {NAME} unfinished: ")
    assert "a chunk that zstd has compressed" in line
    assert path.read_bytes() == before
    assert grown_kb < 64 << 10
    assert child_kb < 128 << 10


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (item(0x0C, text("x") + text("y" * (65 * MB))), "a record of kind 12"),
        (item(9, bytes(100)), "a record of kind 9 and 100 bytes"),
        (packed(1), "a chunk that zstd has compressed"),
        (chunk(b"", 100, "lz4"), "a chunk that lz4 has compressed"),
    ],
)
def test_what_our_recorder_does_not_write_is_not_cut_off(tmp_path: Path, record: bytes, said: str) -> None:
    path = unfinished(tmp_path / NAME, record)
    size = path.stat().st_size
    lines: list[str] = []
    assert recover_folder(tmp_path, lines.append) == []
    assert said in lines[0]
    assert path.stat().st_size == size


def test_the_child_ends_at_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys; from runtime.recorder import recover_one; recover_one._MEMORY_BYTES = 48 << 20; "
        "sys.exit(recover_one.main(sys.argv[1:]))"
    )
    monkeypatch.setattr(recover, "CHILD", (sys.executable, "-c", program))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = unfinished(tmp_path / NAME, chunk(item(0x80, bytes(40 * MB)), 40 * MB + 9, ""))
    size = path.stat().st_size
    lines: list[str] = []
    assert not recover_file(path, lines.append)
    assert "takes more than 48 MB of memory" in lines[0]
    assert path.stat().st_size == size


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", "too much memory or time, or crashed (SIGXCPU)"),
        ("import time; time.sleep(600)", "did not end within 0.5 s"),
    ],
)
def test_a_child_that_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    path = unfinished(tmp_path / NAME)
    monkeypatch.setattr(recover, "CHILD", (sys.executable, "-c", program))
    monkeypatch.setattr(recover, "FILE_S", 0.5)
    lines: list[str] = []
    assert not recover_file(path, lines.append)
    (line,) = lines
    assert line.startswith(f"left {NAME} unfinished: ")
    assert said in line


def test_the_end_of_a_drive_does_not_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"
    program = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    monkeypatch.setattr(recover, "CHILD", (sys.executable, "-c", program))
    for number in range(3):
        cut_off(record(tmp_path, drive(1, 1000.0 + number)))
    stop, lines = threading.Event(), list[str]()
    thread = threading.Thread(target=recover_folder, args=(tmp_path, lines.append, stop))
    thread.start()
    while not (note.exists() and note.read_text()):
        time.sleep(0.01)
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    assert lines == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert not any(is_finished(path) for path in tmp_path.glob("*.mcap"))
