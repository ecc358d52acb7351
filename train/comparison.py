"""What differs between runs, and which of it is a factor: a change in settings to which a change in results could be put down.

The tables below say for every setting whether it acts on training, with which others it counts as one change, and which metrics it
redefines. Data, base and code are compared by content: paths, commits and how a split was drawn decide nothing. What may be concluded
is train/attribution.py's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bundle.errors import ConfigError
from train.ledger_record import RUN_NAME, Problem, RunRecord, flat, read_run, verify_checkpoints

SEED = "seed"
TRAIN_FILES, VAL_FILES = "training files", "validation files"
_BASE, _CODE, _MACHINE = "base weights", "code", "machine"


@dataclass(frozen=True)
class Rule:
    """What a difference in settings counts as.

    Attributes:
        pattern: of the dotted path of a setting.
        factor: settings of the same factor count as one change; None is no factor at all.
        reason: why.
    """

    pattern: str
    factor: str | None
    reason: str


# The first rule that matches decides; a setting that none matches is a factor of its own.
RULES = (
    Rule("name", None, "a label"),
    Rule("output.*", None, "where and what is written"),
    Rule("loop.workers", None, "who prepares batches, not which"),
    Rule("loop.save_minutes", None, "how often the state is saved"),
    Rule("loop.keep_best", None, "the best checkpoint is kept anyway"),
    Rule("loop.cache_image_tokens", None, "the same tokens, computed once"),
    Rule("model.gradient_checkpointing", None, "the same numbers for less memory"),
    Rule("base.*", None, "where it was found; the weights are compared by hash"),
    Rule("data.sources*.files", None, "how the files were named; they are compared by name and content"),
    Rule("data.sources*.kind", None, "a label; it acts through the split, which is compared by its files"),
    Rule("data.val_share", None, "acts through the split, which is compared by its files"),
    Rule("data.split", None, "acts through the split, which is compared by its files"),
    Rule("data.split_seed", None, "acts through the split, which is compared by its files"),
    Rule("data.fps", None, "a check of the files that changes nothing"),
    Rule("data.sources*", "training data", "what the episodes are taken to say"),
    Rule("loop.seed", SEED, "runs that differ in it are samples of the same thing"),
    Rule("loop.batch_size", "batch", "with loop.accumulate: windows per optimizer step"),
    Rule("loop.accumulate", "batch", "with loop.batch_size: windows per optimizer step"),
    Rule("loop.epochs", "length", "how long is trained"),
    Rule("loop.max_steps", "length", "how long is trained"),
    Rule("loop.patience", "length", "how long is trained"),
    *(
        Rule(f"augment.{name}", "colour augmentation", "one recipe of colour jitter")
        for name in ("brightness", "contrast", "saturation", "hue")
    ),
)
FACTS = {
    TRAIN_FILES: Rule(TRAIN_FILES, "training data", "names and contents of the episodes"),
    VAL_FILES: Rule(VAL_FILES, None, "no factor, but the reason why the metrics cannot be compared"),
    _BASE: Rule(_BASE, "base", "hash of the weights that training started from"),
    _CODE: Rule(_CODE, "code", "sources of jetvla, and versions of what computes"),
    _MACHINE: Rule(_MACHINE, None, "it rounds differently, which is of the size of another seed"),
}

# What changes the meaning of a metric: (setting, metrics, reason). Errors per axis and directions are of the action for now, at every
# frame, in physical units: they mean the same whatever the loss, the window and the chunk.
MEANINGS = (
    ("loss.*", "*loss", "it is a part of the loss"),
    ("model.head", "*loss", "each head has its own loss"),
    ("model.action_dim", "*loss", "it adds columns to the loss"),
    ("model.classes", "*loss", "other classes are told apart"),
    ("model.relabel*", "*loss", "frames are labelled otherwise"),
    ("model.classes", "val_direction_accuracy", "other classes are counted"),
    ("model.relabel*", "val_direction_accuracy", "frames are labelled otherwise"),
    ("data.action_range", "*loss", "it is the unit of the loss"),
    ("data.actions", "*loss", "other axes are counted"),
    ("data.actions", "val_direction_accuracy", "other axes are counted"),
    ("data.chunk", "*loss", "the loss looks as far ahead as the chunk"),
    ("data.window", "*loss", "the loss counts the frames of every window"),
    ("augment.*", "train_loss", "it is measured on augmented views"),
    ("model*dropout", "train_loss", "it is measured with dropout"),
    (TRAIN_FILES, "train_loss", "it is measured on them"),
)
# Settings that these values leave to the training set: (setting, value, metrics, head, or None for all).
RESOLVED = (("data.action_range", "auto", "*loss", None), ("loss.class_weights", "balanced", "*loss", "classes"))


@dataclass(frozen=True)
class Run:
    """A run to be compared, with the state of its checkpoints on disk."""

    label: str
    folder: Path
    record: RunRecord
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Difference:
    """Something in which runs differ; `values` are as shown, one per run. `factor` is None for what is none."""

    key: str
    factor: str | None
    values: tuple[str, ...]
    reason: str


def check_folders(folders: Sequence[Path]) -> None:
    """Check what was named, before anything is read.

    Raises:
        ConfigError: fewer than two runs, or one named twice.
    """
    if len(folders) < 2:
        got = str(folders[0]) if folders else "none"
        raise ConfigError("nothing to compare", got=got, expected="two or more runs", hint="name the folders of runs.")
    counts = Counter(_folder(path).resolve() for path in folders)
    twice = [str(folder) for folder, count in counts.items() if count > 1]
    if twice:
        raise ConfigError(
            f"{twice[0]} is named twice", expected="different runs", hint="a run cannot be compared with itself."
        )


def load_runs(folders: Sequence[Path]) -> tuple[Run, ...]:
    """Read runs and hash their checkpoints. A run is labelled by its name, or by its folder if two have the same name.

    Raises:
        ConfigError: see `check_folders`; or one cannot be read.
    """
    check_folders(folders)
    places = [_folder(path) for path in folders]
    records = [read_run(place) for place in places]
    names = Counter(record.name for record in records)
    labels = [
        record.name if names[record.name] == 1 else str(place) for record, place in zip(records, places, strict=True)
    ]
    return tuple(
        Run(label, place, record, tuple(verify_checkpoints(record, place)))
        for label, place, record in zip(labels, places, records, strict=True)
    )


def _folder(path: Path) -> Path:
    return path.parent if path.name == RUN_NAME else path


def rule_of(key: str) -> Rule:
    """What a difference in this setting counts as."""
    if key in FACTS:
        return FACTS[key]
    own = Rule(key, key, "a setting that acts on training")
    return next((rule for rule in RULES if fnmatchcase(key, rule.pattern)), own)


def settings_of(record: RunRecord) -> dict[str, Any]:
    """Everything that may differ, by key. A setting that is absent and one that is null are the same: not set."""
    codes = [record.code, *(resume.code for resume in record.resumes if resume.code is not None)]
    machines = [record.machine, *(resume.machine for resume in record.resumes if resume.machine is not None)]
    files: dict[str, list[tuple[str, str, int]]] = {"train": [], "val": []}
    for file in record.data:
        # With the name, because an instruction that is not stored is read from it.
        files[file.part].append((Path(file.path).name, file.sha256, file.frames))
    return {key: value for key, value in flat(record.config).items() if value is not None} | {
        TRAIN_FILES: sorted(files["train"]),
        VAL_FILES: sorted(files["val"]),
        _BASE: _start_of(record),
        _CODE: [(code.sources_sha256, sorted(code.versions.items())) for code in codes],
        _MACHINE: machines,
    }


def _start_of(record: RunRecord) -> str:
    """Hash of what training started from: of a policy its head counts as well, so it is that of the file."""
    whole = flat(record.config).get("base.take") == "policy"
    return record.base.weights_sha256 or record.base.sha256 if whole else record.base.sha256


def find_differences(runs: Sequence[Run]) -> tuple[Difference, ...]:
    """All of them, factors first."""
    settings = [settings_of(run.record) for run in runs]
    found = []
    for key in sorted({key for one in settings for key in one}):
        values = [one.get(key) for one in settings]
        if any(value != values[0] for value in values[1:]):
            rule = rule_of(key)
            found.append(Difference(key, rule.factor, tuple(_shown(key, values, runs)), rule.reason))
    return tuple(sorted(found, key=lambda d: (d.factor is None, d.factor == SEED, d.factor or "", d.key)))


def factors_of(differences: Sequence[Difference]) -> tuple[str, ...]:
    """The factors that differ, the seed not among them."""
    return tuple(dict.fromkeys(d.factor for d in differences if d.factor is not None and d.factor != SEED))


def _shown(key: str, values: Sequence[Any], runs: Sequence[Run]) -> list[str]:
    if key in (TRAIN_FILES, VAL_FILES):
        shared = set(values[0]).intersection(*values[1:])
        return [
            f"{len(files)} files, {sum(file[2] for file in files)} frames ({len(set(files) - shared)} not in all runs)"
            for files in values
        ]
    if key == _BASE:
        return [value[:12] for value in values]
    if key == _CODE:
        common = set.intersection(*(set(versions) for codes in values for _, versions in codes))
        commits = [run.record.code.commit for run in runs]
        return [_shown_code(codes, commit, common) for codes, commit in zip(values, commits, strict=True)]
    if key == _MACHINE:
        return [" then ".join(str(machine) for machine in machines) for machines in values]
    return ["not set" if value is None else value if isinstance(value, str) else repr(value) for value in values]


def _shown_code(
    codes: Sequence[tuple[str, list[tuple[str, str]]]], commit: str | None, common: set[tuple[str, str]]
) -> str:
    """Hash of the sources, and the versions that not all runs share; one after the other where a resumed run changed its code."""
    sittings = []
    for sources, versions in codes:
        others = [f"{name} {number}" for name, number in versions if (name, number) not in common]
        sittings.append(", ".join([f"sources {sources[:9]}", *others]))
    return " then ".join(sittings) + (f" (commit {commit[:9]})" if commit else "")
