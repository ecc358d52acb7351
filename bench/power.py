"""Energy while a block runs, from the sensors that any user may read: a Jetson's input rail, Intel's RAPL counters, NVIDIA's boards.

A counter of joules is read at both ends; a power sensor is sampled and integrated. What a sensor sees includes everything behind it,
idle power too. On most desktops RAPL's counters are root's alone: then there is no number, and the result says why.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.nvml import open_nvml

_EVERY_S = 0.05
# Rails of Jetsons, and of these the one that feeds the whole module, by the names that the boards' designers gave them.
_RAILS = ("VDD", "SYS_VIN", "POM", "VIN")
_INPUT_RAILS = ("VDD_IN", "SYS_VIN", "POM_5V_IN")


@dataclass
class Used:
    """What was used; filled when the block ends.

    Attributes:
        sensor: that told, or None.
        joules, seconds: of the block.
        note: why there is no number, or what it covers.
    """

    sensor: str | None = None
    joules: float | None = None
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Sensor:
    """One source: either a counter of joules, or a reading of watts."""

    name: str
    note: str
    joules: Callable[[], float] | None = None
    watts: Callable[[], float] | None = None
    wraps_at: float = 0.0


@dataclass
class _Integral:
    """Watts over time, by trapezoids."""

    total: float = 0.0
    last: tuple[float, float] | None = field(default=None)

    def add(self, moment: float, watts: float) -> None:
        if self.last is not None:
            self.total += (moment - self.last[0]) * (watts + self.last[1]) / 2
        self.last = (moment, watts)


@contextmanager
def metered(root: Path = Path("/")) -> Iterator[Used]:
    """Meter the block."""
    used = Used()
    with ExitStack() as stack:
        sensor, why = find_sensor(root, stack)
        start = time.perf_counter()
        if sensor is None:
            used.note = why
            yield used
        elif sensor.joules is not None:
            used.sensor, used.note = sensor.name, sensor.note
            before = sensor.joules()
            yield used
            spent = sensor.joules() - before
            used.joules = spent if spent >= 0 else spent + sensor.wraps_at
        else:
            assert sensor.watts is not None
            used.sensor, used.note = sensor.name, sensor.note
            with _sampled(sensor.watts) as integral:
                yield used
            used.joules = integral.total if integral.last is not None else None
        used.seconds = time.perf_counter() - start


@contextmanager
def _sampled(watts: Callable[[], float]) -> Iterator[_Integral]:
    integral, stop = _Integral(), threading.Event()

    def sample() -> None:
        with suppress(OSError, ValueError):  # a sensor that goes away leaves what was seen so far
            integral.add(time.perf_counter(), watts())

    def run() -> None:
        while not stop.wait(_EVERY_S):
            sample()

    sample()
    thread = threading.Thread(target=run, name="power", daemon=True)
    thread.start()
    try:
        yield integral
    finally:
        stop.set()
        thread.join()
        sample()


def find_sensor(root: Path, stack: ExitStack) -> tuple[Sensor | None, str]:
    """The sensor that sees the most, or why there is none."""
    rail = _ina3221(root)
    if rail is not None:
        return rail, ""
    gpu = stack.enter_context(open_nvml())
    if gpu.power_w() is not None:
        return Sensor("NVML", "the GPU's board alone", watts=lambda: gpu.power_w() or 0.0), ""
    found = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]"))
    if not found:
        return None, "no power sensor: neither a Jetson's INA3221, nor NVML, nor RAPL"
    counters = [folder / "energy_uj" for folder in found]
    try:
        _total(counters)
    except OSError as error:
        return None, f"RAPL's counters may not be read: {error.strerror}; root can: chmod a+r {counters[0]}"
    wraps_at = _total([folder / "max_energy_range_uj" for folder in found])
    return Sensor("RAPL", "CPU packages", joules=lambda: _total(counters), wraps_at=wraps_at), ""


def _ina3221(root: Path) -> Sensor | None:
    """A Jetson's monitor: volts and amperes of each rail under hwmon. One rail feeds the module, or several do (AGX): then their sum."""
    rails: dict[str, tuple[Path, Path]] = {}
    for label in sorted((root / "sys/class/hwmon").glob("hwmon*/in*_label")):
        volts, amperes = (label.with_name(f"{kind}{label.name[2:-6]}_input") for kind in ("in", "curr"))
        with suppress(OSError):
            name = label.read_text().strip()
            if name.startswith(_RAILS) and volts.exists() and amperes.exists():
                rails[name] = (volts, amperes)
    whole = next((name for name in _INPUT_RAILS if name in rails), None)
    chosen = [rails[whole]] if whole else list(rails.values())
    if not chosen:
        return None
    return Sensor(
        f"INA3221 {whole or '+'.join(rails)}",
        "the whole module",
        watts=lambda: sum(_milli(volts) * _milli(amperes) for volts, amperes in chosen),
    )


def _milli(path: Path) -> float:
    return int(path.read_text()) / 1e3


def _total(counters: list[Path]) -> float:
    return sum(int(path.read_text()) for path in counters) / 1e6
