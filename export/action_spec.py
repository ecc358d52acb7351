"""What the action's columns are called and mean, by what the user stated for this build (train/action_meaning.py says how)."""

from __future__ import annotations

from bundle.manifest import Action
from export.config import BuildConfig
from train.action_meaning import action_of
from train.config import PolicySpec
from train.facts import TrainingFacts


def action_spec(spec: PolicySpec, config: BuildConfig, facts: TrainingFacts | None) -> Action:
    """The manifest's action part; arguments and errors as for `action_of`."""
    return action_of(
        spec,
        facts,
        action_range=config.action_range,
        names=config.action_names,
        classes=config.classes,
        class_speed=config.class_speed,
    )
