"""What machines can do at most: clocks, processors, memory.

A peak is processors x clock x operations a clock, so that a power mode, which changes clocks and switches processors off, changes the
peak in the only honest way. tests/bench/test_devices.py compares the products with the rates that vendors publish. Every row says where
its clock comes from: `datasheet`, `nvpmodel` (the mode table of the module as read on one), `guide` (NVIDIA's Jetson Linux developer
guide, neither re-read nor seen on a module), `vendor` (the published boost clock). Sparse rates are not used: nothing here is sparse.
See docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.nearest import unknown
from bench.roofline import Derated, Peak, Precision

HERE = "here"
Family = Literal["jetson", "gpu", "cpu"]
Source = Literal["datasheet", "nvpmodel", "guide", "vendor"]
# Operations a clock and processor, dense: fp32 outside tensor cores, because the runtime allows no TF32; GeForce tensor cores run at half
# rate when they accumulate in fp32, which is what is counted.
_RATES: dict[str, dict[Precision, int]] = {
    "volta": {"fp32": 128, "fp16": 1024, "int8": 2048},
    "orin": {"fp32": 256, "fp16": 2048, "int8": 4096},
    "geforce": {"fp32": 256, "fp16": 512, "int8": 2048},
    "ada-pro": {"fp32": 256, "fp16": 1024, "int8": 2048},
    "a100": {"fp32": 128, "fp16": 2048, "int8": 4096},
    "hopper": {"fp32": 256, "fp16": 4096, "int8": 8192},
    "thor": {"fp32": 256, "fp16": 8192, "int8": 16384},
    # A core each. ONNX Runtime computes fp16 graphs in fp32 between casts, so fp16 is no faster.
    "neon": {"fp32": 16, "fp16": 16, "int8": 64},
    "avx2-vnni": {"fp32": 32, "fp16": 32, "int8": 128},
    "avx512-amx": {"fp32": 64, "fp16": 64, "int8": 2048},
}
# Shares of the peak that are usually reached, and microseconds to start a kernel: assumptions, until somebody measures this policy. On an
# Orin NX others saw a streaming read at 58 % and a copy at 68 % of the bandwidth, and a language model's prompt at 39 % of the fp16 rate.
_DERATING: dict[Family, tuple[float, float, float]] = {
    "jetson": (0.45, 0.65, 3.0),
    "gpu": (0.45, 0.75, 3.0),
    "cpu": (0.75, 0.60, 5.0),
}


@dataclass(frozen=True)
class Mode:
    """A power mode.

    Attributes:
        mhz: clock of GPU or CPU.
        processors: SMs of a GPU, cores of a CPU that are on.
        gbps: memory bandwidth, 1e9 bytes a second.
    """

    name: str
    mhz: float
    processors: int
    gbps: float
    source: Source


@dataclass(frozen=True)
class Device:
    """A machine.

    Attributes:
        key: what `--device` takes.
        memory_gb: that GPU and CPU share on a Jetson; of the card on a GPU.
        modes: the first is taken if none is named: the fastest.
    """

    key: str
    name: str
    family: Family
    architecture: str
    memory_gb: float
    modes: tuple[Mode, ...]
    note: str = ""

    def peak(self, mode: Mode) -> Peak:
        """In a power mode."""
        clock = mode.mhz * 1e6 * mode.processors
        return Peak(
            flops={precision: rate * clock for precision, rate in _RATES[self.architecture].items()},
            bandwidth=mode.gbps * 1e9,
            companion="fp32" if self.family == "cpu" else "fp16",
        )

    def derated(self, mode: Mode) -> Derated:
        """What is usually reached in a power mode."""
        compute, memory, start_us = _DERATING[self.family]
        return Derated(self.peak(mode), compute, memory, start_us)


def _jetson(key: str, name: str, architecture: str, memory_gb: float, *modes: Mode, note: str = "") -> Device:
    return Device(key, f"Jetson {name}", "jetson", architecture, memory_gb, modes, note)


def _gpu(key: str, name: str, architecture: str, gb: float, mhz: float, sms: int, gbps: float) -> Device:
    return Device(key, name, "gpu", architecture, gb, (Mode("default", mhz, sms, gbps, "vendor"),))


def _cpu(key: str, name: str, architecture: str, gb: float, mhz: float, cores: int, gbps: float, note: str) -> Device:
    return Device(key, name, "cpu", architecture, gb, (Mode("default", mhz, cores, gbps, "vendor"),), note)


_NOT_SUPER = "clocks of the original mode table; flashed with the Super table it is a device of its own in this list"
DEVICES: dict[str, Device] = {
    device.key: device
    for device in (
        _jetson(
            "orin-nano-4gb", "Orin Nano 4 GB", "orin", 4, Mode("10W", 625, 4, 34.1, "datasheet"), note=_NOT_SUPER
        ),
        _jetson(
            "orin-nano-8gb", "Orin Nano 8 GB", "orin", 8,
            Mode("15W", 625, 8, 68.3, "datasheet"), Mode("7W", 408, 8, 68.3, "guide"), note=_NOT_SUPER,
        ),
        _jetson(
            "orin-nano-super", "Orin Nano Super 8 GB", "orin", 8,
            Mode("MAXN_SUPER", 1020, 8, 102.4, "nvpmodel"), Mode("25W", 918, 8, 102.4, "nvpmodel"),
            Mode("15W", 612, 8, 68.3, "nvpmodel"), Mode("7W", 408, 8, 68.3, "nvpmodel"),
            note="ships in 25W",
        ),
        _jetson(
            "orin-nx-8gb", "Orin NX 8 GB", "orin", 8, Mode("MAXN", 765, 8, 102.4, "datasheet"), note=_NOT_SUPER
        ),
        _jetson(
            "orin-nx-16gb", "Orin NX 16 GB", "orin", 16,
            Mode("MAXN", 918, 8, 102.4, "datasheet"), Mode("25W", 408, 8, 102.4, "nvpmodel"),
            Mode("15W", 612, 4, 102.4, "nvpmodel"), Mode("10W", 612, 4, 68.3, "guide"),
            note="ships in 15W, which switches half of the GPU off; 25W caps the GPU at 408 MHz and is slower than MAXN",
        ),
        _jetson(
            "orin-nx-16gb-super", "Orin NX 16 GB Super", "orin", 16,
            Mode("MAXN_SUPER", 1173, 8, 102.4, "nvpmodel"), Mode("40W", 1173, 8, 102.4, "nvpmodel"),
            Mode("25W", 408, 8, 102.4, "nvpmodel"), Mode("15W", 612, 4, 102.4, "nvpmodel"), Mode("10W", 612, 4, 68.3, "guide"),
            note="ships in 40W",
        ),
        _jetson(
            "agx-orin-32gb", "AGX Orin 32 GB", "orin", 32,
            Mode("MAXN", 930, 14, 204.8, "datasheet"), Mode("40W", 828.75, 14, 204.8, "guide"),
            Mode("30W", 624.75, 8, 204.8, "guide"), Mode("15W", 420.75, 6, 136.5, "guide"),
        ),
        _jetson(
            "agx-orin-64gb", "AGX Orin 64 GB", "orin", 64,
            Mode("MAXN", 1300.5, 16, 204.8, "datasheet"), Mode("50W", 828.75, 16, 204.8, "guide"),
            Mode("30W", 624.75, 8, 204.8, "guide"), Mode("15W", 420.75, 6, 136.5, "guide"),
        ),
        _jetson(
            "agx-thor", "AGX Thor 128 GB (T5000)", "thor", 128, Mode("MAXN", 1575, 20, 273, "datasheet"),
            note="its INT8 rate is taken for that of FP8; clocks of its lower modes are not known here",
        ),
        _jetson(
            "xavier-nx", "Xavier NX", "volta", 8, Mode("20W", 1100, 6, 59.7, "datasheet"), Mode("10W", 800, 4, 59.7, "guide"),
            note="TensorRT ends at 8.5 on it",
        ),
        _jetson(
            "agx-xavier", "AGX Xavier 32 GB", "volta", 32,
            Mode("MAXN", 1377, 8, 136.5, "nvpmodel"), Mode("30W", 900, 8, 102.4, "nvpmodel"),
            Mode("15W", 670, 8, 85.3, "nvpmodel"), Mode("10W", 520, 4, 68.3, "nvpmodel"),
            note="TensorRT ends at 8.5 on it",
        ),
        _gpu("rtx-3060", "GeForce RTX 3060 12 GB", "geforce", 12, 1777, 28, 360),
        _gpu("rtx-3090", "GeForce RTX 3090", "geforce", 24, 1695, 82, 936),
        _gpu("rtx-4070", "GeForce RTX 4070", "geforce", 12, 2475, 46, 504),
        _gpu("rtx-4090", "GeForce RTX 4090", "geforce", 24, 2520, 128, 1008),
        _gpu("rtx-5090", "GeForce RTX 5090", "geforce", 32, 2407, 170, 1792),
        _gpu("l4", "L4", "ada-pro", 24, 2040, 58, 300),
        _gpu("a100", "A100 80 GB", "a100", 80, 1410, 108, 2039),
        _gpu("h100", "H100 SXM", "hopper", 80, 1830, 132, 3350),
        _gpu("h200", "H200", "hopper", 141, 1830, 132, 4800),
        _cpu("raspberry-pi-5", "Raspberry Pi 5 8 GB", "neon", 8, 2400, 4, 17.1, "four Cortex-A76"),
        _cpu("core-i7-12700", "Core i7-12700", "avx2-vnni", 32, 4500, 8, 76.8, "its eight fast cores, DDR5-4800"),
        _cpu("ryzen-9-7950x", "Ryzen 9 7950X", "avx2-vnni", 32, 4500, 16, 83.2, "at its base clock, DDR5-5200"),
        _cpu("xeon-8480", "Xeon Platinum 8480+", "avx512-amx", 256, 2000, 56, 307, "one socket at its base clock"),
    )
}  # fmt: skip


def find_device(key: str) -> Device:
    """A device by its key.

    Raises:
        ConfigError: there is none; the message suggests the nearest and lists all.
    """
    found = DEVICES.get(_plain(key))
    if found is None:
        raise unknown("device", _plain(key), [HERE, *DEVICES])
    return found


def find_mode(device: Device, name: str | None) -> Mode:
    """A power mode of a device; the fastest for None. Case does not matter.

    Raises:
        ConfigError: the device has no such mode.
    """
    if name is None:
        return device.modes[0]
    for mode in device.modes:
        if mode.name.lower() == name.strip().lower():
            return mode
    raise unknown(f"power mode of {device.key}", name, [mode.name for mode in device.modes])


def _plain(key: str) -> str:
    return key.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("jetson-")
