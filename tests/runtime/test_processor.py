"""The CPU's name, from /proc/cpuinfo as different kernels write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.processor import processor_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "processor\t: 0\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R) Processor\nmodel name\t: other\n",
            "Intel(R) Xeon(R) Processor",
        ),
        ("processor\t: 0\nCPU part\t: 0xd42\n\nHardware\t: Tegra X1\n", "Tegra X1"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n", "0xd42"),
        ("model name\t: \nprocessor: 1\n", None),
        ("", None),
    ],
)
def test_the_name_that_tells_most(tmp_path: Path, text: str, name: str | None) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    assert processor_name(tmp_path) == name


def test_where_there_is_no_such_file(tmp_path: Path) -> None:
    assert processor_name(tmp_path) is None
