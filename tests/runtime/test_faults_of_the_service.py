"""Faults that come over the network: a service drives a robot while somebody else misuses it. See test_faults.py for the others."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.bundles import GO_LEFT, Tiny
from tests.runtime.drives import Drive, driving
from tests.runtime.faults import SLACK_S, UNDECIDED_S, Fault, fault, judge
from tests.runtime.service.serving import KEY, ServiceProcess, service_process

GOES_ON = "the service refuses it, and goes on driving the robot"
UNAUTHORISED = fault("unauthorised request", f"401, before its body is read; {GOES_ON}")
HUGE = fault("100 MB upload", f"413, without taking it into memory; {GOES_ON}")
MALFORMED = fault("malformed JPEG", f"422; {GOES_ON}")


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@contextmanager
def served_drive(bundle: Path, folder: Path) -> Iterator[tuple[Drive, ServiceProcess]]:
    """A robot that drives on what a service decides."""
    key_file = folder / "key"
    key_file.write_text(KEY)
    key_file.chmod(0o600)
    with (
        service_process(bundle, "--api-key-file", key_file, "--port", "0") as service,
        driving(bundle, folder, "--server", service.url, "--server-key-file", key_file) as drive,
    ):
        drive.until_moving()
        yield drive, service


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ask(service: ServiceProcess, content: bytes, *, key: str | None = KEY) -> httpx.Response:
    headers = {} if key is None else {"X-API-Key": key}
    fields = {"instruction": GO_LEFT, "session": "somebody-else"}
    with httpx.Client(trust_env=False, timeout=60) as http:
        return http.post(f"{service.url}/predict", headers=headers, data=fields, files={"image": ("a.jpg", content)})


@pytest.mark.parametrize(
    ("case", "content", "key", "code"),
    [
        (UNAUTHORISED, jpeg(), None, 401),
        (UNAUTHORISED, jpeg(), "a guess", 401),
        (HUGE, b"\xff\xd8" + bytes(100_000_000), KEY, 413),
        (MALFORMED, jpeg()[:-500], KEY, 422),
    ],
    ids=["no key", "wrong key", "100 MB", "malformed"],
)
def test_misuse(tiny_bundle, tmp_path: Path, case: Fault, content: bytes, key: str | None, code: int) -> None:
    with served_drive(tiny_bundle(Tiny()), tmp_path) as (drive, service):
        before = resident_bytes(service.process.pid)
        try:
            assert ask(service, content, key=key).status_code == code
        except httpx.TransportError:
            # Refused by its length alone, the connection may be closed under what is still being sent.
            assert case is HUGE
        assert resident_bytes(service.process.pid) - before < 50e6
        commands = len(drive.plant.log)
        drive.until(lambda: sum(not twist.is_zero for _, twist in drive.plant.log[commands:]) > 10)
        assert ask(service, jpeg()).status_code == 200
        drive.signal(signal.SIGTERM)
        assert drive.end() == 0, drive.said
    judge(case, None)


def test_a_service_that_dies_stops_the_robot(tiny_bundle, tmp_path: Path) -> None:
    with served_drive(tiny_bundle(Tiny()), tmp_path) as (drive, service):
        assert drive.stands_after(service.process.kill) <= UNDECIDED_S + SLACK_S


def test_a_service_that_freezes_stops_the_robot_and_drives_on_when_it_thaws(tiny_bundle, tmp_path: Path) -> None:
    with served_drive(tiny_bundle(Tiny()), tmp_path) as (drive, service):
        frozen = drive.stands_after(lambda: service.process.send_signal(signal.SIGSTOP))
        assert frozen <= UNDECIDED_S + SLACK_S
        service.process.send_signal(signal.SIGCONT)
        drive.until_moving()
