"""Which backend runs a bundle: the one asked for, or the first that proves itself.

Being listed is no evidence. `candidates` only orders names; the policy loads each in turn and keeps the first whose golden step has the
right numbers. TensorRT and OpenVINO providers are used when named: they compile for minutes, or are not faster on this graph.
"""

from __future__ import annotations

from bundle.errors import BackendError
from runtime.backends.base import Backend
from runtime.backends.fake import FakeBackend
from runtime.backends.ort import PROVIDERS, OrtBackend

AUTO_ORDER = ("ort:cuda", "ort:cpu")
NAMES = ("auto", "ort", *PROVIDERS, "fake")


def candidates(name: str) -> tuple[str, ...]:
    """Backend names to try, in order, for what the user asked (`auto`, `ort`, or one name).

    Raises:
        BackendError: the name is unknown.
    """
    if name in ("auto", "ort"):
        return AUTO_ORDER
    if name == "fake" or name in PROVIDERS:
        return (name,)
    raise BackendError(
        f"unknown backend {name!r}", expected=", ".join(NAMES), hint="--backend auto picks one that works."
    )


def open_backend(name: str, *, threads: int = 0) -> Backend:
    """Construct one backend by its exact name.

    Raises:
        BackendError: its library is not installed.
    """
    return FakeBackend() if name == "fake" else OrtBackend(name, threads=threads)
