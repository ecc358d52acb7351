"""What a run refuses before anything moves, and what it obeys while it drives."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bundle.errors import CameraError, ConfigError
from bundle.manifest import Manifest
from episodes.instruction import sentence
from episodes.writer import write_episode
from runtime.cameras.grabber import FrameGrabber
from runtime.cameras.pair import PairedFrames
from runtime.cameras.select import open_camera
from runtime.drive import _first_frame, _obey, _refuse_make_believe, make_plan
from runtime.robot_file import (
    CommandConfig,
    ConsoleCommands,
    DdsCommands,
    EpisodeCamera,
    Loop,
    Ros2Commands,
    SimulatedCamera,
    UdpCommands,
    V4l2Camera,
)
from runtime.robot_view import plan_lines
from tests.bundles import GO_LEFT, Tiny
from tests.robots import EAGER, robot_file
from tests.runtime.drives import driving

REAL = V4l2Camera(colour_order="bgr", device="/dev/video0")


class Orders:
    """A loop that only remembers."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def instruct(self, text: str) -> None:
        self.said.append(("do", text))

    def halt(self, reason: str) -> None:
        self.said.append(("halt", reason))

    def stop(self) -> None:
        self.said.append(("end", ""))


WORDS = ["", "  ", "stop", "STOP!", "Halt.", "q", "please stop", "stop now", "don't move", "estop", "정지", "멈춰!"]


@pytest.mark.parametrize("word", WORDS)
def test_whatever_sounds_like_stop_stops(word: str) -> None:
    orders = Orders()
    _obey(orders, io.StringIO(f"go left\n{word}\n"))  # type: ignore[arg-type]
    assert orders.said[:2] == [("do", "go left"), ("halt", "stopped by hand")]


def test_the_end_of_the_keyboard_stops() -> None:
    orders = Orders()
    _obey(orders, io.StringIO("go left\n"))  # type: ignore[arg-type]
    assert [kind for kind, _ in orders.said] == ["do", "halt", "end"]


def test_letters_that_are_none_do_not_make_it_deaf() -> None:
    orders = Orders()
    _obey(orders, io.TextIOWrapper(io.BytesIO(b"gr\xfcn\n\n"), encoding="utf-8"))  # type: ignore[arg-type]
    assert [kind for kind, _ in orders.said] == ["do", "halt", "halt", "end"]


@pytest.mark.parametrize("commands", [DdsCommands(), Ros2Commands()])
def test_a_real_robot_does_not_drive_on_make_believe(tiny_bundle, commands: CommandConfig) -> None:
    manifest = Manifest.load(tiny_bundle(Tiny()))
    drawn = make_plan(manifest, robot_file(commands=commands), None)
    seen = make_plan(manifest, robot_file(REAL, commands), None)
    with pytest.raises(ConfigError, match="camera simulated"):
        _refuse_make_believe(drawn, "ort:cpu", commands)
    with pytest.raises(ConfigError, match="backend fake"):
        _refuse_make_believe(seen, "fake", commands)
    _refuse_make_believe(seen, "ort:cpu", commands)
    for harmless in (ConsoleCommands(), UdpCommands(host="127.0.0.1", port=9)):
        _refuse_make_believe(drawn, "fake", harmless)


def test_a_policy_without_a_cadence_needs_one_stated(tiny_bundle) -> None:
    manifest = Manifest.load(tiny_bundle(Tiny()))
    with pytest.raises(ConfigError, match=r"decide_hz"):
        make_plan(manifest, robot_file(loop=Loop()), None)
    trained = msgspec.structs.replace(manifest, fps=6.0)
    assert make_plan(trained, robot_file(loop=Loop()), None).pace.decide_hz == 6.0
    assert make_plan(trained, robot_file(), None).pace.decide_hz == 10.0


def test_a_policy_with_a_hand_camera_wants_a_robot_with_one(tiny_bundle) -> None:
    manifest = Manifest.load(tiny_bundle(Tiny(cameras=("hand", "static"))))
    robot = robot_file(SimulatedCamera(colour_order="rgb"))
    with pytest.raises(ConfigError, match=r"has a hand camera, and robot test-base has none(.|\n)*\[hand_camera\]"):
        make_plan(manifest, robot, None)
    both = msgspec.structs.replace(robot, hand_camera=SimulatedCamera(colour_order="rgb", fps=10.0))
    plan = make_plan(manifest, both, None)
    assert list(plan.cameras) == ["static", "hand"]
    assert "camera simulated and hand camera simulated" in plan_lines(plan, dry_run=True)[0]
    # A policy of one camera leaves the other alone.
    assert list(make_plan(Manifest.load(tiny_bundle(Tiny())), both, None).cameras) == ["static"]


def test_a_drawn_hand_camera_is_make_believe_too(tiny_bundle) -> None:
    manifest = Manifest.load(tiny_bundle(Tiny(cameras=("hand", "static"))))
    robot = msgspec.structs.replace(robot_file(REAL, DdsCommands()), hand_camera=SimulatedCamera(colour_order="rgb"))
    with pytest.raises(ConfigError, match="camera simulated"):
        _refuse_make_believe(make_plan(manifest, robot, None), "ort:cpu", DdsCommands())


def test_driving_with_two_cameras(tiny_bundle, tmp_path: Path) -> None:
    """A recording plays as both."""
    rng = np.random.default_rng(0)
    frames = rng.integers(40, 255, (400, 24, 32, 3), np.uint8)
    path = write_episode(
        tmp_path / "both.h5", frames, np.zeros((400, 3)), instruction=GO_LEFT, fps=30.0, hand_frames=frames[::-1]
    )
    camera = EpisodeCamera(path=str(path), colour_order="rgb", loop=True)
    hand = msgspec.structs.replace(camera, view="hand")
    loop = Loop(publish_hz=20.0, decide_hz=10.0)
    robot = msgspec.structs.replace(robot_file(camera, axes=EAGER, loop=loop), hand_camera=hand)
    bundle = tiny_bundle(Tiny(cameras=("hand", "static")))
    with driving(bundle, tmp_path, "--json", robot=robot) as drive:
        drive.until_moving()
        drive.signal(signal.SIGTERM)
        assert drive.end() == 0
        assert drive.process.stdout is not None
        result = json.loads(drive.process.stdout.read())
        assert result["decisions"] > 0
        assert result["camera"]["hand"]["taken"] > 0


def test_a_hand_camera_that_gives_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.drive._FIRST_FRAME_S", 0.5)
    alone = write_episode(
        tmp_path / "alone.h5", np.full((2, 4, 4, 3), 90, np.uint8), np.zeros((2, 3)), instruction=GO_LEFT, fps=30.0
    )
    static = EpisodeCamera(path=str(alone), colour_order="rgb", loop=True)
    grabbers = {
        "static": FrameGrabber(open_camera(static), static),
        "hand": FrameGrabber(open_camera(hand := msgspec.structs.replace(static, view="hand")), hand),
    }
    for grabber in grabbers.values():
        grabber.start()
    try:
        with pytest.raises(CameraError, match=r"the hand camera gave no good picture(.|\n)*has no hand camera"):
            _first_frame(PairedFrames(grabbers["static"], grabbers["hand"]), grabbers)
    finally:
        for grabber in grabbers.values():
            grabber.close()


def test_no_word_of_the_instructions_that_people_train_on_stops() -> None:
    texts = [sentence(schema, side) for schema in ("v1", "v5") for side in ("left", "right")]
    orders = Orders()
    _obey(orders, io.StringIO("\n".join(texts)))  # type: ignore[arg-type]
    assert [text for kind, text in orders.said if kind == "do"] == texts


def test_the_end_of_stdin_ends_a_run(tiny_bundle, tmp_path: Path) -> None:
    with driving(tiny_bundle(Tiny()), tmp_path, "--interactive") as drive:
        assert drive.process.stdin is not None
        assert drive.stands_after(drive.process.stdin.close) < 10
        assert drive.end() == 0


def test_two_signals_at_once_are_one(tiny_bundle, tmp_path: Path) -> None:
    with driving(tiny_bundle(Tiny()), tmp_path, "--json") as drive:
        drive.until_moving()
        drive.signal(signal.SIGTERM)
        drive.signal(signal.SIGINT)
        assert drive.end() == 0
        assert drive.process.stdout is not None
        assert '"zero_sent": true' in drive.process.stdout.read()
