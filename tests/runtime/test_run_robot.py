"""The command line: results on stdout, everything else on stderr, and an exit code that a script can rely on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from msgspec import structs
from rich.console import Console

from bundle.errors import BundleError
from bundle.manifest import Instruction, Manifest
from tests.bundles import GO_LEFT, GO_RIGHT, LEFT_IDS, Tiny, add_int8, make_bundle
from tests.runtime.conftest import TinyBundle

pytest.importorskip("onnxruntime")
h5py = pytest.importorskip("h5py")

from episodes.writer import write_episode  # noqa: E402
from tests.hanging_episodes import write_hanging  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "runtime" / "run_robot.py"
LENGTH = 4
Done = subprocess.CompletedProcess[str]


def run_robot(*arguments: object, folder: Path, **environment: str) -> Done:
    """Run the script in `folder` as a user does: without the repository on the path."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NO_COLOR")}
    return subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, *map(str, arguments)],
        cwd=folder,
        env=variables | {"COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def bundle(tiny_bundle: TinyBundle) -> Path:
    return tiny_bundle(Tiny())


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    made = make_bundle(tmp_path / "int8.bundle")
    add_int8(made)
    return made


@pytest.fixture(scope="session")
def episode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (LENGTH, 24, 32, 3), dtype=np.uint8)
    actions = rng.uniform(-1.15, 1.15, (LENGTH, 3))
    path = tmp_path_factory.mktemp("episodes") / "episode.h5"
    return write_episode(path, frames, actions, instruction=GO_LEFT, fps=6.0)


def assert_refused(done: Done, kind: str, *texts: str) -> None:
    """Exit code 1 and the error's own text: no traceback, nothing on stdout."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert f"error: {kind}\n" in done.stderr
    assert "\n\nhint: " in done.stderr
    for text in texts:
        assert text in done.stderr


# --- results ------------------------------------------------------------------------------------------------------------------


def test_check(bundle: Path, tmp_path: Path) -> None:
    """From another working directory, with a path relative to it."""
    relative = os.path.relpath(bundle, tmp_path)
    done = run_robot(relative, "--check", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{relative}: fp32, packing upstream, backend ort:cpu, parity PASS, loaded in " in done.stderr
    assert done.stderr.endswith(" s, hashes ok, golden step ok\n")
    assert list(tmp_path.iterdir()) == []


def test_check_without_hashes(bundle: Path, tmp_path: Path) -> None:
    done = run_robot(bundle, "--check", "--skip-hashes", folder=tmp_path)
    assert done.returncode == 0
    assert "hashes not checked" in done.stderr


def test_check_claims_only_what_was_checked(bundle: Path, tmp_path: Path) -> None:
    done = run_robot(bundle, "--check", "--backend", "fake", folder=tmp_path)
    assert done.returncode == 0
    assert "golden step ok" not in done.stderr


def test_check_as_json(bundle: Path, tmp_path: Path) -> None:
    done = run_robot(bundle, "--check", "--json", "--backend", "ort:cpu", "--threads", 1, folder=tmp_path)
    assert done.returncode == 0
    content = json.loads(done.stdout)
    assert content.pop("load_s") > 0
    assert content == {"bundle": str(bundle), "backend": "ort:cpu", "precision": "fp32", "notes": []}


@pytest.mark.parametrize(("precision", "runs"), [("auto", "int8"), ("int8", "int8"), ("float", "fp32")])
def test_check_of_a_precision(quantized: Path, tmp_path: Path, precision: str, runs: str) -> None:
    done = run_robot(quantized, "--check", "--json", "--precision", precision, "--backend", "ort:cpu", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["precision"] == runs
    told = "int8 (action error 0.01 of 0.02 on 200 frames)" if runs == "int8" else runs
    assert f": {told}, packing upstream, backend ort:cpu, " in done.stderr
    assert ("float parity PASS" in done.stderr) == (runs == "int8")
    assert "INT8 variant" not in done.stderr


def test_check_says_why_int8_does_not_run(quantized: Path, tmp_path: Path) -> None:
    path = quantized / "vision.int8.onnx.data"
    path.write_bytes(path.read_bytes()[::-1])
    done = run_robot(quantized, "--check", "--backend", "ort:cpu", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ": fp32, packing upstream, backend ort:cpu, " in done.stderr
    assert f"\nthe INT8 variant does not run: ort:cpu in int8: {path} is corrupt" in done.stderr


def test_int8_of_a_bundle_that_has_none(bundle: Path, tmp_path: Path) -> None:
    assert_refused(
        run_robot(bundle, "--check", "--precision", "int8", folder=tmp_path), "BundleError", "has no INT8 variant"
    )


def test_replay_prints_a_table(bundle: Path, episode: Path, tmp_path: Path) -> None:
    done = run_robot(bundle, "--replay", episode, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"episode.h5: 4 frames, v1, '{GO_LEFT}'\n" in done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["axis", "recorded", "mean", "predicted", "mean", "RMSE"]
    assert [row[0] for row in rows[1:3]] == ["linear_x", "linear_y"]
    assert rows[3] == ["section", "p50", "ms", "p95", "ms", "max", "ms"]
    assert [row[0] for row in rows[4:]] == ["preprocess", "vision", "language", "action_head", "total"]
    with h5py.File(episode) as file:
        recorded = file["actions"][:].mean(axis=0)
    for row, mean in zip(rows[1:3], recorded[:2], strict=True):
        assert row[1] == f"{mean:+.3f}"
        assert row[-1] == "m/s"


def test_replay_of_a_file_that_hangs_the_library(bundle: Path, tmp_path: Path) -> None:
    done = run_robot(bundle, "--replay", write_hanging(tmp_path), folder=tmp_path)
    assert_refused(done, "EpisodeError", "is damaged: reading it does not end")


def _reads_episodes(process: Path) -> bool:
    """Whether it is the child that opens files first, and has begun: it ignores Ctrl-C then."""
    try:
        if b"first_contact_child" not in (process / "cmdline").read_bytes():
            return False
        (ignored,) = (line for line in (process / "status").read_text().splitlines() if line.startswith("SigIgn:"))
    except (FileNotFoundError, ProcessLookupError):  # another one, which ended since it was listed
        return False
    return bool(int(ignored.split()[1], 16) & 1 << signal.SIGINT - 1)


def test_ctrl_c_ends_a_replay_while_its_file_hangs_the_library(bundle: Path, tmp_path: Path) -> None:
    path = write_hanging(tmp_path, where="observations/images")
    command = [sys.executable, "-W", "error", SCRIPT, str(bundle), "--replay", str(path)]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in a shell's background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        found: list[Path] = []
        while process.poll() is None and not found:
            time.sleep(0.01)
            found = [child for pid in children.read_text().split() if _reads_episodes(child := Path(f"/proc/{pid}"))]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted." in said
    assert not found[0].exists()


def test_replay_as_json(bundle: Path, episode: Path, tmp_path: Path) -> None:
    done = run_robot(bundle, "--replay", episode, "--json", "--instruction", GO_RIGHT, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)  # and nothing else stands on stdout
    assert list(content) == [
        "bundle",
        "backend",
        "precision",
        "load_s",
        "notes",
        "instruction",
        "frames",
        "axes",
        "predicted",
        "recorded",
        "timing_ms",
    ]
    assert (content["frames"], content["instruction"]) == (LENGTH, GO_RIGHT)
    predicted, recorded = np.array(content["predicted"]), np.array(content["recorded"])
    assert predicted.shape == recorded.shape == (LENGTH, 2)
    rmse = np.sqrt(np.mean((predicted - recorded) ** 2, axis=0))
    assert [axis["rmse"] for axis in content["axes"]] == pytest.approx(rmse.tolist())
    assert "RMSE" not in done.stderr


def test_colour(bundle: Path, tmp_path: Path) -> None:
    """Only where it is wanted: neither in a pipe, nor where NO_COLOR is set."""
    escape = "\x1b["
    forced = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert escape in run_robot(bundle, folder=tmp_path, **forced).stderr  # else the rest says nothing
    assert "\x1b[1;31m" not in run_robot(bundle, folder=tmp_path, NO_COLOR="1", **forced).stderr
    assert escape not in run_robot(bundle, folder=tmp_path).stderr


# --- refusals -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--bogus"], ["--threads", "two"], ["extra", "--check"], ["--replay"]])
def test_usage_errors(bundle: Path, tmp_path: Path, arguments: list[str]) -> None:
    done = run_robot(bundle, *arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr


def test_no_arguments(tmp_path: Path) -> None:
    done = run_robot(folder=tmp_path)
    assert done.returncode == 2
    assert "BUNDLE" in done.stderr


def test_help(tmp_path: Path) -> None:
    done = run_robot("--help", folder=tmp_path)
    assert done.returncode == 0
    for text in ("BUNDLE", "--replay", "--check", "--instruction", "--backend", "--json", "Exit codes: 0 ok, 1 failed"):
        assert text in done.stdout


def test_nothing_to_do(bundle: Path, tmp_path: Path) -> None:
    done = run_robot(bundle, folder=tmp_path)
    assert done.returncode == 2
    assert "no --instruction, and neither of --replay, --check, --doctor" in done.stderr
    assert GO_LEFT in done.stderr  # what it could be told
    both = run_robot(bundle, "--check", "--doctor", folder=tmp_path)
    assert both.returncode == 2
    assert "one thing at a time" in both.stderr


def test_no_robot_file(bundle: Path, tmp_path: Path) -> None:
    done = run_robot(bundle, "--instruction", GO_LEFT, folder=tmp_path)
    assert done.returncode == 2
    assert "no robot file" in done.stderr
    (tmp_path / "robot.toml").write_text("schema = 1\n")
    found = run_robot(bundle, "--instruction", GO_LEFT, folder=tmp_path)
    assert found.returncode == 1
    assert "robot.toml is not a robot file" in found.stderr


def test_the_desk_robot(bundle: Path, tmp_path: Path) -> None:
    """What README shows to somebody without a robot."""
    desk = ROOT / "runtime" / "deploy" / "desk-robot.toml"
    done = run_robot(bundle, "--robot", desk, "--instruction", GO_LEFT, "--seconds", 1, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["zero_sent"]
    assert result["decisions"] > 0
    assert "robot desk: camera simulated, commands to console" in done.stderr


def test_a_bundle_replaced_after_planning_does_not_drive(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits and axes are those of one bundle: the commands of another are not for them."""
    import runtime.run_robot as command

    manifest = Manifest.load(bundle)
    other = SimpleNamespace(manifest=structs.replace(manifest, manifest_sha256="0" * 64))
    monkeypatch.setattr(command, "_load", lambda *_: (other, {}))
    monkeypatch.setattr(command, "drive", lambda plan, load, *_, **__: load())
    robot = ROOT / "runtime" / "deploy" / "desk-robot.toml"
    with pytest.raises(BundleError, match="was replaced while it was loaded"):
        command._drive(command.RunConfig(bundle, robot, instruction=GO_LEFT, record=False), Console(quiet=True))


def test_no_bundle(tmp_path: Path) -> None:
    done = run_robot("absent.bundle", "--check", folder=tmp_path)
    assert_refused(done, "BundleError", "absent.bundle is not a bundle", "got:      no manifest.json")


def test_a_corrupt_bundle(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "tiny.bundle")
    content = bytearray((folder / "golden.npz").read_bytes())
    content[100] ^= 1
    (folder / "golden.npz").write_bytes(content)
    done = run_robot(folder, "--check", "--json", folder=tmp_path)
    assert_refused(done, "BundleError", "golden.npz is corrupt")


def test_an_unknown_backend(bundle: Path, tmp_path: Path) -> None:
    done = run_robot(bundle, "--check", "--backend", "tpu", folder=tmp_path)
    assert_refused(done, "BackendError", "unknown backend 'tpu'", "ort:cpu")


def test_an_unknown_schema(bundle: Path, episode: Path, tmp_path: Path) -> None:
    done = run_robot(bundle, "--replay", episode, "--schema", "v9", folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_no_instruction(bundle: Path, episode: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.h5"
    path.write_bytes(episode.read_bytes())
    with h5py.File(path, "r+") as file:
        del file["language_instruction"]
    done = run_robot(bundle, "--replay", path, folder=tmp_path)
    assert_refused(done, "EpisodeError", f"{path} has no instruction", "hint: pass --instruction")
    assert f"warning: {path}: no instruction is stored" in done.stderr

    assert run_robot(bundle, "--replay", path, "--instruction", GO_LEFT, folder=tmp_path).returncode == 0


def test_an_assumed_instruction_is_said(tiny_bundle: TinyBundle, episode: Path, tmp_path: Path) -> None:
    text = "Navigate around obstacles and reach the front of the beverage bottle on the left"
    bundle = tiny_bundle(Tiny(instructions=(Instruction(text=text, token_ids=LEFT_IDS),)))
    path = tmp_path / "episode_left.h5"
    path.write_bytes(episode.read_bytes())
    with h5py.File(path, "r+") as file:
        del file["language_instruction"]
    done = run_robot(bundle, "--replay", path, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"assuming '{text}' from the file name" in done.stderr


def test_an_unknown_instruction(bundle: Path, episode: Path, tmp_path: Path) -> None:
    done = run_robot(bundle, "--replay", episode, "--instruction", "dance", folder=tmp_path)
    assert_refused(done, "PromptError", "cannot tokenise 'dance'", f"'{GO_LEFT}' | '{GO_RIGHT}'")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("absent.h5", None, "episode file not found"),
        ("empty.h5", b"", "an empty file (0 bytes)"),
        ("text.h5", b"not HDF5" * 100, "is not an HDF5 file"),
    ],
)
def test_no_episode(bundle: Path, tmp_path: Path, name: str, content: bytes | None, text: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_refused(run_robot(bundle, "--replay", name, folder=tmp_path), "EpisodeError", name, text)


def test_a_corrupt_frame(bundle: Path, episode: Path, tmp_path: Path) -> None:
    path = tmp_path / "corrupt.h5"
    path.write_bytes(episode.read_bytes())
    with h5py.File(path) as file:
        chunk = file["images"].id.get_chunk_info_by_coord((2, 0, 0, 0))
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\0" * chunk.size)
    done = run_robot(bundle, "--replay", path, "--json", folder=tmp_path)
    assert_refused(done, "EpisodeError", "frame 2 of 4 is corrupt")


def test_without_h5py(bundle: Path, episode: Path, tmp_path: Path) -> None:
    """A robot that only drives has none; --check works there."""
    (tmp_path / "h5py.py").write_text("raise ImportError('no h5py here')\n")
    assert run_robot(bundle, "--check", folder=tmp_path, PYTHONPATH=str(tmp_path)).returncode == 0
    done = run_robot(bundle, "--replay", episode, folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert_refused(done, "ConfigError", "reading episodes needs h5py", "no h5py here", "pip install 'jetvla[data]'")


@pytest.mark.parametrize("text", ["go [left]", "go [/left]"])
def test_brackets_are_only_text(tiny_bundle: TinyBundle, episode: Path, tmp_path: Path, text: str) -> None:
    bundle = tiny_bundle(Tiny(instructions=(Instruction(text=text, token_ids=LEFT_IDS),)))
    done = run_robot(bundle, "--replay", episode, "--instruction", text, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"'{text}'" in done.stderr


def test_brackets_in_a_path_are_only_text(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "new [" / "x]")
    done = run_robot(folder.relative_to(tmp_path), "--check", folder=tmp_path)
    assert done.returncode == 0, done.stderr
