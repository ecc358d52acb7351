from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bundle.errors import BundleError, CameraError
from bundle.manifest import Manifest
from episodes.writer import write_episode
from runtime import doctor_camera, doctor_machine, robot_doctor
from runtime.cameras.simulated import FAULT_FILE_VARIABLE, Fault
from runtime.commands.fake_plant import FakePlant
from runtime.doctor_camera import sharpness, watch
from runtime.doctor_picture import draw_doctor
from runtime.preprocess import resize
from runtime.robot_doctor import described, examine
from runtime.robot_file import (
    CameraConfig,
    EpisodeCamera,
    HttpCamera,
    Loop,
    RobotFile,
    SimulatedCamera,
    UdpCommands,
    V4l2Camera,
)
from tests.bundles import edit_manifest, make_bundle
from tests.robots import AXES, SAFETY, robot_file

FAST = SimulatedCamera(colour_order="rgb", fps=60, frozen_after_s=0.2)
QUIET = Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is probed stays registered in the process, where other tests would find it."""
    monkeypatch.setattr(doctor_machine, "backend_lines", lambda: ["ort:cpu: yes"])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = make_bundle(tmp_path / "drive.bundle")
    edit_manifest(folder, lambda manifest: msgspec.structs.replace(manifest, fps=10.0))
    return folder


def run(bundle: Path, robot: RobotFile, seconds: float = 0.4, **options: object) -> dict[str, object]:
    out = bundle.parent / "doctor.png"
    return examine(bundle, robot, QUIET, out=out, seconds=seconds, **options)  # type: ignore[arg-type]


def problems(result: dict[str, object]) -> list[str]:
    found = result["problems"]
    assert isinstance(found, list)
    return found


def test_a_healthy_robot(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patient = msgspec.structs.replace(SAFETY, stale_frame_s=20, stale_action_s=30)  # however loaded this machine is
    result = run(bundle, robot_file(FAST, safety=patient), 1.0)

    assert problems(result) == []
    printed = capsys.readouterr().out
    assert printed.startswith("```\nproblems\n  none found; look at the picture\n")
    assert printed.endswith("\n```\n")
    for part in (
        "kind=simulated colour_order=rgb",
        "320 x 180 upright",
        "trained on 10 pictures a second, decides 10 times a second",
        "drive.bundle, jetvla",
        "packing upstream (stated)",
        "RGB, bicubic squash to 8 x 8",
        "window 3, chunk 2, fps 10",
        "linear_x [m/s], linear_y [m/s]",
        "policy linear_y +1 -> 0.5 m/s right",
        "kind=console",
        "the doctor opens no way to the robot unless asked to",
        "ort:cpu: yes",
        f"numpy {np.__version__}",
    ):
        assert part in printed
    json.dumps(result)
    camera = result["camera"]
    assert isinstance(camera, dict)
    assert camera["shape"] == [180, 320, 3]
    assert 5 < camera["fps"] <= 66


def test_quiet_prints_nothing(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "problems" in str(run(bundle, robot_file(FAST), 0.1, quiet=True)["report"])
    assert capsys.readouterr().out == ""


def test_the_picture_shows_camera_policy_and_exchanged_colours(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "drive.bundle")
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:50], pixels[50:] = (200, 60, 40), (20, 30, 180)
    write_episode(tmp_path / "drive.h5", [pixels] * 4, np.zeros((4, 3)), instruction="go", fps=20)
    camera = EpisodeCamera(path=str(tmp_path / "drive.h5"), colour_order="rgb")

    result = run(bundle, robot_file(camera))

    with Image.open(str(result["picture"])) as image:
        sheet = np.asarray(image.convert("RGB"))
    colours = {tuple(int(value) for value in colour) for colour in sheet[::20, ::5].reshape(-1, 3)}
    seen = resize(pixels, Manifest.load(bundle).preprocessing, 8)
    assert {(200, 60, 40), (20, 30, 180), (40, 60, 200), (180, 30, 20)} <= colours
    assert {tuple(int(value) for value in seen[0, 0]), tuple(int(value) for value in seen[-1, -1])} <= colours


@pytest.mark.parametrize("shape", [(720, 1280), (1280, 720), (4, 2000), (2000, 4), (1, 1)])
def test_any_shape_fits_the_sheet(shape: tuple[int, int]) -> None:
    pixels = np.zeros((*shape, 3), np.uint8)
    drawn = draw_doctor(pixels, np.zeros((8, 8, 3), np.uint8), "facts " * 40, "8 x 8, bicubic squash")
    with Image.open(io.BytesIO(drawn)) as image:
        assert image.height < 600
        assert image.width < 3000


def test_a_camera_that_is_not_there_is_one_problem_among_the_facts(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_camera, "_FIRST_FRAME_S", 0.1)
    monkeypatch.setattr(robot_doctor, "watch", lambda config, seconds: watch(config, seconds, 0.1))

    result = run(bundle, robot_file(V4l2Camera(device="77", colour_order="bgr")))

    (problem,) = problems(result)
    assert "there is no camera /dev/video77" in problem
    assert "by-id" in problem
    assert result["picture"] is None
    assert not (bundle.parent / "doctor.png").exists()
    assert "policy linear_x +1" in str(result["report"])


def test_a_library_that_is_missing_is_a_problem_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)

    result = run(bundle, robot_file(V4l2Camera(device="0", colour_order="bgr")))

    assert "pip install 'jetvla[opencv]'" in problems(result)[0]
    assert result["camera"] == {}


@pytest.mark.parametrize(
    ("fault", "message"),
    [(Fault.BLACK, "times too dark"), (Fault.UNPLUGGED, "simulated camera is unplugged")],
)
def test_faults_of_the_camera_are_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, message: str
) -> None:
    (tmp_path / "fault").write_text(fault.value)
    monkeypatch.setenv(FAULT_FILE_VARIABLE, str(tmp_path / "fault"))
    monkeypatch.setattr(robot_doctor, "watch", lambda config, seconds: watch(config, seconds, 0.3))

    assert message in problems(run(bundle, robot_file(FAST)))[0]


def test_a_camera_slower_than_the_policy_and_gaps_that_would_stop_the_robot(bundle: Path) -> None:
    slow = SimulatedCamera(colour_order="rgb", fps=2)
    found = problems(run(bundle, robot_file(slow), 1.2))

    assert any("the robot would have stopped: no good picture for 0." in problem for problem in found)
    assert any("and the policy decides 10 times" in problem for problem in found)


def test_a_robot_file_that_does_not_fit_the_bundle(bundle: Path) -> None:
    robot = robot_file(FAST, axes={"linear_x": AXES["linear_x"]})

    (problem,) = problems(run(bundle, robot, 0.1))

    assert problem.startswith(
        "robot test-base has no axis for the policy's action 'linear_y' (got linear_x); add [axes.linear_y]"
    )


def test_a_cadence_unlike_the_trainings(bundle: Path) -> None:
    found = problems(run(bundle, robot_file(FAST, loop=Loop(publish_hz=20, decide_hz=5)), 0.1))
    assert any("trained at 10 frames a second, deciding at 5" in problem for problem in found)


def test_a_damaged_bundle(bundle: Path) -> None:
    (bundle / "golden.npz").write_bytes(b"")
    assert any("golden.npz" in problem for problem in problems(run(bundle, robot_file(FAST), 0.1)))
    (bundle / "manifest.json").unlink()
    with pytest.raises(BundleError):
        run(bundle, robot_file(FAST), 0.1)


def test_commands_are_opened_only_when_that_is_asked_for_and_nothing_is_sent(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakePlant() as plant:
        robot = robot_file(FAST, UdpCommands(host="127.0.0.1", port=plant.port))
        asked = run(bundle, robot, 0.1, listeners=True)
        assert not plant.log
    assert "listeners: cannot be told; nothing was sent" in str(asked["report"])

    def refuse(config: object) -> None:
        raise AssertionError("a command sink was opened")

    monkeypatch.setattr(robot_doctor, "open_sink", refuse)
    assert "nothing was sent" not in str(run(bundle, robot, 0.1)["report"])


def test_nobody_listens_and_somebody_else_drives(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sink:
        closed = False

        def listeners(self) -> int:
            return 0

        def close(self) -> None:
            Sink.closed = True

    monkeypatch.setattr(robot_doctor, "_LISTEN_S", 0.05)
    monkeypatch.setattr(robot_doctor, "open_sink", lambda config: Sink())
    monkeypatch.setattr(robot_doctor, "competitors", lambda sink, wait_s: ("a joystick",))

    found = problems(run(bundle, robot_file(FAST), 0.1, listeners=True))

    assert found[0].startswith("nobody listens to the commands")
    assert found[1] == "somebody else sends commands to this robot: a joystick"
    assert Sink.closed


def test_a_base_that_takes_the_other_type_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sink:
        def listeners(self) -> int:
            return 0

        def misfits(self) -> list[str]:
            return ["1 subscriber takes something else"]

        def close(self) -> None: ...

    monkeypatch.setattr(robot_doctor, "_LISTEN_S", 0.05)
    monkeypatch.setattr(robot_doctor, "open_sink", lambda config: Sink())

    found = problems(run(bundle, robot_file(FAST), 0.1, listeners=True))

    assert found == ["on the topic of the commands, 1 subscriber takes something else"], "and not that nobody listens"


def test_nothing_secret_is_shown(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://admin:hunter2@127.0.0.1:9/video?token=hunter3"
    monkeypatch.setattr(robot_doctor, "watch", lambda config, seconds: watch(config, seconds, 0.1))

    result = run(bundle, robot_file(HttpCamera(url=url, colour_order="rgb")))

    assert "hunter" not in json.dumps(result)
    assert "url=http://127.0.0.1:9/video?..." in described(HttpCamera(url=url, colour_order="rgb"))


def test_the_home_folder_is_not_shown() -> None:
    home = "/" + "/".join(("home", "ada"))
    assert doctor_machine.without_home(f"{home}/b.bundle {home} {home}s/x", home) == f"~/b.bundle ~ {home}s/x"
    assert doctor_machine.without_home("text", "") == "text"


def test_backends_are_probed_for_real() -> None:
    """In a process of its own."""
    code = "from runtime.doctor_machine import backend_lines; print('\\n'.join(backend_lines()))"
    root = Path(robot_doctor.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120, check=True
    )
    assert "ort:cpu: yes" in done.stdout
    assert "trt: " in done.stdout


def test_machine_facts_of_a_jetson(tmp_path: Path) -> None:
    files = {
        "etc/os-release": 'NAME=x\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
        "proc/meminfo": "MemTotal:       16252928 kB\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin NX\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 3.0\nmore\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    lines = doctor_machine.machine_lines(tmp_path)

    assert lines[0].startswith("Ubuntu 22.04.5 LTS, kernel ")
    assert lines[1].endswith("15.5 GiB")
    assert lines[2:] == ["NVIDIA Jetson Orin NX", "R36 (release), REVISION: 3.0"]
    assert "memory unknown" in doctor_machine.machine_lines(tmp_path / "nothing")[1]


def test_a_library_that_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "rclpy.py").write_text("raise OSError('libroscpp.so')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "rclpy does not import (OSError: libroscpp.so)" in doctor_machine.library_line()


@pytest.mark.parametrize("config", [FAST, EpisodeCamera(path="gone.h5", colour_order="rgb")])
def test_watching_takes_no_longer_than_it_should(config: CameraConfig) -> None:
    found = watch(config, 0.2, 0.2)

    assert found.seconds < 30
    if config is FAST:
        assert found.frame is not None
        assert found.missing >= 0
        assert found.age_ms["p50"] <= found.age_ms["max"]
    else:
        assert isinstance(found.error, CameraError)


def test_a_picture_that_is_mostly_white_is_a_problem(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def white(config: CameraConfig, seconds: float) -> object:
        found = watch(config, 0.2)
        return replace(found, bright_share=0.94)

    monkeypatch.setattr(robot_doctor, "watch", white)
    assert any("94% of the picture is white" in text for text in problems(run(bundle, robot_file(FAST), 0.2)))


def test_sharpness_falls_when_a_picture_is_blurred() -> None:
    sharp = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(sharp).resize((30, 20)).resize((60, 40)))
    assert sharpness(sharp) > 5 * sharpness(blurred)
    assert sharpness(sharp[:1]) == 0
