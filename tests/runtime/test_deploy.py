"""What is deployed on a robot: the reference files fit a bundle, the unit is one that systemd takes, and the guides say what is true."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bundle.manifest import Manifest
from runtime import robot_file
from runtime.cameras.checks import REFUSALS
from runtime.commands.fake_plant import FakePlant
from runtime.drive import make_plan
from runtime.limits import limits_of
from runtime.robot_file import Axis, LimitsFile, RobotFile, UdpCommands
from runtime.robot_toml import load_limits_file, load_robot_file
from runtime.robot_view import plan_lines
from tests.bundles import Tiny, make_bundle
from tests.robots import robot_file as robot_of
from tests.robots import save_robot
from tests.runtime.drives import EAGER, command

ROOT = Path(__file__).resolve().parents[2]
DEPLOY, DOCS = ROOT / "runtime" / "deploy", ROOT / "docs"
REFERENCE, FIRST_RUN = DEPLOY / "reference-robot.toml", DEPLOY / "first-run-limits.toml"
GUIDES = [DOCS / "robot.md", DOCS / "robot-quickstart.md", DOCS / "robot-quickstart.ko.md"]
QUICKSTARTS = GUIDES[1:]
THREE_AXES = {"names": ("linear_x", "linear_y", "angular_z"), "units": ("m/s", "m/s", "rad/s")}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """As the fork's checkpoints give it: two velocities from -1.15 to 1.15, and no word about the rate."""
    found = Manifest.load(make_bundle(tmp_path_factory.mktemp("deploy") / "tiny.bundle", Tiny()))
    assert (found.action.names, found.action.units) == (("linear_x", "linear_y"), ("m/s", "m/s"))
    assert found.fps is None
    return found


# --- robot files --------------------------------------------------------------------------------------------------------------


def test_reference_robot_fits_the_forks_policies(manifest: Manifest) -> None:
    plan = make_plan(manifest, load_robot_file(REFERENCE), None)

    assert "policy linear_x +1 -> 0.2 m/s forward; at most 0.23 m/s, 0.5 m/s²" in plan_lines(plan, dry_run=False)
    assert not any("warning" in line for line in plan_lines(plan, dry_run=False))
    assert max(plan.limits.max_speed) <= 0.3, "a stranger's robot starts slowly"


def test_reference_robot_fits_policies_that_turn(manifest: Manifest) -> None:
    action = msgspec.structs.replace(manifest.action, **THREE_AXES)

    limits = limits_of(load_robot_file(REFERENCE), action)

    assert [speed > 0 for speed in limits.max_speed] == [True, True, False, False, False, True]


def test_reference_robot_is_the_labs() -> None:
    robot = load_robot_file(REFERENCE)

    assert isinstance(robot.camera, robot_file.Ros2ServiceCamera)
    assert (robot.camera.service, robot.camera.type) == ("get_image_service", "camera_interfaces/srv/GetImage")
    assert (robot.camera.colour_order, robot.camera.width, robot.camera.height) == ("bgr", 1280, 720)
    assert isinstance(robot.commands, robot_file.Ros2Commands)
    assert (robot.commands.topic, robot.commands.stamped) == ("/cmd_vel", False)
    assert robot.camera.domain == robot.commands.domain == 42


def test_alternatives_in_the_reference_robot_load_too() -> None:
    """What is commented out is there to be commented in, in the place of the table above it."""
    text = REFERENCE.read_text(encoding="utf-8")
    reference = msgspec.toml.decode(text)
    kinds = []
    for block in re.findall(r"^# \[(?:camera|hand_camera|commands)\]\n(?:# \w+ = .*\n)+", text, re.MULTILINE):
        table = msgspec.toml.decode(re.sub("^# ", "", block, flags=re.MULTILINE))
        robot = msgspec.convert(reference | table, RobotFile)
        kinds += [tag_of(type(getattr(robot, name))) for name in table]

    assert kinds == ["csi", "v4l2", "v4l2", "dds"]


@pytest.mark.parametrize("path", [REFERENCE, FIRST_RUN], ids=lambda path: path.name)
def test_every_key_has_a_comment(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"(# )?\w+ = ", line)]

    bare = [line for line in lines if " # " not in line and not line.startswith("# ")]

    assert len(lines) >= 10
    assert not bare


def test_every_key_of_the_structs_is_in_the_reference_robot() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    shown = (robot_file.Safety, robot_file.Loop, robot_file.Recorder, Axis, robot_file.Ros2ServiceCamera)
    shown += (robot_file.Ros2Commands, RobotFile)
    keys = {name for kind in shown for name in kind.__struct_fields__} - {"camera", "commands", "axes"}

    missing = [key for key in sorted(keys) if not re.search(rf"^(# )?({key} = |\[{key}\])", text, re.MULTILINE)]

    assert not missing


def test_first_run_limits_only_tighten_the_reference_robot(manifest: Manifest) -> None:
    robot, local = load_robot_file(REFERENCE), load_limits_file(FIRST_RUN)
    action = msgspec.structs.replace(manifest.action, **THREE_AXES)

    wide, tight = limits_of(robot, action), limits_of(robot, action, local)
    make_plan(manifest, robot, local)  # and a healthy loop is not stopped by them

    assert local.axes.keys() == robot.axes.keys()
    assert all(few < many for few, many in zip(tight.max_speed, wide.max_speed, strict=True) if many)
    assert all(few < many for few, many in zip(tight.max_acceleration, wide.max_acceleration, strict=True) if many)
    assert tight.max_speed[0] * 10 <= 1.0, "the guide promises a metre at most in ten seconds"


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.toml")), ids=lambda path: path.name)
def test_every_file_loads(path: Path) -> None:
    assert load_limits_file(path) if "limits" in path.name else load_robot_file(path)


# --- the unit -----------------------------------------------------------------------------------------------------------------

UNIT = DEPLOY / "jetvla-robot.service"


def unit() -> configparser.ConfigParser:
    """Continued lines joined, as systemd does it; of a key that stands twice, both values."""

    class Both(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: Any, value: Any) -> None:
            if isinstance(value, list) and key in self:
                value = [*self[key], *value]
            super().__setitem__(key, value)

    text = re.sub(r"\\\n\s*", " ", UNIT.read_text(encoding="utf-8"))
    parser = configparser.ConfigParser(interpolation=None, strict=False, dict_type=Both, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here")

    good = subprocess.run(["systemd-analyze", "verify", UNIT], capture_output=True, text=True, timeout=60, check=False)
    bad = tmp_path / "bad.service"
    bad.write_text(UNIT.read_text(encoding="utf-8").replace("KillMode=control-group", "KillMode=gently"))
    worse = subprocess.run(["systemd-analyze", "verify", bad], capture_output=True, text=True, timeout=60, check=False)

    assert "gently" in worse.stderr, "this test sees mistakes"
    # Of a container without systemd, about itself and not about the unit.
    assert [line for line in good.stderr.splitlines() if "jetvla" in line] == []


def test_unit_does_not_drive_off_by_itself() -> None:
    parser = unit()

    assert parser["Service"]["Restart"] == "no"
    assert "Install" not in parser
    assert int(parser["Unit"]["StartLimitBurst"]) <= 3


def test_unit_leaves_the_watchdog_its_time() -> None:
    """Any other KillMode kills it, or leaves it alone with a robot that a new run drives already."""
    service = unit()["Service"]

    assert service["KillMode"] == "control-group"
    assert service["KillSignal"] == "SIGTERM"
    assert service["OOMPolicy"] == "stop"
    assert int(service["TimeoutStopSec"]) >= 10
    assert service["LimitMEMLOCK"] == "infinity"
    assert int(service["LimitRTPRIO"]) >= 20


def test_unit_can_reach_what_a_run_needs() -> None:
    service = unit()["Service"]

    assert service["ProtectSystem"] == "strict"
    assert "/run/lock" in service["ReadWritePaths"].split()
    assert load_robot_file(REFERENCE).recorder.folder.startswith(f"/var/lib/{service['StateDirectory']}/")  # type: ignore[union-attr]
    assert {"AF_UNIX", "AF_INET", "AF_NETLINK"} <= set(service["RestrictAddressFamilies"].split())
    assert {"video", "render"} <= set(service["SupplementaryGroups"].split())
    for breaks in (
        "PrivateDevices",
        "PrivateTmp",
        "PrivateNetwork",
        "ProtectClock",
        "MemoryDenyWriteExecute",
        "RestrictRealtime",
    ):
        assert breaks not in service


def test_units_command_runs_what_the_environment_file_says(tmp_path: Path) -> None:
    """The very line, unescaped as systemd does it, with a stand-in for the interpreter."""
    home = tmp_path / "jetvla"
    stand_in = home / ".venv" / "bin" / "python"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$ROS_DISTRO" "$@"\n')
    stand_in.chmod(0o755)
    setup = tmp_path / "setup.bash"
    setup.write_text("export ROS_DISTRO=humble\n")
    words = shlex.split(unit()["Service"]["ExecStart"].replace("/opt/jetvla", str(home)).replace("$$", "$"))
    settings = {
        "JETVLA_BUNDLE": "/var/lib/jetvla/basket.bundle",
        "JETVLA_INSTRUCTION": "Navigate to the gray basket on the left",
        "JETVLA_OPTIONS": "--limits /etc/jetvla/first-run-limits.toml",
        "ROS_SETUP": str(setup),
    }

    def start(**changes: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], **settings, **changes}
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30, check=False)

    assert words[:2] == ["/bin/bash", "-c"]
    assert start().stdout.splitlines() == [
        "humble",
        str(home / "runtime" / "run_robot.py"),
        "/var/lib/jetvla/basket.bundle",
        "--instruction",
        "Navigate to the gray basket on the left",
        "--limits",
        "/etc/jetvla/first-run-limits.toml",
    ]
    assert start(ROS_SETUP="", JETVLA_OPTIONS="").returncode == 0
    for broken in ({"JETVLA_INSTRUCTION": ""}, {"ROS_SETUP": "/nowhere/setup.bash"}):
        done = start(**broken)
        assert done.returncode != 0
        assert not done.stdout, "nothing is started"


def test_paths_of_the_unit_are_in_the_repository() -> None:
    paths = re.findall(r"/opt/jetvla/([\w/.-]+\.(?:py|md))", UNIT.read_text(encoding="utf-8"))

    assert "runtime/run_robot.py" in paths
    assert all((ROOT / path).is_file() for path in paths)


# --- the container's first process --------------------------------------------------------------------------------------------


def contained(bundle: Path, robot: Path, *, stderr: Any) -> subprocess.Popen[str]:
    words = command(bundle, robot)
    words[1] = "runtime/container_entry.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, text=True)


@pytest.fixture
def driven(tmp_path: Path) -> Any:
    """A run under the container's first process, which drives; process and plant."""
    pytest.importorskip("onnxruntime")
    bundle = make_bundle(tmp_path / "tiny.bundle", Tiny())
    with FakePlant() as plant, (tmp_path / "stderr").open("w+") as stderr:
        commands = UdpCommands(host="127.0.0.1", port=plant.port)
        process = contained(
            bundle, save_robot(tmp_path / "robot.toml", robot_of(axes=EAGER, commands=commands)), stderr=stderr
        )
        try:
            assert plant.wait_for(lambda twist: not twist.is_zero, 60), (tmp_path / "stderr").read_text()
            yield process, plant
        finally:
            process.kill()
            process.wait()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_run_leaves_its_watchdog_time_in_a_container(driven: tuple[subprocess.Popen[str], FakePlant]) -> None:
    process, plant = driven
    [run] = children(process.pid)

    os.kill(run, signal.SIGKILL)

    assert process.wait(30) == 128 + signal.SIGKILL
    zeros = [stamp for stamp, twist in plant.log if twist.is_zero and stamp > (plant.stopped_at() or 0) - 0.001]
    assert plant.velocity.is_zero
    assert len(zeros) >= 10, "the first process stayed until the watchdog was done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_docker_stop_ends_a_run_in_order(
    driven: tuple[subprocess.Popen[str], FakePlant], number: signal.Signals
) -> None:
    process, plant = driven

    process.send_signal(number)

    assert process.wait(30) == 0
    deadline = time.monotonic() + 10
    while not plant.velocity.is_zero and time.monotonic() < deadline:
        time.sleep(0.01)
    assert plant.velocity.is_zero


def test_exit_codes_pass_through() -> None:
    script = ROOT / "runtime" / "container_entry.py"

    usage = subprocess.run([sys.executable, script, "--no-such-option"], capture_output=True, timeout=60, check=False)
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=60, check=False)

    assert usage.returncode == 2
    assert (shown.returncode, "--instruction" in shown.stdout) == (0, True)


# --- the guides ---------------------------------------------------------------------------------------------------------------

Struct = type[msgspec.Struct]
CAMERAS: tuple[Struct, ...] = robot_file.CameraConfig.__args__  # type: ignore[attr-defined]
COMMANDS: tuple[Struct, ...] = robot_file.CommandConfig.__args__  # type: ignore[attr-defined]


def headings(document: Path) -> dict[tuple[str, ...], str]:
    """The text right under every heading, without that of the headings below it, by the path of headings down to it."""
    found: dict[tuple[str, ...], str] = {}
    path: tuple[str, ...] = ()
    fenced = False
    for line in document.read_text(encoding="utf-8").splitlines(keepends=True):
        fenced ^= line.startswith("```")
        match = None if fenced else re.match(r"(#+) (.*)", line)
        if match:
            path = (*path[: len(match[1]) - 1], match[2].strip())
        found[path] = found.get(path, "") + ("" if match else line)
    return found


def keys_of(text: str) -> dict[str, str]:
    """Key and default of every row of the key table."""
    table = text.partition("| key | default |")[2]
    return dict(re.findall(r"^\| `(\w+)` \| `?(.*?)`? \|", table.partition("\n\n")[0], re.MULTILINE))


def expected_keys(kind: Struct, without: Struct | None = None) -> dict[str, str]:
    hidden = set() if without is None else set(without.__struct_fields__)
    keys = {}
    for field in msgspec.structs.fields(kind):
        if field.name in hidden:
            continue
        if field.required:
            keys[field.name] = "required"
        elif field.default is None or field.default_factory is not msgspec.NODEFAULT:
            keys[field.name] = "none"
        elif isinstance(field.default, msgspec.Struct):
            keys[field.name] = "none" if kind is LimitsFile else "all defaults"
        else:
            keys[field.name] = msgspec.json.encode(field.default).decode()
    return keys


def documented() -> list[tuple[tuple[str, ...], dict[str, str]]]:
    top = ("Driving a robot", "The robot file")
    base = robot_file._Camera
    rows: list[tuple[tuple[str, ...], dict[str, str]]] = [
        ((*top, "Top level"), expected_keys(RobotFile)),
        ((*top, "camera"), expected_keys(base)),
        ((*top, "axes"), expected_keys(Axis)),
        ((*top, "safety"), expected_keys(robot_file.Safety)),
        ((*top, "loop"), expected_keys(robot_file.Loop)),
        ((*top, "recorder"), expected_keys(robot_file.Recorder)),
        (("Driving a robot", "Limits file"), expected_keys(LimitsFile)),
    ]
    rows += [((*top, "camera", tag_of(kind)), expected_keys(kind, base)) for kind in CAMERAS]
    rows += [((*top, "commands", tag_of(kind)), expected_keys(kind)) for kind in COMMANDS]
    return rows


def tag_of(kind: Struct) -> str:
    return str(kind.__struct_config__.tag)


@pytest.mark.parametrize(
    ("path", "keys"), documented(), ids=lambda value: value[-1] if isinstance(value, tuple) else ""
)
def test_every_key_is_documented_with_its_default(path: tuple[str, ...], keys: dict[str, str]) -> None:
    assert keys_of(headings(GUIDES[0])[path]) == keys


def test_every_kind_is_documented_with_an_example() -> None:
    sections = headings(GUIDES[0])
    for table, kinds in (("camera", CAMERAS), ("commands", COMMANDS)):
        for kind in kinds:
            text = sections["Driving a robot", "The robot file", table, tag_of(kind)]
            assert f'kind = "{tag_of(kind)}"' in text
        below = {path[3] for path in sections if path[1:3] == ("The robot file", table) and len(path) > 3}
        assert below == set(map(tag_of, kinds)), "a kind that is gone"
    limits = sections["Driving a robot", "Limits file"]
    for kind in (robot_file.AxisLimits, robot_file.SafetyLimits):
        assert all(f"`{name}`" in limits for name in kind.__struct_fields__)


def test_every_reason_and_refusal_is_documented() -> None:
    text = GUIDES[0].read_text(encoding="utf-8")
    source = "".join((ROOT / "runtime" / name).read_text() for name in ("safety.py", "control_loop.py", "drive.py"))
    reasons = ("stale action", "stale frame", "no action", "speed limit", "acceleration limit", "not finite")
    reasons += ("nobody listens", "stopped by hand")

    assert all(f'"{reason}"' in source for reason in reasons)
    assert all(f"`{name}`" in text for name in (*REFUSALS, *reasons))


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.name)
def test_toml_in_the_guides_loads(document: Path, tmp_path: Path) -> None:
    blocks = blocks_of(document, "toml")
    assert bool(blocks) == (document == GUIDES[0])

    for block in blocks:
        tables = msgspec.toml.decode(block)
        path = tmp_path / "block.toml"
        path.write_text(block)
        if "schema" in tables:
            load_limits_file(path)
        else:
            whole = msgspec.toml.decode(REFERENCE.read_bytes()) | tables
            assert msgspec.convert(whole, RobotFile)


def blocks_of(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language; of none, outputs."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands_of(document: Path) -> list[str]:
    """Lines of the blocks that are to be typed, continued ones joined and comments dropped."""
    lines = re.sub(r"\\\n\s*", "", "".join(blocks_of(document, "bash"))).splitlines()
    return [re.sub(r"\s+# .*$", "", line) for line in lines if line.strip()]


def scripts_named(document: Path) -> set[tuple[str, ...]]:
    """Script and options of every command line in the document, wherever it stands."""
    text = re.sub(r"\\\n\s*", "", document.read_text(encoding="utf-8"))
    found = re.findall(r"python ((?:runtime|export|episodes|bench|train|calib)/\w+\.py)([^\n`|]*)", text)
    return {(script, *sorted(set(re.findall(r"(?<!\S)--[a-z-]+", rest)))) for script, rest in found}


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.name)
def test_commands_in_the_guides_exist(document: Path, help_of: Any) -> None:
    named = scripts_named(document)
    assert any("--doctor" in options for _, *options in named)

    for script, *options in sorted(named):
        shown = help_of(script)
        assert all(re.search(rf"{option}\b", shown) for option in options), (script, options)
    if document == GUIDES[0]:
        table = headings(document)["Driving a robot", "Ways to run it"]
        offered = set(re.findall(r"`(--[a-z-]+)", table)) - {"--robot"}
        assert all(re.search(rf"{option}\b", help_of("runtime/run_robot.py")) for option in offered)


@pytest.fixture(scope="module")
def help_of() -> Any:
    known: dict[str, str] = {}

    def show(script: str) -> str:
        if script not in known:
            words = [sys.executable, str(ROOT / script), "--help"]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            known[script] = done.stdout
        return known[script]

    return show


def test_quickstarts_have_the_same_commands_and_outputs() -> None:
    english, korean = QUICKSTARTS
    outputs = [blocks_of(path, "") for path in QUICKSTARTS]

    assert len(commands_of(english)) > 30
    assert commands_of(english) == commands_of(korean)
    assert outputs[0] == outputs[1]
    assert outputs[0]
    rows = [len(re.findall(r"^\| .* \|$", path.read_text(encoding="utf-8"), re.MULTILINE)) for path in QUICKSTARTS]
    assert rows[0] == rows[1], "the tables of troubles"


def test_what_the_quickstart_installs_is_what_the_project_has() -> None:
    project = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]
    dockerfile = (ROOT / "Dockerfile.jetson").read_text(encoding="utf-8")
    [install] = [line for line in commands_of(QUICKSTARTS[0]) if "-e " in line]

    extras = set(re.findall(r'-e "\.\[([\w,]+)\]"', install)[0].split(","))

    assert extras <= project["optional-dependencies"].keys()
    assert re.search(r"pip==[\d.]+", dockerfile)[0] in "\n".join(commands_of(QUICKSTARTS[0]))  # type: ignore[index]
    assert re.search(r'"cuda-bindings[^"]*"', install)[0].strip('"') in dockerfile  # type: ignore[index]
    assert any(line.startswith("numpy==") for line in (ROOT / "constraints.txt").read_text().splitlines())


def test_paths_in_the_quickstarts_are_in_the_repository() -> None:
    text = QUICKSTARTS[0].read_text(encoding="utf-8")
    paths = re.findall(r"\b(runtime/deploy/[\w.-]+)", text)

    assert len(paths) >= 3
    assert all((ROOT / path).is_file() for path in paths)


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = document if not name else document.parent / name
        assert path.is_file(), target
        if anchor:
            lines = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}
            assert anchor in anchors, target


def test_messages_in_the_table_of_troubles_are_ones_that_are_said() -> None:
    """A message that was reworded could not be searched for any more."""
    text = QUICKSTARTS[0].read_text(encoding="utf-8").partition("## When it does not work")[2]
    source = "".join(path.read_text() for folder in ("runtime", "bundle") for path in (ROOT / folder).rglob("*.py"))
    said = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    foreign = {"numpy.core.multiarray failed to import"}  # numpy's own
    made_of = {
        "held back: stale frame": ("held back", "stale frame"),
        "needs the ROS package camera_interfaces": (" needs the ROS package {",),
        "no engines for this machine": (" has no {", "}engines for this machine"),
    }

    assert len(said) > 8
    for message in set(said) - foreign:
        assert all(part in source for part in made_of.get(message, (message,))), message
