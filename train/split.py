"""Which episodes train and which validate: drawn by episode and stratified, or read from a file; saved with the run.

Frames of one episode never stand on both sides, nor do an episode and the copies augmented from it, nor two files of the same content:
any of these makes a validation loss that says nothing. A draw is a function of names, contents and seed, not of the order of the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from bundle.atomic import write_bytes
from bundle.errors import ConfigError
from bundle.reading_limits import TEXT_BYTES, read_bytes
from episodes.reader import EpisodeWarning
from train.draws import draw_number
from train.episode_set import TrainingEpisode
from train.run_config import AugmentConfig

SPLIT_NAME = "split.json"

# What augmentation scripts append to a name: `_mirror`, `_aug3`, `-flipped_2`.
_SUFFIX = re.compile(
    r"(?:[_.-](?:mirror(?:ed)?|flip(?:ped)?|h?flip|aug(?:mented)?|jitter(?:ed)?|blur(?:red)?|bright|dark|copy)[_-]?\d*)+$",
    re.IGNORECASE,
)


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file names of both parts, sorted.

    Attributes:
        train, val: no name is in both.
        seed, val_share: of the draw; None for a split that was made elsewhere.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    seed: int | None = None
    val_share: float | None = None

    @property
    def sha256(self) -> str:
        """Of the two sets of names: equal splits have equal hashes however they came about."""
        parts = json.dumps([sorted(self.train), sorted(self.val)], ensure_ascii=True)
        return hashlib.sha256(parts.encode()).hexdigest()


def draw_split(episodes: Sequence[TrainingEpisode], *, val_share: float, seed: int) -> Split:
    """Draw `val_share` of the episodes for validation, stratified by kind, side and instruction.

    What is drawn are families: an episode with its augmented copies and its duplicates. A stratum of two or more families is in both
    parts, unless that would more than double the validation part.

    Raises:
        ConfigError: fewer than two families.
    """
    families = _families(episodes)
    by_name = {episode.name: episode for episode in episodes}
    members: dict[str, list[str]] = defaultdict(list)
    for name, family in families.items():
        members[family].append(name)
    if len(members) < 2:
        raise ConfigError(
            "the episodes cannot be split",
            got=f"{len(episodes)} episodes" if len(episodes) < 2 else f"{len(episodes)} copies of one episode",
            expected="at least two that are not copies of each other: one to train on and one to validate on",
            hint="add episodes to data.sources.",
        )
    strata: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for family in members:
        original = by_name[family]
        strata[original.kind, original.side, original.instruction].append(family)
    quotas = _quotas({key: len(group) for key, group in strata.items()}, val_share, seed)
    chosen: set[str] = set()
    for key, group in strata.items():
        chosen.update(sorted(group, key=lambda family: (draw_number("split", seed, family), family))[: quotas[key]])
    val = sorted(name for name, family in families.items() if family in chosen)
    train = sorted(name for name, family in families.items() if family not in chosen)
    return Split(train=tuple(train), val=tuple(val), seed=seed, val_share=val_share)


def save_split(path: Path, split: Split) -> None:
    """Write a split as JSON, atomically.

    Raises:
        StorageError: the disk refuses.
    """
    write_bytes(path, json.dumps(msgspec.to_builtins(split), indent=1, ensure_ascii=False).encode() + b"\n")


def read_split(path: Path) -> Split:
    """Read a split. Whether it fits the episodes is for `part_episodes` to say.

    Raises:
        ConfigError: missing, not JSON, unknown or missing fields, an empty part, or a name that comes twice.
    """
    expected = '{"train": [file names], "val": [file names]}'
    try:
        split = msgspec.json.decode(read_bytes(path, TEXT_BYTES), type=Split)
    except OSError as error:
        raise ConfigError(
            f"the split {path} cannot be read", got=error.strerror, expected="a file", hint="correct data.split."
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a split", got=error, expected=expected, hint="correct the file.") from None
    twice = [name for name, count in Counter([*split.train, *split.val]).items() if count > 1]
    if twice or not split.train or not split.val:
        raise ConfigError(
            f"{path} is not a split",
            got=f"{_few(twice)} more than once" if twice else f"{len(split.train)} train, {len(split.val)} val",
            expected="each name once, and names in both parts",
            hint="correct the file.",
        )
    return split


def part_episodes(
    episodes: Sequence[TrainingEpisode], split: Split
) -> tuple[tuple[TrainingEpisode, ...], tuple[TrainingEpisode, ...]]:
    """The training and the validation episodes, each in the order of `episodes`.

    Warns (EpisodeWarning) of episodes whose augmented copies are in the other part.

    Raises:
        ConfigError: names without an episode, episodes without a part, or files of the same content in both parts.
    """
    train_names, val_names = frozenset(split.train), frozenset(split.val)
    known = {episode.name for episode in episodes}
    absent = sorted((train_names | val_names) - known)
    extra = sorted(known - train_names - val_names)
    if absent or extra:
        problems = [
            f"{len(names)} {what}: {_few(names)}"
            for names, what in ((absent, "in the split but not among the episodes"), (extra, "episodes in no part"))
            if names
        ]
        raise ConfigError(
            "the split does not fit the episodes of data.sources",
            got="; ".join(problems),
            expected="every episode in one part, and every name an episode",
            hint="correct the split file or data.sources; without data.split a new one is drawn.",
        )
    train = tuple(episode for episode in episodes if episode.name in train_names)
    val = tuple(episode for episode in episodes if episode.name in val_names)
    trained_on = {episode.sha256: episode.name for episode in train}
    leaks = [f"{each.name} = {trained_on[each.sha256]}" for each in val if each.sha256 in trained_on]
    if leaks:
        raise ConfigError(
            "validation episodes are among the training episodes under other names",
            got=f"{len(leaks)} of {len(val)}: {_few(leaks)}",
            expected="different recordings in the two parts",
            hint="leave one file of each pair out, or put both in the same part.",
        )
    families = _families(episodes)
    trained_families = {families[episode.name] for episode in train}
    derived = [episode.name for episode in val if families[episode.name] in trained_families]
    if derived:
        warnings.warn(
            f"{len(derived)} validation episodes have an augmented copy, or their original, in training: {_few(derived)}; the "
            "validation loss will look better than it is",
            EpisodeWarning,
            stacklevel=2,
        )
    return train, val


def mix(episodes: Sequence[TrainingEpisode], split: Split, augment: AugmentConfig | None = None) -> dict[str, Any]:
    """What a run is made of, as plain data for its record.

    Returns:
        {"train" and "val": {kind: {"episodes": number, "frames": number}}, "views_per_epoch": {"episodes": training episodes, each
        seen once in an epoch; "mirrored" and "augmented": how many of them are, in the mean}}.
    """
    augment = augment or AugmentConfig()
    parts: dict[str, Any] = {}
    for part, names in (("train", frozenset(split.train)), ("val", frozenset(split.val))):
        own = [episode for episode in episodes if episode.name in names]
        parts[part] = {
            kind: {
                "episodes": sum(episode.kind == kind for episode in own),
                "frames": sum(len(episode) for episode in own if episode.kind == kind),
            }
            for kind in sorted({episode.kind for episode in own})
        }
    views = len(split.train)
    share = augment.share if augment.changes_pixels else 0.0
    parts["views_per_epoch"] = {"episodes": views, "mirrored": views * augment.mirror, "augmented": views * share}
    return parts


def _families(episodes: Sequence[TrainingEpisode]) -> dict[str, str]:
    """Each name's family, called after one of its members: the original where it is among the episodes."""
    ordered = sorted(episodes, key=lambda episode: (episode.kind == "augmented", len(episode.name), episode.name))
    by_stem: dict[str, str] = {}  # stem, or stem without suffix, to family
    by_content: dict[str, str] = {}
    families: dict[str, str] = {}
    for episode in ordered:
        stem = episode.stem
        plain = _SUFFIX.sub("", stem) or stem
        family = by_content.get(episode.sha256) or by_stem.get(plain)
        if family is None and episode.kind == "augmented":
            family = _longest_prefix(plain, by_stem)
        families[episode.name] = family = family or episode.name
        by_content.setdefault(episode.sha256, family)
        by_stem.setdefault(plain, family)
        by_stem.setdefault(stem, family)
    return families


def _longest_prefix(stem: str, by_stem: dict[str, str]) -> str | None:
    """The family of the longest stem that `stem` continues with a separator: `ep_1` for `ep_1_dark_v2`, not for `ep_12`."""
    ends = [match.start() for match in re.finditer(r"[_.\-]", stem)]
    return next((by_stem[stem[:end]] for end in reversed(ends) if stem[:end] in by_stem), None)


def _quotas(sizes: dict[tuple[str, str, str], int], share: float, seed: int) -> dict[tuple[str, str, str], int]:
    """How many families of each stratum validate: its share of the whole, by the largest remainder."""
    families = sum(sizes.values())
    total = min(max(round(share * families), 1), families - 1)
    split_strata = sum(size >= 2 for size in sizes.values())
    least = 1 if split_strata <= 2 * total else 0
    most = {key: max(size - 1, 1) for key, size in sizes.items()}
    quotas = {
        key: min(max(math.floor(share * size), least if size >= 2 else 0), most[key]) for key, size in sizes.items()
    }
    # A tie goes to whom the seed says; the key itself makes the order complete.
    order = sorted(sizes, key=lambda key: (draw_number("stratum", seed, *key), key))
    while sum(quotas.values()) < total:
        open_strata = [key for key in order if quotas[key] < most[key]]
        if not open_strata:
            break
        wanting = max(open_strata, key=lambda key: share * sizes[key] - quotas[key])
        quotas[wanting] += 1
    return quotas


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")
