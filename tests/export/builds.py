"""Builds for tests: made quietly, changed a little, looked into."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bundle.manifest import Manifest
from export.console import Reporter
from export.pipeline import STEPS, BuildConfig, build
from runtime.policy import Policy
from tests.checkpoints import rewrite

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "export" / "build_engines.py"
# Frames that verify a bundle whose verification is not what a test is about.
QUICK = 9  # more than a window: fewer frames never pass


def quietly(config: BuildConfig) -> str:
    """Build; the log."""
    reporter = Reporter(STEPS, quiet=True)
    assert build(config, reporter) == config.target
    return reporter.log


def change(config: BuildConfig, /, **options: Any) -> BuildConfig:
    """The same build with other options."""
    return BuildConfig(**{**vars(config), **options})


def edit_weight(checkpoint: Path, name: str, *, by: float = 1.5) -> None:
    """Scale one tensor of a checkpoint; keys that share its storage follow."""
    new = checkpoint.with_suffix(".new")
    rewrite(checkpoint, new, lambda content: content["state_dict"][f"model.{name}"].mul_(by))
    new.replace(checkpoint)


def command_line(*arguments: object, program: str | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """export/build_engines.py in a process of its own, or a program that is given its path first; without engines unless named."""
    start = [] if program is None else ["-c", program]
    words = [str(argument) for argument in arguments]
    if "--tensorrt" not in words and "--engines-only" not in words:
        words += ["--tensorrt", "off"]
    command = [sys.executable, *start, str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=cwd)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but locks, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def left_over(folder: Path) -> list[str]:
    """What lies in a folder but the lock files, which stay on purpose: removing them would be a race."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def report(bundle: Path, name: str) -> dict[str, Any]:
    """One of a bundle's JSON reports."""
    content: dict[str, Any] = json.loads((bundle / "reports" / name).read_text())
    return content


def reused(bundle: Path) -> list[str]:
    """The stages that the last build took from the bundle before."""
    stages: list[str] = report(bundle, "build.json")["reused_stages"]
    return stages


def weight_files(bundle: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and content of each stage's weights, by stage."""
    entries = Manifest.load(bundle).stages
    paths = {stage: bundle / entry.weights for stage, entry in entries.items()}
    return {stage: (path.stat().st_ino, path.read_bytes()) for stage, path in paths.items()}


def precisions(bundle: Path) -> dict[str, str]:
    """Of each stage."""
    return {stage: entry.precision for stage, entry in Manifest.load(bundle).stages.items()}


def assert_complete(bundle: Path) -> Manifest:
    """A bundle that a robot would take: every file recorded and hashed, and the golden step right."""
    manifest = Manifest.load(bundle)
    manifest.verify(bundle)
    assert set(contents(bundle)) == set(manifest.files) | {"manifest.json"}
    assert Policy.load(bundle, "ort:cpu", threads=1).manifest == manifest
    return manifest
