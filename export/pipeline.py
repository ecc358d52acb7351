"""The public door of export: `build(BuildConfig(...))`.

Light on purpose: a build that has nothing to do says so before torch is imported. Everything else is in export/builder.py.
"""

from __future__ import annotations

from pathlib import Path

from bundle.atomic import exclusive, refuse_foreign
from bundle.errors import CheckpointError
from bundle.manifest import Manifest
from export.config import BuildConfig, is_up_to_date
from export.console import Reporter

__all__ = ["STEPS", "BuildConfig", "build"]

STEPS = 5


def build(config: BuildConfig, reporter: Reporter | None = None) -> Path:
    """Turn a checkpoint into a verified bundle; returns its directory.

    Atomic: the target holds the old bundle or none until the new one is complete and verified, and is never half-written. Does nothing if
    the target already is what was asked for. With `dry_run` only the plan is made.

    Raises:
        CheckpointError, ConfigError: the input cannot be built; see train.checkpoint.load.
        ParityError: the engines do not match the checkpoint; nothing is published, the report lies in OUT.failed/.
        BundleLockedError: another build is writing the same target.
        StorageError: the disk is full.
    """
    reporter = reporter or Reporter(STEPS, quiet=True)
    target = config.target
    if not config.checkpoint.exists():
        raise CheckpointError(
            f"{config.checkpoint} does not exist", expected="a checkpoint file", hint="correct the path."
        )
    if not config.force and is_up_to_date(config):
        parity = Manifest.load(target).parity
        reporter.result(
            f"{target} is up to date: same checkpoint, same options; verified {parity.verdict}. --force rebuilds it."
        )
        return target
    from export import builder  # imports torch

    if config.dry_run:
        builder.dry_run(config, reporter)
        return target
    with exclusive(target):
        refuse_foreign(target)  # before minutes of work
        builder.run(config, reporter)
    return target
