#!/usr/bin/env python3
"""Compare the step of a bundle on every backend of this machine with PyTorch, in one run.

    python bench/gpu_check.py BUNDLE CKPT --packing upstream

What a machine lacks is left out, with its reason. Candidates take turns, a block of steps each, so that a machine that drifts does not
favour one; ratios are of medians. The last line of stdout is JSON. bench/gpu_check.sh makes full-size inputs and calls this. Exit codes:
0 measured, 1 failed, 2 usage, 3 the engines failed their parity check.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bundle.engine_cache import ENGINE_PARITY, ENGINES
from bundle.errors import BackendError, JetvlaError
from runtime.golden import Golden
from runtime.policy import Policy

_PYTORCH: tuple[tuple[str, dict[str, object]], ...] = (
    ("pytorch eager fp16", {"device": "cuda", "dtype": "float16"}),
    ("pytorch eager bf16", {"device": "cuda", "dtype": "bfloat16"}),
    ("torch.compile fp16", {"device": "cuda", "dtype": "float16", "compiled": True}),
)
_BASELINE = _PYTORCH[0][0]


@dataclass(frozen=True)
class CheckConfig:
    """Measure a bundle's step against PyTorch.

    Attributes:
        bundle: directory made by export/build_engines.py.
        checkpoint: what it was built from, for PyTorch.
        packing: see build_engines.py.
        backends: of the bundle.
        rounds: blocks a candidate.
        block: steps in a block; the first of each is not counted.
        compile: also torch.compile (minutes).
    """

    bundle: Annotated[Path, tyro.conf.Positional]
    checkpoint: Annotated[Path, tyro.conf.Positional]
    packing: Literal["auto", "upstream", "fork_overwrite"] = "auto"
    backends: tuple[str, ...] = ("trt", "ort:tensorrt-rtx", "ort:cuda", "ort:cpu")
    rounds: int = 10
    block: int = 31
    compile: bool = True


@dataclass(frozen=True)
class Candidate:
    """Something to time: `step` returns when its result is there; `sections` fills in the sections' milliseconds."""

    name: str
    step: Callable[[], dict[str, float]]


def main() -> int:
    """Parse, measure, print."""
    config = tyro.cli(CheckConfig, description=__doc__)
    console = Console(stderr=True, highlight=False)
    try:
        result = check(config, console)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    print(json.dumps(result))
    parity = result["engine_parity"]
    assert isinstance(parity, dict)
    return 3 if any(report["verdict"] == "FAIL" for report in parity.values()) else 0


def check(config: CheckConfig, console: Console) -> dict[str, object]:
    """Open what opens, time it in turns, print the table."""
    golden = Golden.load(config.bundle)
    candidates, skipped = _open(config, golden, console)
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    sections: dict[str, list[dict[str, float]]] = {candidate.name: [] for candidate in candidates}
    for _ in track(range(config.rounds), "measuring", console=console, transient=True):
        for candidate in candidates:
            for index in range(config.block):
                start = time.perf_counter()
                parts = candidate.step()
                spent = (time.perf_counter() - start) * 1e3
                if index:
                    times[candidate.name].append(spent)
                    sections[candidate.name].append(parts)
    rows = {name: _summary(values, sections[name]) for name, values in times.items()}
    console.print(_table(rows))
    for name, reason in skipped.items():
        console.print(f"left out: {name}: {reason}", markup=False, soft_wrap=True)
    return {
        "bundle": str(config.bundle),
        "steps": config.rounds * (config.block - 1),
        "candidates": rows,
        "skipped": skipped,
        "engine_parity": {
            path.parent.name: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((config.bundle / ENGINES).glob(f"*/{ENGINE_PARITY}"))
        },
    }


def _open(config: CheckConfig, golden: Golden, console: Console) -> tuple[list[Candidate], dict[str, str]]:
    candidates: list[Candidate] = []
    skipped: dict[str, str] = {}
    for name in config.backends:
        try:
            with console.status(f"loading {name}"):
                policy = Policy.load(config.bundle, name, precision="float")
        except BackendError as error:
            skipped[name] = f"{error.what} ({error.got})"
            continue
        policy.reset(token_ids=[int(token) for token in golden.token_ids])
        candidates.append(Candidate(name, lambda policy=policy: policy.step_resized(golden.frames).timing))  # type: ignore[misc]
    for name, options in _PYTORCH:
        if options.get("compiled") and not config.compile:
            skipped[name] = "not asked for (--no-compile)"
            continue
        reason = _why_no_pytorch()
        if reason:
            skipped[name] = reason
            continue
        from bench.eager_baseline import eager_step  # imports torch

        try:
            with console.status(f"loading {name}"):
                run = eager_step(config.checkpoint, config.packing, golden, **options)  # type: ignore[arg-type]
                for _ in range(3):
                    run()
        except Exception as error:  # torch.compile fails in many ways; none of them is the end of the comparison
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        candidates.append(Candidate(name, lambda run=run: (run(), {})[1]))  # type: ignore[misc]
    return candidates, skipped


def _why_no_pytorch() -> str:
    try:
        import torch
    except ImportError as error:
        return str(error)
    return "" if torch.cuda.is_available() else "PyTorch sees no GPU"


def _summary(values: list[float], sections: list[dict[str, float]]) -> dict[str, float]:
    p50, p95, p99, p999 = np.percentile(values, [50, 95, 99, 99.9])
    parts = {f"{name}_p50_ms": float(np.median([part[name] for part in sections])) for name in sections[0]}
    return {
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "p99.9_ms": float(p999),
        "max_ms": float(np.max(values)),
        **parts,
    }


def _table(rows: dict[str, dict[str, float]]) -> Table:
    table = Table(
        "", "p50 ms", "p95 ms", "p99 ms", "max ms", f"times faster than {_BASELINE}", box=None, padding=(0, 2)
    )
    base = rows.get(_BASELINE, {}).get("p50_ms")
    for name, row in rows.items():
        ratio = "" if base is None else f"{base / row['p50_ms']:.2f}"
        table.add_row(name, *(f"{row[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")), ratio)
    return table


if __name__ == "__main__":
    sys.exit(main())
