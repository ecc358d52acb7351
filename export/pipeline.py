"""The public door of export: `build(BuildConfig(...))`, and `build_engines(EnginesConfig(...))` for a bundle that is there.

Light on purpose: a build that has nothing to do says so before torch is imported. Everything else is in export/builder.py.
"""

from __future__ import annotations

from pathlib import Path

from bundle.atomic import exclusive, refuse_foreign
from bundle.errors import CheckpointError
from bundle.manifest import Manifest
from export.config import BuildConfig, EnginesConfig, is_up_to_date
from export.console import Reporter
from export.engine_options import will_build

__all__ = ["STEPS", "BuildConfig", "EnginesConfig", "build", "build_engines", "steps"]

STEPS = 5


def steps(config: BuildConfig) -> int:
    """How many steps a build has, for its Reporter."""
    return STEPS + will_build(config.engines)


def build(config: BuildConfig, reporter: Reporter | None = None) -> Path:
    """Turn a checkpoint into a verified bundle; returns its directory.

    Atomic: the target holds the old bundle or none until the new one is complete and verified, and is never half-written. Does nothing if
    the target already is what was asked for. With `dry_run` only the plan is made.

    Raises:
        CheckpointError, ConfigError: the input cannot be built; see train.checkpoint.load.
        ConfigError, EngineError: the engines that are asked for cannot be built here; nothing was built.
        ParityError: the engines do not match the checkpoint; nothing is published, the report lies in OUT.failed/.
        BundleLockedError: another build is writing the same target.
        StorageError: the disk is full.
        EngineBuildError: TensorRT refused a graph or failed; the bundle is published, and runs on the other backends.
    """
    reporter = reporter or Reporter(STEPS, quiet=True)
    target = config.target
    if not config.checkpoint.exists():
        raise CheckpointError(
            f"{config.checkpoint} does not exist", expected="a checkpoint file", hint="correct the path."
        )
    if config.engines.tensorrt != "auto" or config.engines.target:
        from export.engine_plan import choose_machines

        choose_machines(config.engines)  # what cannot be built is said before minutes of work
    if not config.force and is_up_to_date(config):
        parity = Manifest.load(target).parity
        reporter.result(
            f"{target} is up to date: same checkpoint, same options; verified {parity.verdict}. --force rebuilds it."
        )
        if will_build(config.engines):
            _engines(config, reporter)
        return target
    from export import builder  # imports torch

    if config.dry_run:
        builder.dry_run(config, reporter)
        return target
    with exclusive(target):
        refuse_foreign(target)  # before minutes of work
        builder.run(config, reporter)
    if will_build(config.engines):
        with reporter.step("Engines"):
            _engines(config, reporter)
    elif config.engines.tensorrt == "auto":
        reporter.result("no TensorRT engines: TensorRT is not installed here, or there is no GPU")
    return target


def build_engines(config: EnginesConfig, reporter: Reporter | None = None) -> Path:
    """Build the TensorRT engines of an existing bundle, from the bundle alone: no checkpoint, no torch. Returns its directory.

    Raises:
        BundleError: there is no intact bundle.
        EngineBuildError, EngineError, ConfigError: the engines cannot be built here.
        ParityError: an engine does not do what the checkpoint does; it will not be loaded.
    """
    from export import engine_builder

    reporter = reporter or Reporter(1, quiet=True)
    Manifest.load(config.bundle).verify_sizes(config.bundle)
    if config.dry_run:
        engine_builder.plan_engines(config.bundle, config.options, reporter)
        reporter.result("dry run: nothing was built.")
        return config.bundle
    with exclusive(config.bundle), reporter.step("Engines"):
        engine_builder.build_engines(config.bundle, config.options, reporter, force=config.force)
    return config.bundle


def _engines(config: BuildConfig, reporter: Reporter) -> None:
    from export import engine_builder

    if config.dry_run:
        engine_builder.plan_engines(config.target, config.engines, reporter)
        return
    with exclusive(config.target):
        engine_builder.build_engines(config.target, config.engines, reporter, force=config.force)
