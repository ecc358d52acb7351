"""Joules from counters and from watts over time, on sensors that are files."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest

import bench.power
from bench.nvml import Nvml
from bench.power import find_sensor, metered
from tests.bench.test_fingerprint import files


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.power, "open_nvml", lambda: nullcontext(Nvml(missing="none")))


def rail(name: str, index: int, millivolts: int, milliamperes: int) -> dict[str, str]:
    folder = "sys/class/hwmon/hwmon3/"
    return {
        f"{folder}in{index}_label": name + "\n",
        f"{folder}in{index}_input": str(millivolts),
        f"{folder}curr{index}_input": str(milliamperes),
    }


def test_a_jetson_with_one_input_rail(tmp_path: Path) -> None:
    files(tmp_path, rail("VDD_IN", 1, 5000, 2400) | rail("VDD_CPU_GPU_CV", 2, 5000, 800))
    with metered(tmp_path) as used:
        time.sleep(0.2)
    assert used.sensor == "INA3221 VDD_IN"
    assert used.joules is not None
    assert used.joules / used.seconds == pytest.approx(12.0, rel=0.3)


def test_a_jetson_with_several(tmp_path: Path) -> None:
    files(
        tmp_path,
        rail("VDD_GPU_SOC", 1, 12000, 1000) | rail("VDD_CPU_CV", 2, 12000, 500) | rail("sum of shunt", 4, 1, 1),
    )
    with metered(tmp_path) as used:
        time.sleep(0.1)
    assert used.sensor == "INA3221 VDD_GPU_SOC+VDD_CPU_CV"
    assert used.joules is not None
    assert used.joules / used.seconds == pytest.approx(18.0, rel=0.3)


def test_a_counter_of_joules_that_wraps(tmp_path: Path) -> None:
    folder = "sys/class/powercap/intel-rapl:0/"
    files(tmp_path, {f"{folder}energy_uj": "999000000", f"{folder}max_energy_range_uj": "1000000000"})
    with metered(tmp_path) as used:
        (tmp_path / folder / "energy_uj").write_text("4000000")
    assert used.sensor == "RAPL"
    assert used.joules == pytest.approx(5.0)


def test_a_counter_that_only_root_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "sys/class/powercap/intel-rapl:0/"
    files(tmp_path, {f"{folder}energy_uj": "1"})

    def refuse(counters: list[Path]) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(bench.power, "_total", refuse)
    with metered(tmp_path) as used:
        pass
    assert used.joules is None
    assert "Permission denied" in used.note


def test_no_sensor_is_said(tmp_path: Path) -> None:
    with ExitStack() as stack:
        sensor, why = find_sensor(tmp_path, stack)
    assert sensor is None
    assert "INA3221" in why


def test_a_sensor_that_goes_away(tmp_path: Path) -> None:
    files(tmp_path, rail("VDD_IN", 1, 5000, 2000))
    with metered(tmp_path) as used:
        time.sleep(0.15)
        for path in (tmp_path / "sys/class/hwmon/hwmon3").iterdir():
            path.unlink()
        time.sleep(0.1)
    assert used.joules is not None
    assert used.joules > 0
