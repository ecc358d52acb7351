#!/usr/bin/env python3
"""The full-size table of docs/performance.md: what a build costs, and how its step compares with eager PyTorch.

    python scripts/make_fixtures --size full --out FIXTURES --no-base-weights
    python bench/full_size.py FIXTURES/*.ckpt --packing upstream

Builds the bundle in a process of its own (wall time per step, peak RSS), then times the fp32 step of the bundle through ONNX
Runtime against one full forward of Hugging Face's eager model on the same frame and prompt, interleaved A B A B in one process,
because machines are shared and drift. Medians and the ratio of each pair are printed; torch is imported for the baseline only.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console
from rich.table import Table

from bench.measure import rss_mb
from runtime.golden import Golden
from runtime.policy import Policy

_BUILD = Path(__file__).resolve().parent.parent / "export" / "build_engines.py"


@dataclass(frozen=True)
class FullSizeConfig:
    """Measure build and step of one checkpoint.

    Attributes:
        checkpoint: what to build.
        packing: see build_engines.py.
        precision: of the bundle.
        out: keep the bundle here; by default it is built in a temporary folder.
        rounds: pairs of timed steps.
        warmup: untimed pairs before.
    """

    checkpoint: tyro.conf.Positional[Path]
    packing: Literal["auto", "upstream", "fork_overwrite"] = "auto"
    precision: Literal["fp32", "fp16"] = "fp32"
    out: Path | None = None
    rounds: int = 7
    warmup: int = 1


def main() -> int:
    """Build, time, print a table and one line of JSON."""
    config = tyro.cli(FullSizeConfig, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        bundle = config.out or Path(folder) / "full.bundle"
        result = _build(config, bundle) | _time_steps(config, bundle)
    _print(result)
    print(json.dumps(result))
    return 0


def _build(config: FullSizeConfig, bundle: Path) -> dict[str, Any]:
    """Run build_engines.py twice: for the build, and for the answer that there is nothing to do."""
    command = [sys.executable, str(_BUILD), str(config.checkpoint), "--out", str(bundle)]
    command += ["--packing", config.packing, "--precision", config.precision]
    timed = {}
    for name in ("build_s", "rebuild_s"):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        timed[name] = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    report = json.loads((bundle / "reports" / "build.json").read_text(encoding="utf-8"))
    return {**timed, "steps_s": report["seconds"], "build_peak_rss_gb": round(peak, 2)}


def _time_steps(config: FullSizeConfig, bundle: Path) -> dict[str, Any]:
    from bench.eager_baseline import eager_step  # imports torch

    start = time.perf_counter()
    policy = Policy.load(bundle, "ort:cpu")
    load_s = time.perf_counter() - start
    golden = Golden.load(bundle)
    policy.reset(token_ids=[int(token) for token in golden.token_ids])
    rss = rss_mb() / 1e3
    eager = eager_step(config.checkpoint, config.packing, golden)
    steps: dict[str, list[float]] = {"bundle": [], "eager": []}
    sections: list[dict[str, float]] = []
    for turn in range(config.warmup + config.rounds):
        begin = time.perf_counter()
        chunk = policy.step_resized(golden.frames)
        middle = time.perf_counter()
        eager()
        end = time.perf_counter()
        if turn >= config.warmup:
            steps["bundle"].append((middle - begin) * 1e3)
            steps["eager"].append((end - middle) * 1e3)
            sections.append(chunk.timing)
    ratios = [a / b for a, b in zip(steps["bundle"], steps["eager"], strict=True)]
    manifest = policy.manifest
    return {
        "load_s": round(load_s, 2),
        "policy_rss_gb": round(rss, 2),
        "bundle_ms": statistics.median(steps["bundle"]),
        "eager_ms": statistics.median(steps["eager"]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "sections_ms": {name: statistics.median(s[name] for s in sections) for name in sections[0]},
        "rounds": config.rounds,
        "threads": len(os.sched_getaffinity(0)),
        "precision": manifest.precision,
        "nodes": {name: stage.graphs[0].nodes for name, stage in manifest.stages.items()},
        "feature_cosine": manifest.parity.feature_cosine,
        "action_max_error": manifest.parity.action_max_error,
        "verdict": manifest.parity.verdict,
    }


def _print(result: dict[str, Any]) -> None:
    table = Table("figure", "value", box=None, padding=(0, 2))
    for name, value in result.items():
        shown = (
            ", ".join(f"{key} {_round(item)}" for key, item in value.items())
            if isinstance(value, dict)
            else _round(value)
        )
        table.add_row(name, shown)
    Console(stderr=True, highlight=False).print(table)


def _round(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(_round(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
