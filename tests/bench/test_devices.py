"""The table of devices: its products are the rates that vendors publish, and a typo is answered with a suggestion."""

from __future__ import annotations

import pytest

from bench.devices import DEVICES, find_device, find_mode
from bundle.errors import ConfigError

# Dense fp16 TFLOPS and INT8 TOPS of the GPU alone, and GB/s, as published: half of sparse figures, without DLAs; GeForce with fp32 sums.
PUBLISHED = {
    "orin-nano-4gb": (5, 10, 34),
    "orin-nano-8gb": (10, 20, 68),
    "orin-nano-super": (17, 33.5, 102),
    "orin-nx-8gb": (12.5, 25, 102),
    "orin-nx-16gb": (15, 30, 102),
    "orin-nx-16gb-super": (19, 38, 102),
    "agx-orin-32gb": (27, 54, 205),
    "agx-orin-64gb": (42.5, 85, 205),
    "agx-thor": (258, 517, 273),
    "agx-xavier": (11, 22, 137),
    "rtx-3060": (25.5, 102, 360),
    "rtx-3090": (71, 284, 936),
    "rtx-4070": (58.3, 233, 504),
    "rtx-4090": (165.2, 660.6, 1008),
    "rtx-5090": (209.5, 838, 1792),
    "l4": (121, 242, 300),
    "a100": (312, 624, 2039),
    "h100": (989, 1979, 3350),
    "h200": (989, 1979, 4800),
}


@pytest.mark.parametrize("key", PUBLISHED)
def test_the_peak_is_the_published_one(key: str) -> None:
    device = DEVICES[key]
    fp16, int8, gbps = PUBLISHED[key]
    peak = device.peak(device.modes[0])
    assert peak.flops["fp16"] == pytest.approx(fp16 * 1e12, rel=0.03)
    assert peak.flops["int8"] == pytest.approx(int8 * 1e12, rel=0.03)
    assert peak.bandwidth == pytest.approx(gbps * 1e9, rel=0.01)


def test_the_reference_robot_is_slower_in_its_named_modes() -> None:
    device = DEVICES["orin-nx-16gb"]
    rates = {mode.name: device.peak(mode).flops["fp16"] / 1e12 for mode in device.modes}
    assert rates == pytest.approx({"MAXN": 15.04, "25W": 6.68, "15W": 5.01, "10W": 5.01}, rel=0.01)


def test_the_30_watts_of_an_agx_orin_are_a_quarter_of_it() -> None:
    device = DEVICES["agx-orin-64gb"]
    most, less = (device.peak(find_mode(device, name)).flops["fp16"] for name in ("MAXN", "30W"))
    assert less / most == pytest.approx(0.24, abs=0.005)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.key)
def test_every_device_is_whole(device) -> None:  # type: ignore[no-untyped-def]
    assert len({mode.name for mode in device.modes}) == len(device.modes)
    first = device.peak(device.modes[0])
    for mode in device.modes:
        peak = device.peak(mode)
        assert 0 < peak.flops["fp32"] <= peak.flops["fp16"] <= peak.flops["int8"]
        assert peak.flops["fp32"] <= first.flops["fp32"], "the first mode is the fastest"
        assert peak.bandwidth <= first.bandwidth
        derated = device.derated(mode)
        assert 0 < derated.compute < 1
        assert 0 < derated.memory < 1


def test_devices_and_modes_are_found_by_what_people_write() -> None:
    for name in ("orin-nx-16gb", " Orin_NX_16GB", "jetson-orin-nx-16gb", "Orin NX 16GB"):
        assert find_device(name).key == "orin-nx-16gb"
    device = find_device("orin-nx-16gb")
    assert find_mode(device, None).name == "MAXN"
    assert find_mode(device, " 25w").mhz == 408


@pytest.mark.parametrize(
    ("got", "hint"),
    [
        ("orin-nx", "did you mean orin-nx-8gb or orin-nx-16gb or orin-nx-16gb-super?"),
        ("rtx-4099", "did you mean rtx-4090?"),
        ("rx4090", "did you mean rtx-4090?"),
        ("hear", "did you mean here?"),
        ("zzzzzz", "take one of these."),
        ("", "take one of these."),
    ],
)
def test_an_unknown_device_is_answered_with_the_nearest(got: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="unknown device") as caught:
        find_device(got)
    assert caught.value.hint == hint
    assert "here, orin-nano-4gb" in str(caught.value)


def test_an_unknown_mode_is_answered_with_those_of_the_device() -> None:
    with pytest.raises(ConfigError, match="unknown power mode of orin-nx-16gb") as caught:
        find_mode(find_device("orin-nx-16gb"), "25")
    assert caught.value.hint == "did you mean 25W?"
    assert caught.value.expected == "MAXN, 25W, 15W, 10W"
