"""Opens the episodes of a run, each once, and refuses whatever would spoil training, all of it in one message.

Images stay on disk (train/frame_store.py); actions, instruction and hash of each file are kept. What had to be assumed is said in one
warning, not in one for each file.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bundle.errors import ConfigError, EpisodeError, PromptError
from bundle.prompt_template import takes_words, words_of
from episodes.instruction import sides_in_name, sides_in_text
from episodes.reader import Episode, EpisodeWarning
from train.episode_files import find_files
from train.file_names import is_straight, path_of
from train.recordings import Recordings
from train.run_config import DataConfig, Kind, SourceConfig

__all__ = ["Side", "TrainingEpisode", "find_files", "read_episodes"]

_SAME_RATE = 1.1  # a chunk of n actions means another length of time at another rate
_LISTED = 10
_FEWEST_FRAMES = 2

Side = Literal["left", "right", "none"]


@dataclass(frozen=True, eq=False)
class TrainingEpisode:
    """What training knows of an episode.

    Attributes:
        path: the file; for an episode of a LeRobot dataset its name, FOLDER#INDEX, which `open_episode` opens.
        kind: real, sim or augmented.
        schema: v1, v5, v6 or lerobot.
        sha256: of the file's bytes; in a LeRobot dataset, see LeRobotDataset.sha256.
        instruction: what the robot was told: words, without the text around them; empty where the policy takes none.
        actions: float32 [T, A], physical units as recorded; action i belongs to frame i.
        fps: frames per second, or None where the file does not tell.
        action_names: of the A columns.
        source: index into data.sources.
        words: sentences that mean the same, of which training draws; the first is the instruction. Empty: the instruction alone.
    """

    path: Path
    kind: Kind
    schema: str
    sha256: str
    instruction: str
    actions: NDArray[np.float32]
    fps: float | None
    action_names: tuple[str, ...] = ("linear_x", "linear_y")
    source: int = 0
    words: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def name(self) -> str:
        """The file name, or FOLDER#INDEX without what leads to it; unique within a run."""
        return self.path.name

    @property
    def stem(self) -> str:
        """The name without suffix."""
        return self.name if self.schema == "lerobot" else self.path.stem

    @property
    def side(self) -> Side:
        """Where it goes: by the words of the instruction, else by the sum of the lateral (or turning) actions."""
        sides = sides_in_text(self.instruction)
        if len(sides) == 1:
            return next(iter(sides))
        axis = next((name for name in ("linear_y", "angular_z") if name in self.action_names), None)
        total = 0.0 if axis is None else float(self.actions[:, self.action_names.index(axis)].sum(dtype=np.float64))
        return "left" if total > 0 else "right" if total < 0 else "none"


def read_episodes(
    data: DataConfig,
    root: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    cache: Path | None = None,
    optional: Collection[str] = (),
) -> tuple[TrainingEpisode, ...]:
    """Open and check all episodes of `data.sources`, in the order of `find_files`. Reads no image.

    Args:
        root: where relative paths start.
        progress: called with (files hashed, files in all); hashing is what takes time.
        cache: folder that remembers hashes between runs.
        optional: axes that count as 0 in files without them.

    Raises:
        ConfigError: see find_files; schemas are mixed within a source, or frame rates between files.
        EpisodeError: at least one file cannot be used; lists the first ten, each with its reason.
    """
    found = find_files(data.sources, root=root)
    read: list[tuple[TrainingEpisode, bool]] = []
    bad: list[EpisodeError] = []
    recordings = Recordings(data.cameras)
    for path, source in found:
        try:
            read.append(_read(path, source, data, optional, recordings))
        except EpisodeError as error:
            bad.append(error)
    if bad:
        raise _unusable(bad, len(found))
    _refuse_mixed_schemas([episode for episode, _ in read], [source for _, source in found], data.sources)
    read = [(episode, assumed) for episode, assumed in read if _is_wanted(episode, data.sources[episode.source])]
    if not read:
        raise ConfigError(
            "the filters of data.sources leave no episode",
            got=f"{len(found)} files, all shorter than least_frames or straight",
            expected="at least one",
            hint="lower least_frames, or set curved = false.",
        )
    episodes = [episode for episode, _ in read]
    _refuse_mixed_rates(episodes, data.fps)
    hashes = recordings.hash([episode.path for episode in episodes], cache, progress)
    hashed = tuple(dataclasses.replace(episode, sha256=hashes[episode.path]) for episode in episodes)
    left_out = len(found) - len(hashed)
    _warn(hashed, assumed=[episode for episode, was_assumed in read if was_assumed], left_out=left_out)
    return hashed


def _is_wanted(episode: TrainingEpisode, source: SourceConfig) -> bool:
    """Whether a source's filters by length and movement keep an episode."""
    if len(episode) < source.least_frames:
        return False
    return not (source.curved and is_straight(episode.actions, episode.action_names))


def _read(
    path: Path, source: SourceConfig, data: DataConfig, optional: Collection[str], recordings: Recordings
) -> tuple[TrainingEpisode, bool]:
    """The episode without its hash, and whether its instruction was taken from the file name."""
    names = data.actions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpisodeWarning)  # _warn says it for all files at once
        episode = recordings.open(path, schema=source.schema)
    with episode:
        words = _sentences(path, source, data.prompt_template)
        instruction, assumed = (words[0], False) if words else _instruction(episode, source, data.prompt_template)
        missing = [name for name in names if name not in (*episode.action_names, *optional)]
        if missing:
            raise EpisodeError(
                f"{path} has no action {', '.join(missing)}",
                got=", ".join(episode.action_names),
                expected=", ".join(names),
                hint="leave that axis out of data.actions, or leave the files without it out.",
            )
        if len(episode) < _FEWEST_FRAMES:
            raise EpisodeError(
                f"{path} is too short",
                got=f"{len(episode)} frame",
                expected=f"at least {_FEWEST_FRAMES}",
                hint="leave it out: there is no movement in it to learn.",
            )
        actions = np.zeros((len(episode), len(names)), np.float32)
        for column, name in enumerate(names):
            if name in episode.action_names:
                actions[:, column] = episode.actions[:, episode.action_names.index(name)]
        return TrainingEpisode(
            path,
            source.kind,
            episode.schema,
            "",
            instruction,
            actions,
            episode.fps,
            action_names=names,
            source=data.sources.index(source),
            words=words,
        ), assumed


def _instruction(episode: Episode, source: SourceConfig, template: str) -> tuple[str, bool]:
    """Stored text, else the source's, else what the file name suggests; nothing for a policy without words."""
    if not takes_words(template):
        return "", False
    text, assumed = _stored(episode, source)
    return _words(text, template, episode.path), assumed


def _sentences(path: Path, source: SourceConfig, template: str) -> tuple[str, ...]:
    """What the source says of files with such a name; nothing for a policy without words."""
    texts = source.words.get(path_of(path.stem), ()) if takes_words(template) else ()
    return tuple(_words(text, template, path) for text in texts)


def _words(text: str, template: str, path: Path) -> str:
    """The text without the template around it, if it carries that."""
    try:
        return words_of(template, text).strip()
    except PromptError as error:
        raise EpisodeError(
            f"{path}: {error.what}",
            got=error.got,
            expected=error.expected,
            hint="set data.prompt_template to the text that the stored instructions carry, or store words alone.",
        ) from None


def _stored(episode: Episode, source: SourceConfig) -> tuple[str, bool]:
    given = (source.instruction or "").strip()
    if given and episode.instruction_source != "stored":
        return given, False
    text = (episode.instruction or "").strip()
    if not text:
        raise EpisodeError(
            f"{episode.path} has no instruction",
            got="none stored, and the file name does not name one side",
            expected="what the robot was told",
            hint="set `instruction` of these files' source in the config.",
        )
    return text, episode.instruction_source != "stored"


def _unusable(errors: list[EpisodeError], total: int) -> EpisodeError:
    errors = sorted(errors, key=lambda error: error.what)
    lines = [f"{error.what}{'' if error.got is None else f' ({error.got})'}" for error in errors[:_LISTED]]
    if len(errors) > _LISTED:
        lines.append(f"and {len(errors) - _LISTED} more")
    hints = tuple(dict.fromkeys(error.hint for error in errors))
    more = "" if len(errors) == 1 else " `python episodes/doctor.py FILES` shows all of them."
    return EpisodeError(
        f"{len(errors)} of {total} episodes cannot be trained on",
        got="".join(f"\n    {line}" for line in lines),
        expected="only episodes that can be used: what is left out should be left out knowingly",
        hint="\n      ".join(hints[:5]) + more,
    )


def _refuse_mixed_schemas(
    episodes: list[TrainingEpisode], origins: list[SourceConfig], sources: Sequence[SourceConfig]
) -> None:
    for number, source in enumerate(sources):
        counts = Counter(episode.schema for episode, origin in zip(episodes, origins, strict=True) if origin is source)
        if len(counts) > 1:
            raise ConfigError(
                f"data.sources[{number}] mixes recordings of different schemas",
                got=", ".join(f"{count} x {schema}" for schema, count in sorted(counts.items())),
                expected="one schema in a source; they differ in colour order and in the robot's task",
                hint="make a source of each, or set `schema` of this one if the files were recognised wrongly.",
            )


def _refuse_mixed_rates(episodes: list[TrainingEpisode], wanted: float | None) -> None:
    rates = [(episode.fps, episode.name) for episode in episodes if episode.fps is not None]
    if not rates:
        return
    reference = wanted or float(np.median([rate for rate, _ in rates]))
    if wanted is None:
        if max(rates)[0] <= _SAME_RATE * min(rates)[0]:
            return
    elif all(max(rate / wanted, wanted / rate) <= _SAME_RATE for rate, _ in rates):
        return
    counts = Counter(round(rate, 1) for rate, _ in rates)
    _, farthest = max((max(rate / reference, reference / rate), name) for rate, name in rates)
    raise ConfigError(
        "the episodes have different frame rates" if wanted is None else f"some episodes do not have {wanted:g} fps",
        got="; ".join(f"{rate:g} fps: {count}" for rate, count in counts.most_common(8)) + f"; farthest: {farthest}",
        expected=f"rates within 10 % of {'each other' if wanted is None else f'{wanted:g} fps (data.fps)'}",
        hint="a chunk of n actions lasts another time at another rate: train on one rate, or record the rest again at it.",
    )


def _warn(episodes: Sequence[TrainingEpisode], assumed: list[TrainingEpisode], left_out: int) -> None:
    """One warning for all that was assumed, left out, or looks odd."""
    lines = []
    if left_out:
        lines.append(
            f"{left_out} more are left out: shorter than a source's least_frames, or straight where it wants curves"
        )
    for text, count in Counter(episode.instruction for episode in assumed).most_common(_LISTED):
        lines.append(f"{count} of {len(episodes)} store no instruction; assuming {text!r} from the file name")
    contradicting = [
        episode.name
        for episode in episodes
        if episode.schema != "lerobot"  # its name is that of the whole dataset
        and len(named := sides_in_name(episode.path)) == 1
        and len(told := sides_in_text(episode.instruction)) == 1
        and named != told
    ]
    if contradicting:
        lines.append(f"{len(contradicting)} are told another side than their name says: {_few(contradicting)}")
    originals: dict[str, str] = {}
    copies = [
        episode.name for episode in episodes if originals.setdefault(episode.sha256, episode.name) != episode.name
    ]
    if copies:
        lines.append(f"{len(copies)} have the same content as another one: {_few(copies)}")
    if lines:
        warnings.warn("\n  ".join(["about the episodes:", *lines]), EpisodeWarning, stacklevel=3)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
