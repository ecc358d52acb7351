"""The command line: exit codes, what is printed, and processes that are killed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from bundle.manifest import Manifest
from runtime.policy import Policy
from tests.calib.conftest import Own
from tests.calib.quantizing import GENEROUS
from tests.export.builds import contents, left_over

ROOT = Path(__file__).resolve().parents[2]


def command(bundle: Path, recorded: Path, *options: str) -> list[str]:
    words = ["--frames", "16", "--held-out", "12", "--threads", "1", "--backend", "ort:cpu", *options]
    return [sys.executable, str(ROOT / "calib" / "quantize.py"), str(bundle), str(recorded), *words]


def driving_by_noise(words: list[str], *, also: str = "") -> list[str]:
    """The same command where directions of a random policy do not matter."""
    program = (
        "import runpy, sys, time\n"
        "import calib.acceptance, calib.publish\n"
        f"calib.acceptance._EVENTS = 1.0\n{also}"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return [words[0], "-c", program, *words[1:]]


def test_the_command_line(own: Own, recorded: Path, tmp_path: Path) -> None:
    """Nothing meets the budget: 3. The same with a larger one: a line of JSON."""
    bundle = own()
    before = contents(bundle)
    words = ("--json", "--max-action-error")
    refused = subprocess.run(
        command(bundle, recorded, *words, "1e-6"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "CalibrationError" in refused.stderr
    assert "no INT8 variant stays within the budget" in refused.stderr
    assert contents(bundle) == before

    done = subprocess.run(
        driving_by_noise(command(bundle, recorded, *words, str(GENEROUS))),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["bundle"] == str(bundle)
    assert said["quantized"] == json.loads((bundle / "manifest.json").read_bytes())["quantized"]


def test_usage_errors_are_2(own: Own, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "calib" / "quantize.py"), str(own())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "--allow-random" in done.stderr


def test_recordings_and_locales_that_are_not_utf_8(own: Own, recorded: Path, tmp_path: Path) -> None:
    """File names as an older Korean system wrote them, and a terminal that knows ASCII only."""
    bundle, named = own(), tmp_path / "recorded"
    named.mkdir()
    for path in recorded.glob("*.h5"):
        shutil.copyfile(path, os.fsencode(named) + b"/\xc0\xd3_" + os.fsencode(path.name))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "POSIX",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(
        driving_by_noise(command(bundle, named, "--max-action-error", str(GENEROUS))),
        cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert Manifest.load(bundle).quantized is not None
    assert "\\udcc0\\udcd3_" in (bundle / "reports" / "quantization.html").read_text(encoding="utf-8")


def test_a_full_disk_is_a_typed_error(own: Own, recorded: Path, tmp_path: Path) -> None:
    """While the integers are written; the bundle is as it was, and with room the same command goes on."""
    bundle = own()
    before = contents(bundle)
    words = driving_by_noise(command(bundle, recorded, "--max-action-error", str(GENEROUS)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    full = subprocess.run(
        words,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=little_room,
    )
    assert full.returncode == 1
    assert "StorageError" in full.stderr
    assert "Traceback" not in full.stderr
    assert "[3/6] Integers" in full.stderr
    assert contents(bundle) == before
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "taking up what an earlier run finished" in done.stderr


# A file or folder that appears beside or in the bundle while it is quantized, in the order of appearance.
MOMENTS = (
    "calibration.vision.npz",
    "language.integers.data",
    "evaluations.jsonl",
    ".policy.bundle.building-*",
)


def test_killed_at_any_moment_the_same_command_completes(own: Own, recorded: Path, tmp_path: Path) -> None:
    """Killed four times, ever later; the bundle is a good one all the while, and what was finished stays so."""
    bundle = own()
    before = contents(bundle)
    words = command(bundle, recorded, "--max-action-error", str(GENEROUS))
    late = (  # time to be killed in
        "render = calib.publish.render\ncalib.publish.render = lambda page: (time.sleep(0.5), render(page))[1]\n"
    )
    start = driving_by_noise(words, also=late)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    manifest = Manifest.load(bundle)
    for moment in MOMENTS:
        process = subprocess.Popen(
            start, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while not appeared(tmp_path, moment):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            assert Manifest.load(bundle) == manifest
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert contents(bundle) == before
        Policy.load(bundle, "ort:cpu", threads=1).close()

    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "taking up what an earlier run finished" in done.stderr
    finished = Manifest.load(bundle)
    assert finished.quantized is not None
    finished.verify(bundle)
    assert set(contents(bundle)) == set(finished.files) | {"manifest.json"}
    assert left_over(tmp_path) == [bundle.name]
    Policy.load(bundle, "ort:cpu", precision="int8", threads=1).close()


def appeared(folder: Path, name: str) -> bool:
    return any(folder.glob(name)) or any(folder.glob(f".policy.bundle.quantizing-*/{name}"))
