"""The remote policy: a local one's answers, and a deadline that holds against every kind of server."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bundle.errors import ConfigError, FrameError, NotFiniteError, PromptError, ServiceError
from bundle.manifest import Manifest
from runtime.events import Note
from runtime.policy import Policy
from runtime.service.app import Limits
from runtime.service.client import RemotePolicy
from runtime.service.http_exchange import MAX_ANSWER
from runtime.service.wire import Health
from tests.bundles import GO_LEFT, GO_RIGHT, Tiny, make_bundle, random_frames
from tests.runtime.service.serving import KEY, PATIENCE_S, Gated, Serving, serve_bundle, service_process

FRAMES = np.random.default_rng(7).integers(0, 256, (8, 45, 80, 3), np.uint8)
PATIENT = {"timeout_s": PATIENCE_S, "reset_timeout_s": PATIENCE_S, "load_timeout_s": PATIENCE_S}


@contextmanager
def remote(url: str, **options: object) -> Iterator[RemotePolicy]:
    client = RemotePolicy(url, **{**PATIENT, **options})  # type: ignore[arg-type]
    try:
        yield client
    finally:
        client.close()


@pytest.mark.parametrize("size", ["larger", "exact"])
def test_answers_equal_a_local_policy_exactly(serving: Serving, policy: Policy, size: str) -> None:
    frames = FRAMES if size == "larger" else random_frames(8)[:, 0]
    policy.reset(GO_LEFT)
    with serving(key=KEY) as served, remote(served.url, key=KEY) as client:
        client.reset(GO_LEFT)
        for frame in frames:
            here, there = policy.step(frame), client.step(frame)
            np.testing.assert_array_equal(there.values, here.values)
            np.testing.assert_array_equal(there.normalized, here.normalized)
            assert (there.values.dtype, there.normalized.dtype) == (np.float32, np.float32)
            assert set(there.timing) == {
                "preprocess",
                "vision",
                "language",
                "action_head",
                "service",
                "network",
                "total",
            }
            parts = sum(value for name, value in there.timing.items() if name != "total")
            assert parts == pytest.approx(there.timing["total"])
            assert min(there.timing.values()) >= 0
        # A new episode forgets.
        client.reset(GO_RIGHT)
        policy.reset(GO_RIGHT)
        np.testing.assert_array_equal(client.step(frames[0]).values, policy.step(frames[0]).values)
        assert client.manifest == policy.manifest
        assert (client.backend, client.window) == (policy.backend, policy.window)


def test_an_int8_policy_is_known_as_one(tmp_path: Path) -> None:
    from tests.bundles import add_int8

    folder = make_bundle(tmp_path / "int8.bundle")
    add_int8(folder)
    local = Policy.load(folder, "ort:cpu", precision="int8", threads=1)
    with serve_bundle(folder, policy=local) as served, remote(served.url) as client:
        assert client.manifest.precision == "int8"
        assert client.manifest.manifest_sha256 == local.manifest.manifest_sha256


def test_jpeg_is_near(serving: Serving, policy: Policy) -> None:
    policy.reset(GO_LEFT)
    with serving() as served, remote(served.url, encoding="jpeg", jpeg_quality=100) as client:
        client.reset(GO_LEFT)
        here, there = policy.step(FRAMES[0]), client.step(FRAMES[0])
        assert not np.array_equal(there.values, here.values)
        np.testing.assert_allclose(there.values, here.values, atol=0.3)


def test_many_robots_at_once(serving: Serving, bundle: Path) -> None:
    wrong: list[str] = []

    def drive(url: str, instruction: str, frames: np.ndarray) -> None:
        local = Policy.load(bundle, "ort:cpu", threads=1)
        local.reset(instruction)
        with remote(url) as client:
            client.reset(instruction)
            for frame in frames:
                if not np.array_equal(client.step(frame).values, local.step(frame).values):
                    wrong.append(instruction)
        local.close()

    with serving() as served:
        robots = [
            threading.Thread(target=drive, args=(served.url, instruction, np.roll(FRAMES, shift, 0)))
            for shift, instruction in enumerate((GO_LEFT, GO_RIGHT, GO_LEFT, GO_RIGHT))
        ]
        for robot in robots:
            robot.start()
        for robot in robots:
            robot.join(PATIENCE_S)
            assert not robot.is_alive()
    assert not wrong


def test_misuse_is_told_as_a_local_policy_tells_it(serving: Serving) -> None:
    with serving() as served, remote(served.url) as client:
        with pytest.raises(PromptError, match="step before reset"):
            client.step(FRAMES[0])
        with pytest.raises(PromptError, match="instruction is empty"):
            client.reset(" ")
        with pytest.raises(PromptError):
            client.reset("words that no tokenizer is there for")
        with pytest.raises(PromptError, match="step before reset"):
            client.step(FRAMES[0])
        client.reset(GO_LEFT)
        with pytest.raises(FrameError):
            client.step(FRAMES[0].astype(np.float32))  # type: ignore[arg-type]
        client.step(FRAMES[0])
        client.clear()
        with pytest.raises(PromptError, match="step before reset"):
            client.step(FRAMES[0])


@pytest.mark.parametrize("key", [None, "a-key-that-is-not-the-one"])
def test_a_wrong_key_is_told_at_the_start(serving: Serving, key: str | None) -> None:
    with serving(key=KEY) as served, pytest.raises(ServiceError, match="a right key is needed"):
        RemotePolicy(served.url, key=key)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "robot",
        "ftp://robot",
        "http://",
        "http://robot/predict",
        "http://robot:0",
        "http://u:p@robot",
        "http://robot:x",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="not the address of a policy service"):
        RemotePolicy(url)


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nothing answers
        with pytest.raises(ServiceError, match="does not answer"):
            RemotePolicy(f"http://127.0.0.1:{taken.getsockname()[1]}")


def test_proxies_of_the_environment_are_not_asked_for_this_machine(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving() as served, remote(served.url) as client:
        client.reset(GO_LEFT)


# --- lost answers -----------------------------------------------------------------------------------------------------------------


def test_a_lost_answer_loses_no_history(serving: Serving, bundle: Path, policy: Policy) -> None:
    gated = Gated(Policy.load(bundle, "ort:cpu", threads=1))
    notes: list[Note] = []
    policy.reset(GO_LEFT)
    with serving(policy=gated) as served, remote(served.url, timeout_s=1.5, on_note=notes.append) as client:
        client.reset(GO_LEFT)
        for frame in FRAMES[:2]:
            np.testing.assert_array_equal(client.step(frame).values, policy.step(frame).values)
        gated.gate.clear()
        with pytest.raises(ServiceError, match="did not answer in time"):
            client.step(FRAMES[2])
        policy.step(FRAMES[2])  # the service decided on it, late
        gated.gate.set()
        gated.wait_for_steps(3)
        for frame in FRAMES[3:]:
            np.testing.assert_array_equal(client.step(frame).values, policy.step(frame).values)
    assert [note.kind for note in notes] == ["answer lost"]


def test_an_expired_session_begins_anew(serving: Serving, policy: Policy) -> None:
    notes: list[Note] = []
    with serving(limits=Limits(session_expiry_s=0.5)) as served, remote(served.url, on_note=notes.append) as client:
        client.reset(GO_LEFT)
        client.step(FRAMES[0])
        time.sleep(0.6)
        policy.reset(GO_LEFT)
        np.testing.assert_array_equal(client.step(FRAMES[1]).values, policy.step(FRAMES[1]).values)
    assert [note.kind for note in notes] == ["history lost"]


def test_a_service_that_was_killed_and_started_again(bundle: Path, tmp_path: Path, policy: Policy) -> None:
    notes: list[Note] = []
    with service_process(bundle, "--port", "0", "--backend", "ort:cpu") as first:
        url, port = first.url, int(first.url.rpartition(":")[2])
        with remote(url, on_note=notes.append) as client:
            client.reset(GO_LEFT)
            client.step(FRAMES[0])
            first.process.kill()
            first.process.wait(PATIENCE_S)
            for _ in range(3):
                with pytest.raises(ServiceError, match="does not answer"):
                    client.step(FRAMES[1])
            with pytest.raises(ServiceError):
                client.reset(GO_RIGHT)
            with serve_bundle(bundle, port=port):
                # The instruction that could not be told is told now.
                policy.reset(GO_RIGHT)
                np.testing.assert_array_equal(client.step(FRAMES[2]).values, policy.step(FRAMES[2]).values)
            with pytest.raises(ServiceError):
                client.step(FRAMES[3])
            with serve_bundle(bundle, port=port):
                policy.reset(GO_RIGHT)
                np.testing.assert_array_equal(client.step(FRAMES[4]).values, policy.step(FRAMES[4]).values)
                assert [note.kind for note in notes] == ["history lost"]
            with serve_bundle(make_bundle(tmp_path / "other.bundle", Tiny(seed=1)), port=port):
                for _ in range(2):
                    with pytest.raises(ServiceError, match="another bundle"):
                        client.step(FRAMES[5])
                with pytest.raises(ServiceError, match="another bundle"):
                    client.reset(GO_LEFT)


# --- servers that do wrong --------------------------------------------------------------------------------------------------------

Behaviour = Callable[[socket.socket, bytes], None]
"""Gets what has come of the request so far."""


@contextmanager
def fake_service(bundle: Path, behaviour: Behaviour) -> Iterator[str]:
    """Answers the questions at the start and /reset rightly, and leaves /predict to `behaviour`."""
    manifest = Manifest.load(bundle)
    health = Health(
        status="ok", loaded=True, backend="fake", precision="fp32", bundle=manifest.manifest_sha256, uptime_s=1.0
    )
    reset = {"session": "x", "instruction": GO_LEFT, "step": 0, "bundle": manifest.manifest_sha256}
    bodies = {
        "/health": msgspec.json.encode(health),
        "/policy": manifest.encode(),
        "/reset": msgspec.json.encode(reset),
    }
    server = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while not over.is_set():
                head = b""
                while b"\r\n\r\n" not in head:
                    part = connection.recv(65536)
                    if not part:
                        return
                    head += part
                path = head.split(b" ", 2)[1].decode()
                if path in bodies:
                    _whole(connection, head)
                    connection.sendall(_http(bodies[path]))
                else:
                    behaviour(connection, head)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        over.set()
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(PATIENCE_S)


def _whole(connection: socket.socket, begun: bytes) -> bytes:
    """A request with its body."""
    top, _, rest = begun.partition(b"\r\n\r\n")
    for line in top.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            while len(rest) < int(line.partition(b":")[2]):
                rest += connection.recv(65536)
    return top + rest


def _http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def says(answer: bytes) -> Behaviour:
    return lambda connection, begun: connection.sendall(answer)


def trickles(head: bytes) -> Behaviour:
    def behave(connection: socket.socket, begun: bytes) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(b" ")
            time.sleep(0.02)

    return behave


def _silent(connection: socket.socket, begun: bytes) -> None:
    time.sleep(PATIENCE_S)


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(_silent, id="silent"),
        pytest.param(trickles(b"HTTP/1.1 200 OK\r\nX-Long: "), id="trickles headers"),
        pytest.param(trickles(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"), id="trickles the body"),
        pytest.param(trickles(b""), id="trickles nothing"),
        pytest.param(trickles(b"HTTP/1.1 100 Continue\r\n\r\n" * 3), id="continues"),
    ],
)
def test_the_deadline_holds_against_a_slow_server(bundle: Path, behaviour: Behaviour) -> None:
    with fake_service(bundle, behaviour) as url, remote(url, timeout_s=0.4) as client:
        client.reset(GO_LEFT)
        for _ in range(2):
            start = time.monotonic()
            with pytest.raises(ServiceError) as caught:
                client.step(FRAMES[0])
            took = time.monotonic() - start
            # An answer that cannot be one may be refused at once; none takes longer than promised, but for a busy machine.
            assert took < 0.4 + 1.0, caught.value


def test_a_server_that_does_not_accept_is_not_waited_for(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        start = time.monotonic()
        with pytest.raises(ServiceError, match="did not answer in time"):
            RemotePolicy(f"http://127.0.0.1:{server.getsockname()[1]}", load_timeout_s=0.4)
        assert time.monotonic() - start < PATIENCE_S / 2


PREDICTION = {
    "values": [[0.0, 0.0], [0.0, 0.0]],
    "normalized": [[0.0, 0.0], [0.0, 0.0]],
    "action_names": ["linear_x", "linear_y"],
    "units": ["m/s", "m/s"],
    "session": "s",
    "instruction": GO_LEFT,
    "step": 0,
    "reset": True,
    "bundle": "",
    "timing": {"total": 1.0},
    "engine_ms": None,
}


def answering(folder: Path, *, total: bytes = b"1.0", **changes: object) -> Behaviour:
    """A server whose answers are right but for `changes`, and for what stands where its total time should."""
    sha = Manifest.load(folder).manifest_sha256

    def behave(connection: socket.socket, begun: bytes) -> None:
        session = _whole(connection, begun).split(b'name="session"\r\n\r\n', 1)[1].split(b"\r\n", 1)[0].decode()
        body = msgspec.json.encode({**PREDICTION, "session": session, "bundle": sha, **changes})
        connection.sendall(_http(body.replace(b'"total":1.0', b'"total":' + total)))

    return behave


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": [[0.0, 0.0]]}, "not as a policy service does"),
        ({"values": [[0.0, 0.0], [0.0]]}, "not as a policy service does"),
        ({"values": [[0.0, 0.0], [0.0, 1e39]]}, "an action that is not finite"),
        ({"values": [[0.0, 0.0], [0.0, None]]}, "not as a policy service does"),
        ({"normalized": []}, "not as a policy service does"),
        ({"action_names": ["linear_y", "linear_x"]}, "not as a policy service does"),
        ({"units": ["m/s", "km/h"]}, "not as a policy service does"),
        ({"session": "other"}, "not as a policy service does"),
        ({"step": 7}, "not as a policy service does"),
        ({"instruction": GO_RIGHT}, "not as a policy service does"),
        ({"bundle": "0" * 64}, "serves another bundle now"),
        ({"timing": {"total": 1e308, "vision": 1e308, "language": 1e308}}, "not as a policy service does"),
        ({"timing": {"total": -1.0}}, "not as a policy service does"),
        ({"timing": {"total": "1"}}, "not as a policy service does"),
        ({"timing": {"total": None}}, "not as a policy service does"),
        ({"timing": {"total": 1.0, "vision": 10**18}}, "not as a policy service does"),
        ({"engine_ms": 1e300}, "not as a policy service does"),
        ({"engine_ms": -1}, "not as a policy service does"),
        ({"more": 1}, "not as a policy service does"),
    ],
)
def test_wrong_answers_move_nothing(bundle: Path, changes: dict[str, object], message: str) -> None:
    with fake_service(bundle, answering(bundle, **changes)) as url, remote(url) as client:
        client.reset(GO_LEFT)
        with pytest.raises((ServiceError, NotFiniteError), match=message):
            client.step(FRAMES[0])


@pytest.mark.parametrize("number", ["1e999", "NaN", "9" * 400, "-Infinity"])
def test_numbers_that_json_has_not_are_misses(bundle: Path, number: str) -> None:
    behave = answering(bundle, total=number.encode())
    with fake_service(bundle, behave) as url, remote(url) as client:
        client.reset(GO_LEFT)
        with pytest.raises(ServiceError, match="not as a policy service does"):
            client.step(FRAMES[0])


def test_the_right_answer_of_that_server_is_taken(bundle: Path) -> None:
    """Or the test above would prove nothing."""
    with fake_service(bundle, answering(bundle)) as url, remote(url) as client:
        client.reset(GO_LEFT)
        assert not client.step(FRAMES[0]).values.any()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "does not answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer"),
        (_http(b"<html>"), "not as a policy service does"),
        (_http(b"\xff\xfe"), "not as a policy service does"),
        (_http(b"[" * 100_000), "not as a policy service does"),
        (_http(b"{}", "302 Found", "Location: http://127.0.0.1:9/predict"), "not as a policy service does"),
        (_http(b"gateway", "502 Bad Gateway"), "not as a policy service does"),
        (
            _http(b'{"error":"ServiceError","reason":"busy","what":"busy","hint":"wait"}', "503 Busy"),
            r"refused \(503\): busy",
        ),
        (_http(b"x" * (MAX_ANSWER + 1)), "does not end"),
    ],
)
def test_other_servers_are_told_apart(bundle: Path, answer: bytes, message: str) -> None:
    def behave(connection: socket.socket, begun: bytes) -> None:
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while connection.recv(65536):
                pass

    with fake_service(bundle, behave) as url, remote(url) as client:
        client.reset(GO_LEFT)
        with pytest.raises(ServiceError, match=message):
            client.step(FRAMES[0])


def test_a_server_that_always_knows_better_is_not_followed_for_ever(bundle: Path) -> None:
    answer = _http(
        b'{"error":"ServiceError","reason":"history","what":"elsewhere","hint":"reset","step":5}', "409 Conflict"
    )
    asked = []

    def behave(connection: socket.socket, begun: bytes) -> None:
        asked.append(_whole(connection, begun))
        connection.sendall(answer)

    with fake_service(bundle, behave) as url, remote(url) as client:
        client.reset(GO_LEFT)
        with pytest.raises(ServiceError, match="elsewhere"):
            client.step(FRAMES[0])
    assert len(asked) == 2


def test_closing_twice_and_with_an_exchange_under_way(bundle: Path) -> None:
    with fake_service(bundle, _silent) as url:
        client = RemotePolicy(url, timeout_s=0.2)
        client.reset(GO_LEFT)
        with pytest.raises(ServiceError):
            client.step(FRAMES[0])
        client.close()
        client.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "policy-client"]
