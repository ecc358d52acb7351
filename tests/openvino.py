"""Whether OpenVINO runs here, and whether it may run INT8: its plugin lists Intel's CPUs only, and without VNNI its sums saturate."""

from __future__ import annotations

from functools import cache

import pytest

from bundle.errors import BackendError
from runtime.backends.ort import OrtBackend
from runtime.backends.ort_probe import probe_int8


@cache
def why_not_openvino() -> str:
    """Why the backend does not open on this machine; empty if it does."""
    try:
        OrtBackend("ort:openvino", threads=1)
    except BackendError as error:
        return f"{error.what} ({error.got})"
    return ""


@cache
def openvino_runs_int8() -> bool:
    """It opens, and its INT8 sums are exact on this CPU."""
    if why_not_openvino():
        return False
    try:
        probe_int8("ort:openvino", OrtBackend("ort:openvino", threads=1)._stage)
    except BackendError:
        return False
    return True


def needs_openvino() -> None:
    """Skip a test on a machine where OpenVINO does not run."""
    if reason := why_not_openvino():
        pytest.skip(reason)
