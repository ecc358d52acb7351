"""The answer to "is it under the deadline, and may one believe it?" from the parts of a result.

A run is `invalid` if what ran is not what was asked for: its numbers are those of another machine, so to speak. Otherwise what counts is
the decision in the control loop, from the tick to the command; without a loop, the step. Knows nothing about how anything was measured.
"""

from __future__ import annotations

from bench.results import Fingerprint, Loop, Timing, Verdict

_MISSES = 0.01  # of the ticks
_HARNESS_MS = 0.2
_FEW = 100


def judge(
    *,
    step: Timing,
    loop: Loop | None,
    deadline_ms: float,
    backend: str,
    fallback: tuple[str, ...],
    fingerprint: Fingerprint,
    harness_ms: float,
    clock_jumps: tuple[float, ...],
    partial: bool,
    remark: str = "",
) -> Verdict:
    """The verdict.

    Args:
        fallback: why the backend is not the one that should have run; empty if it is.
        remark: what a reader should know about how the backend computes, if anything.
    """
    reasons = [*fallback, *filter(None, [remark])]
    if partial:
        reasons.append("stopped before its end: too few samples for the tail")
    reasons += [f"{name}: {_shown(fact)}" for part in (fingerprint.machine, fingerprint.before, fingerprint.after)
                for name, fact in part.items() if fact.warn]  # fmt: skip
    if clock_jumps:
        reasons.append(f"clocks jumped {len(clock_jumps)} times, by up to {max(map(abs, clock_jumps)):.2f} s")
    if harness_ms > _HARNESS_MS:
        reasons.append(f"the harness itself takes {harness_ms:.2f} ms a step")
    reasons = list(dict.fromkeys(reasons))
    judged, what = (loop.decision, "from tick to command") if loop else (step, "a step")
    if judged.count < _FEW:
        reasons.append(
            f"p99 of {judged.count} samples is close to their maximum: more --steps tell more about the tail"
        )
    numbers = f"p50 {judged.p50:.1f} ms, p99 {judged.p99:.1f} ms {what} on {backend}"
    if fallback:
        return Verdict(outcome="invalid", line=f"Not valid: {fallback[0]}. {numbers}.", reasons=tuple(reasons))
    late = loop.miss_rate if loop else _share_above(step, deadline_ms)
    missed = f"{late:.1%} of decisions late"
    if late <= _MISSES:
        line = f"Under {deadline_ms:g} ms: {numbers}; {missed}."
        return Verdict(outcome="pass", line=line, reasons=tuple(reasons))
    return Verdict(outcome="miss", line=f"Not under {deadline_ms:g} ms: {numbers}; {missed}.", reasons=tuple(reasons))


def _share_above(timing: Timing, limit: float) -> float:
    return sum(value > limit for value in timing.samples) / len(timing.samples)


def _shown(fact: object) -> str:
    value, note = getattr(fact, "value", None), getattr(fact, "note", "")
    return ", ".join(filter(None, (value or "unknown", note)))
