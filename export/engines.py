#!/usr/bin/env python3
"""Command line: the engines of a bundle, shown and tidied.

    python export/engines.py list BUNDLE
    python export/engines.py prune BUNDLE

Exit codes: 0 ok, 1 failed, 2 usage.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# Run as a script, only this file's folder is on the path; the packages are beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from rich.console import Console

from bundle import engine_cache
from bundle.atomic import exclusive
from bundle.engine_cache import Found
from bundle.errors import JetvlaError
from bundle.manifest import Manifest
from export.console import human_bytes, plain_table


@dataclass(frozen=True)
class ListConfig:
    """Show a bundle's engines: for which machine, how large, how old, of use or not.

    Attributes:
        bundle: directory made by export/build_engines.py.
        json: machine-readable.
    """

    bundle: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    json: bool = False


@dataclass(frozen=True)
class PruneConfig:
    """Remove engines of other weights than the bundle's, damaged ones, and leftovers of interrupted builds.

    Attributes:
        bundle: directory made by export/build_engines.py.
        fingerprint: only engines of this machine; with --all, also those that are of use.
        all: remove every engine, or every one of the fingerprint.
        dry_run: say what would be removed.
    """

    bundle: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    fingerprint: str | None = None
    all: bool = False
    dry_run: bool = False


def main() -> int:
    """Parse, run, print."""
    console = Console(stderr=True, highlight=False)
    config = tyro.extras.subcommand_cli_from_dict({"list": ListConfig, "prune": PruneConfig}, description=__doc__)
    try:
        if isinstance(config, ListConfig):
            show(config)
        else:
            prune(config)
    except JetvlaError as error:
        console.print(f"[bold red]error:[/] {error.__class__.__name__}")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    return 0


def show(config: ListConfig) -> None:
    """Print what there is."""
    found = engine_cache.survey(config.bundle, Manifest.load(config.bundle))
    if config.json:
        print(json.dumps([_as_json(config.bundle, item) for item in found]))
        return
    out = Console(highlight=False)
    if not found:
        out.print("no engines", markup=False)
        return
    table = plain_table("engine", "for", "size", "age", "key", "state")
    for item in found:
        record = item.record
        table.add_row(
            record.label if record else item.path.name,
            item.path.parent.name,
            human_bytes(item.bytes),
            _age(item.path),
            record.key[:8] if record else "",
            f"{item.state}: {item.reason}" if item.reason else item.state,
        )
    out.print(table)
    total = sum(item.bytes for item in found)
    useless = sum(item.bytes for item in found if item.state != "current")
    out.print(f"{human_bytes(total)} in all, {human_bytes(useless)} of no use", markup=False)


def prune(config: PruneConfig) -> None:
    """Remove what is of no use, or what is named."""
    out = Console(highlight=False)
    with exclusive(config.bundle):
        freed = 0
        for item in engine_cache.survey(config.bundle, Manifest.load(config.bundle)):
            if config.fingerprint is not None and item.path.parent.name != config.fingerprint:
                continue
            if item.state == "current" and not config.all:
                continue
            name = item.path.relative_to(config.bundle)
            out.print(
                f"{'would remove' if config.dry_run else 'removed'} {name}  {human_bytes(item.bytes)}", markup=False
            )
            freed += item.bytes if config.dry_run else engine_cache.remove(item)
    out.print(f"{human_bytes(freed)} {'would be ' if config.dry_run else ''}freed", markup=False)


def _as_json(bundle: Path, item: Found) -> dict[str, object]:
    record = item.record
    return {
        "file": str(item.path.relative_to(bundle)),
        "fingerprint": item.path.parent.name,
        "bytes": item.bytes,
        "state": item.state,
        "reason": item.reason,
        "engine": record.label if record else None,
        "key": record.key if record else None,
        "built_at": record.built_at if record else None,
        "seconds": record.seconds if record else None,
        "layers": record.layers if record else None,
        "origin": record.origin if record else None,
    }


def _age(path: Path) -> str:
    seconds = max(0.0, time.time() - path.stat().st_mtime)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
