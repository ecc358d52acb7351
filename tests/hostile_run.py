"""Loads every case of tests/hostile_checkpoints.py in a process of its own, and prints what came of it.

A process has 20 s of CPU time and 30 s of the clock. What it took is counted from what a process that loads nothing has, and held against
what a sound file of that size takes: its pages, and a copy in fp32.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from bundle.errors import JetvlaError
from tests.hostile_checkpoints import Case, cases
from train.base import tensors_sha256
from train.checkpoint import load
from train.synthetic import SyntheticFiles, SyntheticOptions, make_checkpoint

CPU_S = 10.0
MEMORY_BYTES = 1 << 30
_PATIENCE_S = 30.0
_LIMIT_CPU_S = 20
_LIMIT_ADDRESSES = 64 << 30


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
    kind, said, usage, before = _in_child(lambda: load_case(case, path, digest))
    cpu_s, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 - before
    return Outcome(case, kind, said, cpu_s, memory, size, marker.exists())


def _in_child(work: Callable[[], tuple[str, str]]) -> tuple[str, str, resource.struct_rusage, int]:
    """What `work` says, what the process used, and the resident bytes with which it began."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (_LIMIT_CPU_S, _LIMIT_CPU_S))
        resource.setrlimit(resource.RLIMIT_AS, (_LIMIT_ADDRESSES, _LIMIT_ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)  # a forked process has none of the threads that its parent's pool waits for
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        try:
            os.write(writing, json.dumps([*work(), before]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], _PATIENCE_S)
    answer = os.read(reading, 1 << 16) if ready else b""
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status, usage = os.wait4(child, 0)
    if not answer:
        said = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no answer"
        return "killed", said, usage, 0
    kind, said, before = json.loads(answer)
    return kind, said, usage, before


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
        print(table(outcomes))
    return int(any(outcome.faults() for outcome in outcomes))


def table(outcomes: list[Outcome]) -> str:
    """Rows of Markdown: a kind of input, what came of it, and the most that it took."""
    lines = [
        "| kind | inputs | refused | the same policy | another policy, as stated | CPU time | memory | broken promises |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kinds = dict.fromkeys(outcome.case.name.partition("/")[0] for outcome in outcomes)
    for kind in [*kinds, ""]:
        mine = [outcome for outcome in outcomes if not kind or outcome.case.name.startswith(f"{kind}/")]
        came = Counter(outcome.kind for outcome in mine)
        faults = Counter(fault for outcome in mine for fault in outcome.faults())
        broken = ", ".join(f"{count} {fault}" for fault, count in faults.items()) or "0"
        most, memory = max(each.cpu_s for each in mine), max(each.memory for each in mine) / 1e6
        lines.append(
            f"| {kind or 'all'} | {len(mine)} | {came['refused']} | {came['same']} | {came['loaded']} | {most:.1f} s "
            f"| {memory:.0f} MB | {broken} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
