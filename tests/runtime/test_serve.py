"""The service as a process, as a user starts it and ends it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from runtime.policy import Policy
from runtime.service.client import RemotePolicy
from runtime.service.security import KEY_VARIABLE
from tests.bundles import GO_LEFT, Tiny, make_bundle, random_frames
from tests.runtime.service.serving import KEY, PATIENCE_S, ROOT, service_process, start_service


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("serve") / "tiny.bundle")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key.txt"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    return path


def ended(*arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a service that does not start."""
    with start_service(*arguments, **environment) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    return process.returncode, out, " ".join(err.split())


def test_a_service_on_the_network_with_a_key(bundle: Path, key_file: Path) -> None:
    """All of it in one process: answers, refusals that cost no memory, a robot, and an orderly end."""
    with service_process(
        bundle, "--host", "0.0.0.0", "--port", "0", "--api-key-file", key_file, "--backend", "ort:cpu"
    ) as service:
        assert service.url.startswith(f"http://{socket.gethostname()}:")
        url = f"http://127.0.0.1:{service.url.rpartition(':')[2]}"
        with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False, verify=False) as http:
            assert http.get("/health").json()["status"] == "ok"
            assert http.get("/policy").status_code == 401
            before = _peak_kb(service.process.pid)
            for headers, expected in (({}, 401), ({"X-API-Key": KEY, "content-type": "application/json"}, 413)):
                answer = http.post("/predict", content=(b"a" * 1_000_000 for _ in range(100)), headers=headers)
                assert answer.status_code == expected
            assert _peak_kb(service.process.pid) - before < 30_000
            # In plain sight of every user of this machine, and without the key.
            command = Path(f"/proc/{service.process.pid}/cmdline").read_bytes()
            assert str(key_file).encode() in command
            assert KEY.encode() not in command
        local = Policy.load(bundle, "ort:cpu", threads=1)
        remote = RemotePolicy(url, key=KEY, timeout_s=PATIENCE_S)
        for policy in (local, remote):
            policy.reset(GO_LEFT)
        for frame in random_frames(4)[:, 0]:
            np.testing.assert_array_equal(remote.step(frame).values, local.step(frame).values)
        remote.close()
        local.close()
        service.process.send_signal(signal.SIGTERM)
        out, err = service.process.communicate(timeout=PATIENCE_S)
        assert service.process.returncode == 0, err
        assert out == ""
        assert "Traceback" not in err
        assert "warning: plain HTTP" in " ".join(err.split())
        assert err.rstrip().endswith("ended.")
        assert KEY not in err


def test_ctrl_c_ends_it_though_a_robot_is_connected(bundle: Path) -> None:
    with service_process(bundle, "--port", "0", "--backend", "ort:cpu") as service:
        remote = RemotePolicy(service.url, timeout_s=PATIENCE_S)
        remote.reset(GO_LEFT)
        service.process.send_signal(signal.SIGINT)
        _, err = service.process.communicate(timeout=PATIENCE_S)
        assert (service.process.returncode, "Traceback" in err) == (0, False)
        remote.close()


def test_the_port_is_free_again_at_once_and_otherwise_named(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, out, err = ended(bundle, "--port", port)
    assert (code, out) == (1, "")
    assert f"ServiceError cannot listen on 127.0.0.1:{port}" in err
    assert "Address already in use" in err
    assert "hint:" in err


def test_the_network_without_a_key_is_refused(bundle: Path) -> None:
    code, out, err = ended(bundle, "--host", "0.0.0.0", "--port", "0")
    assert (code, out) == (2, "")
    assert "without a key would let everybody on the network drive the robot" in err
    assert "--api-key-file" in err


def test_the_key_may_come_from_the_environment(bundle: Path) -> None:
    with service_process(bundle, "--port", "0", "--backend", "ort:cpu", **{KEY_VARIABLE: KEY}) as service:
        assert httpx.get(f"{service.url}/policy", trust_env=False).status_code == 401
        assert httpx.get(f"{service.url}/policy", trust_env=False, headers={"X-API-Key": KEY}).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--max-sessions", "0"], 2, "--max-sessions must be positive"),
        (["--backend", "nonsense"], 1, "nonsense"),
    ],
)
def test_a_wrong_command_line_says_how_to_mend_it(bundle: Path, arguments: list[str], code: int, message: str) -> None:
    got, out, err = ended(bundle, *(["--port", "0"] if "--port" not in arguments else []), *arguments)
    assert (got, out) == (code, ""), err
    assert message in err
    assert "hint:" in err
    assert "Traceback" not in err


def test_a_bundle_with_two_cameras_is_refused(tmp_path: Path) -> None:
    hand = make_bundle(tmp_path / "hand.bundle", Tiny(cameras=("static", "hand")))
    code, _, err = ended(hand, "--port", "0", "--backend", "ort:cpu")
    assert (code, "a policy with a hand camera is not served" in err) == (2, True)


def test_without_the_extra_it_says_what_to_install(bundle: Path) -> None:
    script = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'fastapi' else find(name, *rest)\n"
        f"sys.argv = ['serve.py', {str(bundle)!r}]\n"
        f"runpy.run_path({str(ROOT / 'runtime' / 'serve.py')!r}, run_name='__main__')\n"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert outcome.returncode == 2
    assert "pip install 'jetvla[serve]'" in outcome.stderr


def test_the_address_alone_is_on_stdout(bundle: Path) -> None:
    command = [
        sys.executable,
        ROOT / "runtime" / "serve.py",
        bundle,
        "--port",
        "0",
        "--backend",
        "ort:cpu",
        "--threads",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+\n", process.stdout.readline())
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def _peak_kb(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])
