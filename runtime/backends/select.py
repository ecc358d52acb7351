"""Which backend runs a bundle: the one asked for, or the first that proves itself.

Being listed is no evidence. `candidates` only orders names; the policy loads each in turn and keeps the first whose golden step has the
right numbers. OpenVINO is used only when it is named: its speed is bf16's, and so are its errors
(docs/decisions/0008-execution-providers.md).
"""

from __future__ import annotations

from bundle.errors import BackendError
from runtime.backends.base import Backend
from runtime.backends.fake import FakeBackend
from runtime.backends.ort import PROVIDERS, OrtBackend
from runtime.backends.trt import TrtBackend

ORT_ORDER = ("ort:tensorrt", "ort:tensorrt-rtx", "ort:cuda", "ort:cpu")
AUTO_ORDER = ("trt", *ORT_ORDER)
NAMES = ("auto", "trt", "ort", *PROVIDERS, "fake")


def candidates(name: str) -> tuple[str, ...]:
    """Backend names to try, in order, for what the user asked (`auto`, `ort`, or one name).

    Raises:
        BackendError: the name is unknown.
    """
    if name in ("auto", "ort"):
        return AUTO_ORDER if name == "auto" else ORT_ORDER
    if name in ("fake", "trt") or name in PROVIDERS:
        return (name,)
    raise BackendError(
        f"unknown backend {name!r}", expected=", ".join(NAMES), hint="--backend auto picks one that works."
    )


def open_backend(name: str, *, threads: int = 0, verify: bool = True) -> Backend:
    """Construct one backend by its exact name.

    Args:
        verify: hash engines before they are loaded.

    Raises:
        BackendError: its library is not installed, there is no device for it, or its probe failed.
    """
    if name == "fake":
        return FakeBackend()
    return TrtBackend(verify=verify) if name == "trt" else OrtBackend(name, threads=threads)
