"""What a person should know about the precision that runs: why it is not INT8, or on what machine INT8 was judged."""

from __future__ import annotations

from bundle.manifest import Manifest
from runtime.backends.select import FORMS, PrecisionChoice, faster_in_int8
from runtime.policy import Policy
from runtime.processor import processor_name


def kind_of(manifest: Manifest) -> str:
    """The precision that runs; of INT8 also what it was judged to be."""
    found = manifest.quantized
    if manifest.precision != "int8" or found is None:
        return manifest.precision
    judged = (
        "not judged"
        if found.random
        else f"action error {found.action_error:.2g} of {found.budget:g} on {found.frames} frames"
    )
    return f"int8 ({judged})"


def int8_notes(policy: Policy, asked: PrecisionChoice) -> list[str]:
    """A line for each of them, mostly none.

    Args:
        asked: the precision that was asked for; only of `auto` one is surprised.
    """
    notes = []
    if asked == "auto" and (why := why_not_int8(policy)):
        notes.append(f"the INT8 variant does not run: {why}")
    if policy.remark:
        notes.append(policy.remark)
    quantized, here = policy.manifest.quantized, processor_name()
    runs = policy.manifest.precision == "int8" and policy.backend in FORMS
    if runs and quantized is not None and here is not None and quantized.machine != here:
        # Where a CPU has no bf16, OpenVINO computes what is not INT8 in fp32: as exact or more, but not what was judged.
        notes.append(
            f"INT8 was judged and timed on {quantized.machine}; quantize on this machine ({here}) to have it judged here"
        )
    return notes


def why_not_int8(policy: Policy) -> str:
    """Why `auto` runs floating point though the bundle has an INT8 variant that may be run; empty if it does not, or has none."""
    quantized = policy.manifest.quantized
    if policy.manifest.precision == "int8" or quantized is None:
        return ""
    if quantized.random:
        return "it was calibrated on made-up pictures; --precision int8 runs it"
    if not quantized.trusted:
        return "it failed its judgement; --precision int8 runs it"
    on_cpu = policy.backend in FORMS
    kind = "ort:" if on_cpu else "trt "
    failed = [reason for reason in policy.passed_over if reason.startswith(kind) and " in int8: " in reason]
    if failed:
        return "; ".join(failed)
    if on_cpu and faster_in_int8(policy.backend, quantized) is None:
        return f"it was not measured on {policy.backend}; --precision int8 runs it there"
    if on_cpu:
        return f"floating point was faster on {quantized.machine}"
    return f"{policy.backend} gains nothing from it"
