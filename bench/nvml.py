"""What NVIDIA's management library says of the first GPU that this process may use; an empty answer with a reason where it is not.

Through `nvidia-ml-py`, which needs no root. On Jetsons the library exists from JetPack 7 on and knows little; sysfs says the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

# nvmlClocksEventReasons: what slows a GPU down; bits as in NVML's header. Being idle, or at a clock that the user set, is not slowing.
_SLOW = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Nvml:
    """Facts; None where unknown.

    Attributes:
        missing: why there are none.
        clocks: MHz of the cores now, and at most.
        throttling: reasons, or `none`.
        power_w, memory_mb: functions that read the present power draw in watts, and the memory of this process in MB.
    """

    missing: str = ""
    name: str | None = None
    driver: str | None = None
    clocks: tuple[int, int] | None = None
    temperature: int | None = None
    throttling: str | None = None
    power_w: Callable[[], float | None] = lambda: None
    memory_mb: Callable[[], float | None] = lambda: None


@contextmanager
def open_nvml() -> Iterator[Nvml]:
    """The GPU's facts; the functions among them work while the block runs."""
    try:
        import pynvml as nvml
    except ImportError:
        yield Nvml(missing="no GPU was asked: nvidia-ml-py is not installed")
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        yield Nvml(missing=f"no NVIDIA GPU: {error}")
        return
    try:
        yield _facts(nvml)
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _facts(nvml: Any) -> Nvml:
    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        """An answer, or None: each of these is unsupported somewhere."""
        try:
            found = function(*arguments)
        except (nvml.NVMLError, AttributeError):
            return None
        return found.decode() if isinstance(found, bytes) else found

    handle = ask(nvml.nvmlDeviceGetHandleByIndex, _index())
    if handle is None:
        return Nvml(missing="no GPU that the driver shows")
    now = ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)
    most = ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return Nvml(
        name=ask(nvml.nvmlDeviceGetName, handle),
        driver=ask(nvml.nvmlSystemGetDriverVersion),
        clocks=None if now is None or most is None else (now, most),
        temperature=ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        throttling=None if reasons is None else _slowing(reasons),
        power_w=lambda: _scaled(ask(nvml.nvmlDeviceGetPowerUsage, handle), 1e-3),
        memory_mb=lambda: _own_memory(ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle)),
    )


def _index() -> int:
    """The first visible device; identifiers that are no numbers are left to the driver's order."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    return int(first) if first.isdigit() else 0


def _slowing(reasons: int) -> str:
    return ", ".join(text for bit, text in _SLOW.items() if reasons & bit) or "none"


def _scaled(value: int | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _own_memory(processes: list[Any] | None) -> float | None:
    used = [process.usedGpuMemory for process in processes or [] if process.pid == os.getpid()]
    return used[0] / 1e6 if used and used[0] is not None else None
