"""Runs what may hang, crash or take all memory in a process of its own, and makes the table of what came of many such runs."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

MEMORY_BYTES = 1 << 30
CPU_S = 10.0
_LIMIT_ADDRESSES = 64 << 30


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        said: what the work returned, through JSON; None where it was killed.
        why: the signal that ended it, if any.
        cpu_s: CPU time, its own children's included.
        memory: resident bytes at most, beyond those with which it began.
    """

    said: Any
    why: str
    cpu_s: float
    memory: int


class Judged(Protocol):
    """What the table needs of an outcome."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def cpu_s(self) -> float: ...
    @property
    def memory(self) -> int: ...
    def faults(self) -> list[str]: ...


def in_child(work: Callable[[], object], *, patience_s: float, limit_cpu_s: int) -> Ended:
    """Do `work`, which returns JSON, in a forked child.

    Args:
        patience_s: of the clock; then it is killed.
        limit_cpu_s: of CPU time, likewise.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (limit_cpu_s, limit_cpu_s))
        resource.setrlimit(resource.RLIMIT_AS, (_LIMIT_ADDRESSES, _LIMIT_ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        warnings.simplefilter("ignore")
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        try:
            os.write(writing, json.dumps([work(), before]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], patience_s)
    if not ready:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status, usage = os.wait4(child, 0)
    cpu_s = usage.ru_utime + usage.ru_stime
    if not answer:
        why = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no answer"
        return Ended(None, why, cpu_s, usage.ru_maxrss * 1024)
    said, before = json.loads(answer)
    return Ended(said, "", cpu_s, usage.ru_maxrss * 1024 - before)


def table(outcomes: Sequence[Judged], titles: Mapping[str, str]) -> str:
    """Rows of Markdown: a kind of input, what came of it, and the most that it took.

    Args:
        outcomes: whose names begin with the kind of input.
        titles: kind of outcome -> column.
    """
    columns = ["kind", "inputs", *titles.values(), "CPU time", "memory", "broken promises"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for kind in [*dict.fromkeys(outcome.name.partition("/")[0] for outcome in outcomes), ""]:
        mine = [outcome for outcome in outcomes if not kind or outcome.name.startswith(f"{kind}/")]
        came = Counter(outcome.kind for outcome in mine)
        faults = Counter(fault for outcome in mine for fault in outcome.faults())
        broken = ", ".join(f"{count} {fault}" for fault, count in faults.items()) or "0"
        took = (f"{max(each.cpu_s for each in mine):.1f} s", f"{max(each.memory for each in mine) / 1e6:.0f} MB")
        cells = (kind or "all", len(mine), *(came[each] for each in titles), *took, broken)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
