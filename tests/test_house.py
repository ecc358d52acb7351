"""The rules of the house that no linter knows: what may be imported where, and how a file may be called."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = frozenset({"bundle", "episodes", "train", "calib", "export", "runtime", "bench", "sim"})

# What no robot has: neither `bundle` nor `runtime` may need it, not even through a third party.
ABSENT_ON_THE_ROBOT = frozenset({"torch", "transformers", "peft", "onnx", "onnxscript"})
# What is an extra: the policy itself must load without it, for instance with the fake backend.
EXTRAS = frozenset(
    {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "pycuda", "tokenizers", "h5py", "matplotlib", "psutil"}
)

# Import names that jetvla or its neighbours use, whether or not they are installed where this test runs.
FOREIGN_NAMES = ABSENT_ON_THE_ROBOT | EXTRAS
FOREIGN_NAMES |= {
    "numpy",
    "msgspec",
    "PIL",
    "tyro",
    "rich",
    "filelock",
    "safetensors",
    "accelerate",
    "ml_dtypes",
    "onnx_ir",
}
FOREIGN_NAMES |= {
    "openvino",
    "polygraphy",
    "modelopt",
    "mujoco",
    "rclpy",
    "cv2",
    "yaml",
    "pytest",
    "hypothesis",
    "tests",
    "conftest",
}

IMPORT_ALL_WITH_BLOCKED = """
import importlib, sys

blocked, modules = (set(argument.split(",")) for argument in sys.argv[1:])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"blocked by the test: {name}", name=name)

sys.meta_path.insert(0, Blocker())
for module in sorted(modules):
    try:
        importlib.import_module(module)
    except Exception as error:
        raise SystemExit(f"cannot import {module}: {type(error).__name__}: {error}")
leaked = blocked & {name.partition(".")[0] for name in sys.modules}
if leaked:
    raise SystemExit(f"imported although blocked: {sorted(leaked)}")
"""


def module_names(folder: str) -> list[str]:
    """Dotted names of all modules of a top-level folder."""
    paths = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]


def import_with_blocked(modules: list[str], blocked: frozenset[str]) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        IMPORT_ALL_WITH_BLOCKED,
        ",".join(sorted(blocked)),
        ",".join(modules),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def repository_files() -> list[Path]:
    """What is committed, or would be by `git add .`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so there is no telling which files are ours")
    paths = (ROOT / name for name in listing.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def scripts() -> list[Path]:
    return sorted(path for folder in ("scripts", ".ci") for path in (ROOT / folder).iterdir() if path.is_file())


def test_bundle_and_runtime_import_without_what_the_robot_lacks() -> None:
    modules = module_names("bundle") + module_names("runtime")
    assert "bundle" in modules
    assert "runtime" in modules

    result = import_with_blocked(modules, ABSENT_ON_THE_ROBOT)

    assert result.returncode == 0, result.stderr


def test_policy_imports_without_any_extra() -> None:
    if not (ROOT / "runtime" / "policy.py").exists():
        pytest.skip("there is no runtime/policy.py yet")

    result = import_with_blocked(["runtime.policy"], ABSENT_ON_THE_ROBOT | EXTRAS)

    assert result.returncode == 0, result.stderr


def test_the_import_blocker_blocks() -> None:
    result = import_with_blocked(["bundle", "numpy.linalg"], frozenset({"numpy"}))

    assert result.returncode != 0
    assert "cannot import numpy.linalg: ModuleNotFoundError: blocked by the test: numpy" in result.stderr


@pytest.mark.parametrize("folder", sorted(folder for folder in FOLDERS if (ROOT / folder).is_dir()))
def test_no_module_shadows_an_import(folder: str) -> None:
    """A running script puts its folder first on sys.path: export/onnx.py would then be everybody's `onnx`."""
    installed = set(importlib.metadata.packages_distributions())
    taken = sys.stdlib_module_names | FOREIGN_NAMES | FOLDERS | installed
    entries = [path for path in (ROOT / folder).iterdir() if path.suffix == ".py" or any(path.glob("*.py"))]

    shadowing = sorted(f"{folder}/{path.name}" for path in entries if path.stem in taken)

    assert not shadowing, f"rename, because these hide an import of the same name: {shadowing}"


def test_no_other_distribution_owns_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    foreign = {name: owners[name] for name in FOLDERS & owners.keys() if set(owners[name]) != {"jetvla"}}
    assert not foreign, f"another installed distribution provides a top-level name of ours: {foreign}"


def test_no_module_is_called_after_nothing() -> None:
    vague = {"util", "utils", "helper", "helpers", "common", "misc"}
    found = sorted(str(path.relative_to(ROOT)) for path in repository_files() if path.stem.lower() in vague)
    assert not found, f"name these after the one job that they do: {found}"


def test_no_text_names_a_developers_home() -> None:
    # Put together here, so that this file does not match itself.
    slash = "/"
    unix_home = slash + "(?:home|Users)" + slash + r"[\w.-]"
    root_home = r"(?<![\w.~-])" + slash + "root" + slash
    windows_home = r"\b[A-Za-z]:\\+" + r"Users\\+\w"
    needle = re.compile("|".join([unix_home, root_home, windows_home]))
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text
        lines = enumerate(text.splitlines(), start=1)
        found += [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for number, line in lines if needle.search(line)]
    assert not found, "absolute paths of somebody's machine:\n" + "\n".join(found)


@pytest.mark.parametrize("script", scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_script_is_executable_and_parses(script: Path) -> None:
    first_line, _, rest = script.read_text(encoding="utf-8").partition("\n")
    if script.name.startswith("_"):  # sourced by the others, never run
        assert not os.access(script, os.X_OK)
    else:
        assert os.access(script, os.X_OK)
    if first_line == "#!/usr/bin/env python3":
        compile(script.read_text(encoding="utf-8"), script.name, "exec")
        return
    assert script.name.startswith("_") or first_line == "#!/usr/bin/env bash"
    assert script.name.startswith("_") or "\nset -euo pipefail\n" in rest

    syntax = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)

    assert syntax.returncode == 0, syntax.stderr
