"""Facts of machines that are not this one: their files in a folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import bench.fingerprint
from bench.fingerprint import different, fingerprint, machine, software, state
from bench.nvml import Nvml, open_nvml

ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd42\n",
    "proc/meminfo": "MemTotal:       15956124 kB\nMemAvailable:   12000000 kB\n",
    "proc/loadavg": "0.10 0.20 0.30 1/300 1234\n",
    "sys/devices/system/cpu/online": "0-3,6-7\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1984000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1190400\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "918000000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "52500\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "49000\n",
    "sys/class/thermal/thermal_zone2/type": "broken\n",
    "sys/class/thermal/thermal_zone2/temp": "-256000\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "3\n",
    "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert\n",
    "sys/class/thermal/cooling_device1/cur_state": "0\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 3.0, GCID: 36923193, BOARD: generic, EABI: aarch64\n",
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
    "var/lib/dpkg/status": "Package: nvidia-jetpack\nStatus: install ok\nVersion: 6.0+b106\n\nPackage: other\nVersion: 1\n",
    "nvpmodel-q": "NV Power Mode: MAXN\n0\n",
}
NO_GPU = Nvml(missing="none here")


def files(folder: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    return files(tmp_path, ORIN)


def test_a_jetson(orin: Path) -> None:
    facts = machine(orin, NO_GPU)
    assert facts["device"].value == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    assert facts["cpu"].value == "0xd42 (asimd, asimddp)"
    assert (facts["cpus"].value or "").endswith(" of 6")
    assert facts["memory"].value == "16.0 GB"
    assert facts["power mode"].value == "MAXN"
    assert facts["gpu clocks"].value == "306-918 MHz"
    assert facts["gpu clocks"].warn
    assert facts["cpu clocks"].value == "0.73-1.98 GHz, schedutil"
    assert facts["cpu clocks"].warn
    versions = software(orin, NO_GPU)
    assert versions["jetpack"].value == "L4T 36.3.0, JetPack 6.0+b106"
    assert versions["system"].value == "Ubuntu 22.04.5 LTS"
    assert versions["numpy"].value


def test_clocks_that_are_locked(orin: Path) -> None:
    files(
        orin,
        {
            "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "1984000",
            "sys/class/devfreq/17000000.gpu/min_freq": "918000000",
        },
    )
    facts = machine(orin, NO_GPU)
    assert (facts["cpu clocks"].value, facts["cpu clocks"].note, facts["cpu clocks"].warn) == (
        "1.98 GHz",
        "locked",
        False,
    )
    assert (facts["gpu clocks"].value, facts["gpu clocks"].warn) == ("918 MHz", False)


def test_what_changes_while_measuring(orin: Path) -> None:
    facts = state(orin)
    assert facts["temperature"].value == "52.5 C"
    assert facts["temperature"].note == "cpu-thermal"
    assert facts["throttling"].value == "none"  # a fan that turns is no throttling
    assert not facts["load average"].warn
    files(
        orin,
        {
            "proc/loadavg": "55.0 20 3 1/300 1234",
            "sys/class/thermal/thermal_zone1/temp": "97000",
            "sys/class/thermal/cooling_device1/cur_state": "2",
        },
    )
    hot = state(orin)
    assert hot["load average"].warn
    assert hot["temperature"].warn
    assert hot["throttling"].value == "gpu-throttle-alert at 2"
    assert hot["throttling"].warn


def test_nothing_there_is_missing_with_a_reason_and_no_error(tmp_path: Path) -> None:
    found = fingerprint(state(tmp_path), state(tmp_path), root=tmp_path)
    for part in (found.machine, found.before):
        for name, fact in part.items():
            assert fact.value is not None or fact.note, name
    assert found.machine["device"].value is None
    assert found.machine["power mode"].note == "no nvpmodel: not a Jetson"
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found


def test_files_with_rubbish_are_missing_facts(orin: Path) -> None:
    for name in ORIN:
        (orin / name).write_bytes(b"\xff\x00 rubbish \xfe")
    found = fingerprint(state(orin), state(orin), root=orin)
    assert found.machine["gpu clocks"].value is None
    assert found.software["jetpack"].value is None
    assert found.before["temperature"].value is None


def test_this_machine() -> None:
    found = fingerprint(state(), state())
    assert found.machine["architecture"].value
    assert found.software["python"].value
    assert different(found, found) == []


def test_what_differs(orin: Path) -> None:
    ours = fingerprint({}, {}, root=orin)
    files(orin, {"nvpmodel-q": "NV Power Mode: 15W\n2\n", "etc/nv_tegra_release": "nothing"})
    (orin / "sys/class/devfreq/17000000.gpu/min_freq").write_text("918000000")
    theirs = fingerprint({}, {}, root=orin)
    assert different(ours, theirs) == [
        "gpu clocks: 306-918 MHz, 918 MHz",
        "power mode: MAXN, 15W",
        "jetpack: L4T 36.3.0, JetPack 6.0+b106, missing",
    ]


class Refused(Exception):
    """NVML's own."""


def library(**answers: Any) -> SimpleNamespace:
    """A pynvml whose functions give `answers`; those without one are not supported, as on a Jetson."""

    def refuse(*_: Any) -> Any:
        raise Refused("Not Supported")

    names = (
        "nvmlInit", "nvmlShutdown", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetName", "nvmlSystemGetDriverVersion",
        "nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetCurrentClocksThrottleReasons",
        "nvmlDeviceGetTemperature", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetComputeRunningProcesses",
    )  # fmt: skip
    made = {name: (lambda *_, value=answers[name]: value) if name in answers else refuse for name in names}
    return SimpleNamespace(**made, NVMLError=Refused, NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    @contextmanager
    def installed(**answers: Any) -> Iterator[Nvml]:
        monkeypatch.setitem(sys.modules, "pynvml", library(nvmlInit=None, nvmlShutdown=None, **answers))
        with open_nvml() as found:
            yield found

    return installed


def test_a_desktop_gpu(gpu: Any, tmp_path: Path) -> None:
    answers = {
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetName": b"NVIDIA GeForce RTX 4090",
        "nvmlSystemGetDriverVersion": "560.35",
        "nvmlDeviceGetClockInfo": 210,
        "nvmlDeviceGetMaxClockInfo": 3105,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1 | 0x40,
        "nvmlDeviceGetTemperature": 61,
        "nvmlDeviceGetPowerUsage": 75_500,
        "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=1, usedGpuMemory=5)],
    }
    with gpu(**answers) as found:
        assert (found.name, found.driver, found.clocks) == ("NVIDIA GeForce RTX 4090", "560.35", (210, 3105))
        assert found.throttling == "thermal (hardware)"
        assert found.power_w() == pytest.approx(75.5)
        assert found.memory_mb() is None  # not ours
        facts = machine(tmp_path, found)
    assert facts["gpu"].value == "NVIDIA GeForce RTX 4090"
    assert facts["gpu clocks"].value == "up to 3105 MHz"
    assert facts["gpu clocks"].warn


def test_a_library_that_supports_nothing(gpu: Any) -> None:
    with gpu() as found:
        assert found.name is None
        assert found.missing == "no GPU that the driver shows"
    with gpu(nvmlDeviceGetHandleByIndex="handle") as found:
        assert (found.name, found.clocks, found.power_w(), found.memory_mb()) == (None, None, None, None)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library())
    with open_nvml() as found:
        assert found.missing == "no NVIDIA GPU: Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with open_nvml() as found:
        assert "nvidia-ml-py is not installed" in found.missing


def test_the_power_mode_comes_from_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = tmp_path / "nvpmodel"
    command.write_text("#!/bin/sh\necho 'NV Power Mode: MODE_25W'\necho 3\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert bench.fingerprint._power_mode(Path("/")).value == "MODE_25W"
    command.write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(bench.fingerprint, "_COMMAND_S", 0.2)
    assert bench.fingerprint._power_mode(Path("/")).value is None
