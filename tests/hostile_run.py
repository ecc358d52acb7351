"""Loads every case of tests/hostile_checkpoints.py in a process of its own, and prints what came of it.

A process has 20 s of CPU time and 30 s of the clock. What it took is counted from what a process that loads nothing has, and held against
what a sound file of that size takes: its pages, and a copy in fp32.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from bundle.errors import JetvlaError
from tests.bounded_child import CPU_S, MEMORY_BYTES, in_child, table
from tests.hostile_checkpoints import Case, cases
from train.base import tensors_sha256
from train.checkpoint import load
from train.synthetic import SyntheticFiles, SyntheticOptions, make_checkpoint

_PATIENCE_S = 30.0
_LIMIT_CPU_S = 20
_TITLES = {"refused": "refused", "same": "the same policy", "loaded": "another policy, as stated"}


@dataclass(frozen=True)
class Outcome:
    """What came of a case: `refused`, `same` (the sound policy), `loaded`, `untyped`, `killed`; and what it took."""

    case: Case
    kind: str
    said: str
    cpu_s: float
    memory: int
    file_bytes: int
    ran_code: bool

    @property
    def name(self) -> str:
        """The case's."""
        return self.case.name

    def faults(self) -> list[str]:
        """The promises that it broke."""
        found = ["ran code"] if self.ran_code else []
        if self.kind == "killed" or self.cpu_s > CPU_S:
            found.append("more than 10 s")
        if self.memory > MEMORY_BYTES + 3 * self.file_bytes:
            found.append("more than 1 GB above need")
        if self.kind == "untyped":
            found.append("untyped exception")
        if self.kind == "loaded" and not self.case.may_load:
            found.append("loaded though damaged")
        return found


def load_case(case: Case, path: Path, sound_digest: str) -> tuple[str, str]:
    """The kind of the outcome, and what was said."""
    torch.set_num_threads(1)  # a forked process has none of the threads that its parent's pool waits for
    folder = path.parent
    try:
        loaded = load(
            path,
            packing="upstream",
            config=None if case.config is None else folder / case.config,
            base=None if case.base is None else folder / case.base,
        )
    except JetvlaError as error:
        str(error).encode()
        return "refused", f"{type(error).__name__}: {error.what[:300]}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "untyped", f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    return ("same" if _digest(loaded.state, loaded.policy.spec) == sound_digest else "loaded"), ""


def _digest(state: object, spec: object) -> str:
    return f"{tensors_sha256(state)} {spec}"  # type: ignore[arg-type]


def sound_digest(files: SyntheticFiles) -> str:
    """What the sound checkpoint gives."""
    loaded = load(files.checkpoint, packing="upstream")
    return _digest(loaded.state, loaded.policy.spec)


def run_case(case: Case, folder: Path, sound: SyntheticFiles, digest: str, marker: Path) -> Outcome:
    """Make a case and load it in a child."""
    (folder / "base").symlink_to(sound.base)
    path = case.make(folder)
    size = sum(each.stat().st_blocks * 512 for each in folder.rglob("*") if each.is_file() and not each.is_symlink())
    ended = in_child(lambda: load_case(case, path, digest), patience_s=_PATIENCE_S, limit_cpu_s=_LIMIT_CPU_S)
    kind, said = ended.said or ("killed", ended.why)
    return Outcome(case, kind, said, ended.cpu_s, ended.memory, size, marker.exists())


def run_all(chosen: Iterable[Case], folder: Path, sound: SyntheticFiles, marker: Path) -> Iterable[Outcome]:
    """Every case, one after the other; its files are removed."""
    digest = sound_digest(sound)
    for case in chosen:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            yield run_case(case, Path(own), sound, digest, marker)
        marker.unlink(missing_ok=True)


def main(pattern: str = "") -> int:
    """Print the table; 1 if a promise was broken."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sound = make_checkpoint(folder / "sound", SyntheticOptions())
        marker = folder / "code-ran"
        outcomes = []
        for outcome in run_all((case for case in cases(sound, marker) if pattern in case.name), folder, sound, marker):
            outcomes.append(outcome)
            if faults := outcome.faults():
                print(
                    f"{outcome.case.name}: {', '.join(faults)}; {outcome.kind} {outcome.said}",
                    file=sys.stderr,
                    flush=True,
                )
        print(table(outcomes, _TITLES))
    return int(any(outcome.faults() for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
