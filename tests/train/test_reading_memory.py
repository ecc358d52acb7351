"""What loading takes is known before it is taken, and what the machine does not have is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bundle.errors import CheckpointError
from tests.checkpoints import Variant
from train import checkpoint
from train.checkpoint import load
from train.reading_memory import ReadingNeed, available_bytes, check_memory, check_shared, reading_need
from train.synthetic import SyntheticFiles

MEMINFO = "MemTotal:       24000000 kB\nMemFree:         1000 kB\nMemAvailable:    8000 kB\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_only_what_is_no_fp32_is_copied() -> None:
    state = {"a": torch.zeros(10), "b": torch.zeros(10, dtype=torch.float16), "c": torch.zeros(3, dtype=torch.float64)}
    assert reading_need(state) == ReadingNeed(mapped=40 + 20 + 24, copied=40 + 12)
    assert reading_need(state, ["a"]).copied == 40 + 12 + 40 + 4 * 40


def test_what_the_machine_lacks_is_refused_with_both_numbers() -> None:
    need = ReadingNeed(mapped=1_000_000_000, copied=5_000_000_000)
    check_memory(need, origin="x.ckpt", available=5_000_000_000)
    check_memory(need, origin="x.ckpt", available=None)
    with pytest.raises(CheckpointError) as caught:
        check_memory(need, origin="x.ckpt", available=4_999_999_999)
    assert caught.value.what == "loading x.ckpt needs more memory than this machine has free"
    assert str(caught.value.expected).startswith("5.00 GB for copies in fp32, beside 1.00 GB")


def test_it_is_said_before_it_is_taken(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    def halve(content: dict[str, dict[str, torch.Tensor]]) -> None:
        content["state_dict"] = {name: tensor.half() for name, tensor in content["state_dict"].items()}

    said: list[str] = []
    loaded = load(variant(halve), announce=said.append)
    copied = sum(tensor.nbytes for tensor in loaded.state.values())
    assert said == [f"loading takes {copied / 1e6:.1f} MB of memory, {copied / 2e6:.1f} MB stay in their files"]

    monkeypatch.setattr(checkpoint, "available_bytes", lambda: copied - 1)
    said.clear()
    with pytest.raises(CheckpointError, match="needs more memory than this machine has free"):
        load(variant(halve), announce=said.append)
    assert not said


def test_a_file_in_fp32_is_loaded_by_a_machine_that_is_full(
    upstream: SyntheticFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "available_bytes", lambda: 0)
    load(upstream.checkpoint)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 8_192_000),
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/box\n"}, 8_192_000),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/outer/box\n",
                "sys/fs/cgroup/outer/box/memory.max": "max\n",
                "sys/fs/cgroup/outer/box/memory.current": "1000\n",
                "sys/fs/cgroup/outer/memory.max": "5000000\n",
                "sys/fs/cgroup/outer/memory.current": "4000000\n",
                "sys/fs/cgroup/outer/memory.stat": "anon 1\ninactive_file 500\nactive_file 20\n",
            },
            1_000_520,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "3:cpu:/\n2:memory:/box\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "4000000\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "3000000\n",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "3500000\n",
                "sys/fs/cgroup/memory/box/memory.stat": "total_inactive_file 700000\n",
            },
            200_000,
        ),
    ],
    ids=["nothing known", "machine", "no such group", "version 2", "version 1"],
)
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert available_bytes(machine(tmp_path, files)) == expected


def test_this_machine_has_memory() -> None:
    found = available_bytes()
    assert found is not None
    assert found > 0


def test_tensors_that_claim_one_anothers_numbers_are_refused() -> None:
    numbers = torch.zeros(1 << 20, dtype=torch.float16)
    check_shared({"a": numbers, "tied": numbers}, origin="x.ckpt")
    with pytest.raises(
        CheckpointError, match=r"share their numbers\n  got:      0.42 GB of tensors in 2.1 MB of numbers"
    ):
        check_shared({f"layer.{index}": numbers for index in range(200)}, origin="x.ckpt")
    with pytest.raises(CheckpointError, match="share their numbers"):
        check_shared({f"layer.{index}": numbers[index:] for index in range(200)}, origin="x.ckpt")
