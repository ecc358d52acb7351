"""What the numbers of a machine depend on: device, clocks, power mode, temperature, load, versions, thread settings.

Published latencies are rarely reproduced because one of these was another and nobody wrote it down. Everything comes from files that
any user may read and from commands that need no root; what cannot be found is a fact without a value and with a reason. All files are
read below `root`, which tests replace by a folder of their own. Knows nothing about bundles and steps.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from bench.nvml import Nvml, open_nvml
from bench.results import Fact, Fingerprint
from runtime.processor import processor_name

_COMMAND_S = 5.0
_PACKAGES = (
    "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-openvino", "onnxruntime-ep-nv-tensorrt-rtx",
    "tensorrt", "tensorrt-rtx", "cuda-bindings", "pycuda",
)  # fmt: skip
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_AFFINITY", "KMP_BLOCKTIME", "CUDA_VISIBLE_DEVICES")
_HOT = 85.0  # degrees Celsius; Jetsons slow down a little above


def fingerprint(before: Mapping[str, Fact], after: Mapping[str, Fact], *, root: Path = Path("/")) -> Fingerprint:
    """The machine, with what `state` said at both ends of the run."""
    with open_nvml() as gpu:
        return Fingerprint(
            machine=machine(root, gpu), software=software(root, gpu), before=dict(before), after=dict(after)
        )


def machine(root: Path, gpu: Nvml) -> dict[str, Fact]:
    """What stays the same between two runs on one machine that nobody touched."""
    return {
        "device": _device(root),
        "architecture": Fact(value=platform.machine()),
        "cpu": _cpu_model(root),
        "cpus": Fact(
            value=f"{len(os.sched_getaffinity(0))} of {_online(root)}", note="those that this process may use"
        ),
        "memory": _memory(root),
        "virtual machine": _virtual(root),
        "cpu clocks": _cpu_clocks(root),
        "gpu": Fact(value=gpu.name) if gpu.name else _jetson_gpu(root, gpu.missing),
        "gpu clocks": _gpu_clocks(root, gpu),
        "memory clock": _emc_clock(root),
        "power mode": _power_mode(root),
        "threads": Fact(
            value=", ".join(f"{name}={os.environ[name]}" for name in _THREAD_VARIABLES if name in os.environ)
            or "no variables set"
        ),
    }


def software(root: Path, gpu: Nvml) -> dict[str, Fact]:
    """Versions."""
    found = {
        "system": Fact(value=_os_name(root) or platform.system()),
        "kernel": Fact(value=platform.release()),
        "jetpack": _jetpack(root),
        "gpu driver": Fact(value=gpu.driver, note="" if gpu.driver else gpu.missing),
        "python": Fact(value=platform.python_version()),
    }
    for name in _PACKAGES:
        version = _version(name)
        if version is not None:
            found[name] = Fact(value=version)
    return found


def state(root: Path = Path("/")) -> dict[str, Fact]:
    """What changes from minute to minute."""
    with open_nvml() as gpu:
        return {
            "load average": _load(root),
            "temperature": _temperature(root, gpu),
            "throttling": _throttling(root, gpu),
            "cpu frequency": _frequency(root),
            "memory available": _available(root),
        }


def different(a: Fingerprint, b: Fingerprint) -> list[str]:
    """What keeps two results from being compared: `name: this, that` of every fact that differs. A missing fact equals a missing one."""
    lines = []
    for ours, theirs in ((a.machine, b.machine), (a.software, b.software)):
        for name in dict.fromkeys((*ours, *theirs)):
            values = [facts[name].value if name in facts else None for facts in (ours, theirs)]
            if values[0] != values[1]:
                lines.append(f"{name}: {values[0] or 'missing'}, {values[1] or 'missing'}")
    return lines


def _load(root: Path) -> Fact:
    found = re.match(r"([\d.]+) [\d.]+ [\d.]+", _read(root / "proc/loadavg") or "")
    if not found:
        return Fact(value=None, note="not in /proc/loadavg")
    busy = float(found[1]) > 0.5 * len(os.sched_getaffinity(0))
    return Fact(value=found[0], note="1, 5 and 15 minutes", warn=busy)


def _device(root: Path) -> Fact:
    model = _read(root / "proc/device-tree/model")
    if model:
        return Fact(value=model.rstrip("\0"), note="device tree")
    parts = [_read(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name")]
    named = " ".join(part.strip() for part in parts if part and part.strip())
    return Fact(value=named, note="DMI") if named else Fact(value=None, note="neither device tree nor DMI")


def _cpu_model(root: Path) -> Fact:
    name = processor_name(root)
    if name is None:
        return Fact(value=None, note="not in /proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(root / "proc/cpuinfo") or "", re.MULTILINE)
    known = {"amx_bf16", "amx_int8", "avx512_vnni", "avx512_bf16", "avx2", "asimd", "asimddp", "i8mm", "bf16"}
    shown = sorted(known & set(flags[1].split())) if flags else []
    return Fact(value=f"{name} ({', '.join(shown)})" if shown else name)


def _online(root: Path) -> str:
    text = _read(root / "sys/devices/system/cpu/online")
    if text is None:
        return str(os.cpu_count())
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return str(sum(int(last or first) - int(first) + 1 for first, last in ranges))


def _memory(root: Path) -> Fact:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo") or "", re.MULTILINE)
    return Fact(value=f"{int(found[1]) / 1e6:.1f} GB") if found else Fact(value=None, note="not in /proc/meminfo")


def _available(root: Path) -> Fact:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo") or "", re.MULTILINE)
    return Fact(value=f"{int(found[1]) / 1e6:.1f} GB") if found else Fact(value=None, note="not in /proc/meminfo")


def _virtual(root: Path) -> Fact:
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", _read(root / "proc/cpuinfo") or "", re.MULTILINE)
    return Fact(
        value="yes" if flags else "no", note="other guests may share its cores" if flags else "", warn=bool(flags)
    )


def _policies(root: Path) -> Iterator[tuple[str, str | None, int, int]]:
    """(name, governor, lowest, highest frequency in kHz that may be chosen) of each group of cores."""
    for folder in sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*")):
        low, high = (_number(folder / f"scaling_{end}_freq") for end in ("min", "max"))
        if low is not None and high is not None:
            governor = _read(folder / "scaling_governor")
            yield folder.name, governor and governor.strip(), low, high


def _cpu_clocks(root: Path) -> Fact:
    groups = list(_policies(root))
    if not groups:
        return Fact(value=None, note="no cpufreq: hidden by the hypervisor, or fixed", warn=True)
    texts, loose = [], False
    for _, governor, low, high in groups:
        fixed = low == high
        loose |= not fixed and governor != "performance"
        texts.append(f"{high / 1e6:.2f} GHz" if fixed else f"{low / 1e6:.2f}-{high / 1e6:.2f} GHz, {governor}")
    shown = ", ".join(dict.fromkeys(texts))
    return Fact(value=shown, note="not locked: they move with load" if loose else "locked", warn=loose)


def _jetson_gpu(root: Path, missing: str) -> Fact:
    found = next(_devfreq(root, "gpu"), None)
    return Fact(value=None, note=missing) if found is None else Fact(value=found.name, note="devfreq")


def _devfreq(root: Path, what: str) -> Iterator[Path]:
    """Folders of /sys/class/devfreq: `17000000.gpu` on Orin, `57000000.gpu` or `17000000.gv11b` before."""
    names = {"gpu": ("gpu", "gv11b", "ga10b", "gb10b", "gpc"), "emc": ("emc",)}[what]
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        if any(name in folder.name for name in names):
            yield folder


def _gpu_clocks(root: Path, gpu: Nvml) -> Fact:
    for folder in _devfreq(root, "gpu"):
        low, high = (_number(folder / f"{end}_freq") for end in ("min", "max"))
        if low is not None and high is not None:
            return _range(low / 1e6, high / 1e6, "jetson_clocks locks them")
    if gpu.clocks is not None:
        now, highest = gpu.clocks
        return Fact(
            value=f"up to {highest} MHz",
            note=f"{now} MHz now; nvidia-smi -lgc locks them; whether they are locked, the driver does not tell",
            warn=True,
        )
    return Fact(value=None, note=gpu.missing)


def _emc_clock(root: Path) -> Fact:
    for folder in _devfreq(root, "emc"):
        low, high = (_number(folder / f"{end}_freq") for end in ("min", "max"))
        if low is not None and high is not None:
            return _range(low / 1e6, high / 1e6, "jetson_clocks locks it")
    rate = _number(root / "sys/kernel/debug/bpmp/debug/clk/emc/rate")
    if rate is not None:
        return Fact(value=f"{rate / 1e6:.0f} MHz")
    return Fact(value=None, note="no memory controller that tells (on a Jetson it needs root)")


def _range(low: float, high: float, how: str) -> Fact:
    if low == high:
        return Fact(value=f"{high:.0f} MHz", note="locked")
    return Fact(value=f"{low:.0f}-{high:.0f} MHz", note=f"not locked: {how}", warn=True)


def _power_mode(root: Path) -> Fact:
    # Its own record first: the command is a script that may ask for root on some releases.
    said = _run(("nvpmodel", "-q")) if root == Path("/") else _read(root / "nvpmodel-q")
    found = re.search(r"NV Power Mode:\s*(\S+)", said or "")
    if found:
        return Fact(value=found[1], note="nvpmodel -q")
    profile = _read(root / "sys/firmware/acpi/platform_profile")
    if profile:
        return Fact(value=profile.strip(), note="ACPI platform profile")
    return Fact(value=None, note="no nvpmodel: not a Jetson" if said is None else "nvpmodel does not say")


def _jetpack(root: Path) -> Fact:
    """Release of Linux for Tegra; JetPack's own version only where its package is installed."""
    text = _read(root / "etc/nv_tegra_release")
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text or "")
    if not found:
        return Fact(value=None, note="no /etc/nv_tegra_release: not a Jetson")
    package = re.search(
        r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: (\S+)", _read(root / "var/lib/dpkg/status") or "", re.MULTILINE
    )
    release = f"L4T {found[1]}.{found[2]}"
    return Fact(value=f"{release}, JetPack {package[1]}" if package else release)


def _temperature(root: Path, gpu: Nvml) -> Fact:
    found = {}
    for folder in (root / "sys/class/thermal").glob("thermal_zone*"):
        try:
            degrees = _number(folder / "temp")
        except OSError:
            continue
        if degrees is not None and 0 < degrees < 200_000:
            found[(_read(folder / "type") or folder.name).strip()] = degrees / 1000
    if gpu.temperature is not None:
        found["gpu"] = float(gpu.temperature)
    if not found:
        return Fact(value=None, note="no thermal zone that tells")
    hottest = max(found, key=lambda name: found[name])
    return Fact(value=f"{found[hottest]:.1f} C", note=hottest, warn=found[hottest] > _HOT)


def _throttling(root: Path, gpu: Nvml) -> Fact:
    counts = [
        number
        for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
        if (number := _number(path)) is not None
    ]
    cooling = []
    for folder in (root / "sys/class/thermal").glob("cooling_device*"):
        level = _number(folder / "cur_state")
        name = (_read(folder / "type") or folder.name).strip()
        if level and not re.search("fan|pwm", name, re.IGNORECASE):
            cooling.append(f"{name} at {level}")
    parts = [*([f"{sum(counts)} thermal events since the start"] if counts else []), *cooling]
    if gpu.throttling is not None:
        parts.append(f"gpu: {gpu.throttling}")
    if not parts and not list((root / "sys/class/thermal").glob("cooling_device*")):
        return Fact(value=None, note="nothing that counts it")
    now = bool(cooling) or (gpu.throttling or "none") != "none"
    return Fact(value="; ".join(parts) or "none", warn=now)


def _frequency(root: Path) -> Fact:
    found = [
        number / 1e6
        for folder in (root / "sys/devices/system/cpu/cpufreq").glob("policy*")
        if (number := _number(folder / "scaling_cur_freq")) is not None
    ]
    if found:
        return Fact(value=f"{min(found):.2f}-{max(found):.2f} GHz")
    stated = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read(root / "proc/cpuinfo") or "", re.MULTILINE)
    if stated:
        return Fact(value=f"{max(map(float, stated)) / 1e3:.2f} GHz", note="/proc/cpuinfo; a hypervisor may state it")
    return Fact(value=None, note="no cpufreq")


def _os_name(root: Path) -> str | None:
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(root / "etc/os-release") or "", re.MULTILINE)
    return found[1] if found else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _run(command: tuple[str, ...]) -> str | None:
    """Output of a command, or None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _read(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None
