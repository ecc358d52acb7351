"""Policy services that really listen: in a thread of the test, or as the process that a user starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Manifest
from runtime.policy import ActionChunk, Policy
from runtime.service.app import Limits, Service
from runtime.service.server import Running, listen, url_of
from runtime.service.sessions import SteppingPolicy

ROOT = Path(__file__).resolve().parents[3]
KEY = "a-key-that-nobody-guesses"
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Served:
    """A running service, and an HTTP client that has its key."""

    url: str
    http: httpx.Client
    service: Service
    fatal: threading.Event


Serving = Callable[..., AbstractContextManager[Served]]


class Gated:
    """A policy whose steps wait until they are let through."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.manifest, self.backend, self.window = policy.manifest, policy.backend, policy.window
        self.reset, self.run_action_head, self.close = policy.reset, policy.run_action_head, policy.close
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.steps, self.together, self.most = 0, 0, 0
        self.fail: Exception | None = None

    def step(self, frame: NDArray[np.uint8]) -> ActionChunk:
        self.together += 1
        self.most = max(self.most, self.together)
        self.entered.release()
        try:
            assert self.gate.wait(PATIENCE_S)
            if self.fail is not None:
                raise self.fail
            self.steps += 1
            return self._policy.step(frame)
        finally:
            self.together -= 1

    def wait_for_steps(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.steps < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextmanager
def serve_bundle(
    bundle: Path,
    *,
    key: str | None = None,
    limits: Limits | None = None,
    policy: SteppingPolicy | None = None,
    port: int = 0,
) -> Iterator[Served]:
    """A service in a thread of this process."""
    limits = limits or Limits()
    fatal, ready = threading.Event(), threading.Event()
    policy = policy or Policy.load(bundle, "ort:cpu", threads=1)
    service = Service(policy, Manifest.load(bundle), limits, on_fatal=fatal.set)
    sock = listen("127.0.0.1", port, key)
    url = url_of(sock)
    running = Running(
        service,
        sock,
        key,
        request_timeout_s=limits.request_timeout_s,
        max_connections=limits.max_connections,
        on_ready=ready.set,
    )
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        assert ready.wait(PATIENCE_S)
        headers = {} if key is None else {"X-API-Key": key}
        with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S, trust_env=False, verify=False) as http:
            yield Served(url, http, service, fatal)
    finally:
        running.stop()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


@dataclass(frozen=True)
class ServiceProcess:
    """runtime/serve.py as a process."""

    url: str
    process: subprocess.Popen[str]


def start_service(*arguments: str | Path, first: str = "", **environment: str) -> subprocess.Popen[str]:
    """Start runtime/serve.py, in a process that executes `first` before; its first line tells where it listens."""
    run = f"import runpy, sys; del sys.argv[0]; {first or 'pass'}; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", run, ROOT / "runtime" / "serve.py", *arguments, "--json", "--threads", "1"]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@contextmanager
def service_process(*arguments: str | Path, first: str = "", **environment: str) -> Iterator[ServiceProcess]:
    """A service that answers, killed in the end."""
    with start_service(*arguments, first=first, **environment) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield ServiceProcess(json.loads(line)["url"], process)
        finally:
            process.kill()
