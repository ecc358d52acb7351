#!/usr/bin/env python3
"""Command line: a bundle as an HTTP service, for robots whose computer is too small for the policy.

    python runtime/serve.py BUNDLE
    python runtime/serve.py BUNDLE --host 0.0.0.0 --api-key-file key.txt

Exit codes: 0 ended by a signal, 1 failed, 2 usage.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console
from rich.markup import escape

from bundle.errors import BackendError, ConfigError, JetvlaError
from bundle.manifest import Manifest
from runtime.backends.select import PrecisionChoice
from runtime.policy import Policy
from runtime.precision import int8_notes
from runtime.service.security import is_loopback, read_key
from runtime.service.server import Running, check_installed, listen, url_of


@dataclass(frozen=True)
class ServeConfig:
    """Serve a bundle. A key stands in a file or in the environment as JETVLA_API_KEY, never on the command line.

    Attributes:
        bundle: directory made by export/build_engines.py.
        host: address to listen on; anything but loopback needs a key.
        port: to listen on; 0 takes a free one.
        api_key_file: one line, mode 600.
        backend: auto, trt, ort, ort:cpu, ort:cuda, ort:tensorrt, ort:tensorrt-rtx, ort:openvino or fake.
        precision: int8 runs the bundle's INT8 variant, float what it was exported in; auto takes INT8 where it is good and fast.
        threads: CPU threads; 0 takes all.
        max_sessions: robots at the same time.
        session_expiry_s: an unused session is forgotten after so long.
        max_upload_mb: of one request.
        max_pixels: of one picture.
        skip_hashes: trust the files; saves seconds at the start of a full-size bundle.
        json: one line of JSON on stdout, once it answers.
    """

    bundle: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    backend: str = "auto"
    precision: PrecisionChoice = "auto"
    threads: int = 0
    max_sessions: int = 16
    session_expiry_s: float = 300.0
    max_upload_mb: float = 8.0
    max_pixels: int = 8_300_000
    skip_hashes: bool = False
    json: bool = False


def main() -> int:
    """Parse, serve."""
    config = tyro.cli(ServeConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    try:
        serve(config, console)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        console.print("interrupted.")
    return 0


def serve(config: ServeConfig, console: Console) -> None:
    """Load and serve until a signal.

    Raises:
        JetvlaError: see Policy.load, runtime.service.server.listen and runtime.service.security.read_key; BackendError also when only a
            new process can go on.
    """
    check_installed()
    from runtime.service.app import Limits, Service

    for name in ("max_sessions", "session_expiry_s", "max_upload_mb", "max_pixels"):
        if getattr(config, name) <= 0:
            raise ConfigError(
                f"--{name.replace('_', '-')} must be positive",
                got=getattr(config, name),
                hint="leave it out for the default.",
            )
    key = read_key(config.api_key_file)
    sock = listen(config.host, config.port, key)
    with sock:
        start = time.perf_counter()
        with console.status(escape(f"loading {config.bundle}")):
            policy = Policy.load(
                config.bundle,
                config.backend,
                precision=config.precision,
                verify=not config.skip_hashes,
                threads=config.threads,
            )
        load_s = time.perf_counter() - start
        cameras = policy.manifest.preprocessing.cameras
        if cameras != ("static",):
            raise ConfigError(
                "a policy with a hand camera is not served",
                got=", ".join(cameras),
                expected="static",
                hint="run it on the robot.",
            )
        failed: list[str] = []

        def fail() -> None:
            failed.append(policy.backend)
            running.stop()

        def end() -> None:
            console.print("ended; what was still at work was dropped.")
            os._exit(1 if failed else 0)

        def ready() -> None:
            manifest, url = policy.manifest, url_of(sock)
            console.print(
                f"{config.bundle}: {manifest.precision}, backend {policy.backend}, loaded in {load_s:.2f} s, "
                f"bundle {manifest.manifest_sha256[:12]}",
                markup=False,
                soft_wrap=True,
            )
            notes = int8_notes(policy, config.precision)
            for note in notes:
                console.print(note, markup=False, soft_wrap=True)
            if key is None:
                console.print("no key: only programs on this machine can ask")
            elif not is_loopback(str(sock.getsockname()[0])):
                console.print(
                    "[yellow]warning:[/] plain HTTP: whoever is on the network sees pictures and key (docs/policy-service.md)",
                    soft_wrap=True,
                )
            facts = {
                "url": url,
                "backend": policy.backend,
                "precision": manifest.precision,
                "load_s": load_s,
                "notes": notes,
            }
            print(json.dumps(facts) if config.json else url, flush=True)

        limits = Limits(
            max_sessions=config.max_sessions,
            session_expiry_s=config.session_expiry_s,
            max_upload_mb=config.max_upload_mb,
            max_pixels=config.max_pixels,
        )
        running = Running(
            Service(policy, Manifest.load(config.bundle), limits, on_fatal=fail),
            sock,
            key,
            request_timeout_s=limits.request_timeout_s,
            max_connections=limits.max_connections,
            on_ready=ready,
            on_overdue=end,
        )
        running.run()
        if failed:
            raise BackendError(
                f"the backend {failed[0]} is lost",
                expected="a device that works",
                hint="start the service again; under systemd, Restart=on-failure does.",
            )
        console.print("ended.")


if __name__ == "__main__":
    sys.exit(main())
