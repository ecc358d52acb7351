"""Which results may be compared, and in what they differ.

The machine, its software, and what was asked of the bundle must be the same, or a difference says nothing about the bundles. The bundles
are what one compares: their differences are listed and allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from bench.comparison import JUDGED, LEAST_PAIRS
from bench.fingerprint import different
from bench.results import Fact, Result
from bundle.errors import ConfigError

# What changes the work of a step; the rest of the settings says how often it was done.
_WORK = ("frame_size", "threads", "instruction")


def check_comparable(names: Sequence[str], results: Sequence[Result], *, force: bool) -> list[str]:
    """Check results in the order A, B, A, B; what would have been an error without `force`.

    Raises:
        ConfigError: another number than 2, or 2 * LEAST_PAIRS and more; an invalid result; results of one side that are of different
            bundles; without `force`, a partial result, or another machine, software or work.
    """
    if len(results) != 2 and (len(results) % 2 or len(results) < 2 * LEAST_PAIRS):
        raise ConfigError(
            "these are no pairs",
            got=f"{len(results)} results",
            expected=f"A B, or at least {LEAST_PAIRS} pairs A B A B ...",
            hint="a pair or two more say nothing about how pairs differ.",
        )
    for name, result in zip(names, results, strict=True):
        if result.verdict.outcome == "invalid":
            raise ConfigError(
                f"{name} is invalid",
                got=result.verdict.line,
                expected="a run of what was asked for",
                hint="mend what it says and measure again; --force does not help.",
            )
        if JUDGED not in result.sections:
            raise ConfigError(
                f"{name} has no {JUDGED}", expected="a section that is compared", hint="measure it again."
            )
    for side in (0, 1):
        for name, result in zip(names[side + 2 :: 2], results[side + 2 :: 2], strict=True):
            changed = bundle_differences(results[side], result)
            if changed:
                raise ConfigError(
                    f"{names[side]} and {name} should be of one bundle",
                    got="; ".join(changed),
                    expected="A B A B ...: the same two in turns",
                    hint="check the order of the files.",
                )
    problems = [
        f"{name} is partial: {result.stopped}"
        for name, result in zip(names, results, strict=True)
        if result.partial
    ]  # fmt: skip
    for result in results[1:]:
        problems += different(results[0].fingerprint, result.fingerprint)
        problems += [line for line in setting_differences(results[0], result) if line.partition(":")[0] in _WORK]
    problems = list(dict.fromkeys(problems))
    if problems and not force:
        raise ConfigError(
            "these results cannot be compared",
            got="; ".join(problems),
            expected="whole runs of the same work on the same machine with the same software",
            hint="measure both again under one roof, or compare nevertheless with --force.",
        )
    return problems


def bundle_differences(a: Result, b: Result) -> list[str]:
    """`name: A's, B's` of what differs in the bundles and their parity."""
    return _differences(msgspec.to_builtins(a.bundle), msgspec.to_builtins(b.bundle))


def setting_differences(a: Result, b: Result) -> list[str]:
    """`name: A's, B's` of what differs in what was asked for."""
    return _differences(msgspec.to_builtins(a.settings), msgspec.to_builtins(b.settings))


def cautions(results: Sequence[Result]) -> list[str]:
    """Facts that make numbers hard to reproduce, each once."""
    parts = [
        part for each in results for part in (each.fingerprint.machine, each.fingerprint.before, each.fingerprint.after)
    ]
    return list(dict.fromkeys(f"{name}: {_told(fact)}" for part in parts for name, fact in part.items() if fact.warn))


def _told(fact: Fact) -> str:
    return ", ".join(filter(None, (fact.value or "unknown", fact.note)))


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name in dict.fromkeys((*a, *b)):
        ours, theirs = a.get(name), b.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            lines += _differences(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            lines.append(f"{prefix}{name}: {ours}, {theirs}")
    return lines
