"""Reads every case of tests/hostile_episodes.py in a process of its own, as the doctor and as training do, and prints what came of it.

What a process took is counted from what it began with, and held against what a sound file of that size takes: its bytes twice.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from bundle.errors import JetvlaError
from episodes.examination import examine
from episodes.layout import IMAGES, Schema
from episodes.pictures import decode_picture
from episodes.reader import Episode, EpisodeWarning, open_episode, open_here
from tests.bounded_child import CPU_S, MEMORY_BYTES, in_child, table
from tests.hostile_episodes import Case, Sound, cases, make_sound, opened

_PATIENCE_S = 120.0  # of the clock; the machine may be busy
_LIMIT_CPU_S = 25
_TITLES = {
    "refused": "refused", "same": "as the sound file", "warned": "otherwise, and said so", "stored": "as the bytes say",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        kind: refused; same (as the sound file); warned (read otherwise, and the doctor says something); stored (read otherwise, as
            the bytes now say, which no checksum covers); silent (read otherwise, without a word); untyped; killed.
        missed: training refuses what the doctor calls good.
    """

    case: Case
    kind: str
    said: str
    missed: bool
    cpu_s: float
    memory: int
    file_bytes: int

    @property
    def name(self) -> str:
        """The case's."""
        return self.case.name

    def faults(self) -> list[str]:
        """The promises that it broke."""
        found = []
        if self.kind == "killed" or self.cpu_s > CPU_S:
            found.append("more than 10 s")
        if self.memory > MEMORY_BYTES + 2 * self.file_bytes:
            found.append("more than 1 GB above need")
        if self.kind == "untyped":
            found.append("untyped exception")
        if self.kind == "silent" or (self.case.must_refuse and self.kind in ("same", "stored", "warned")):
            found.append("read without a word")
        if self.missed:
            found.append("not found by the doctor")
        return found


def content(episode: Episode) -> list[str]:
    """What an episode says: hashes of actions and frames, and the rest."""
    digest = hashlib.sha256()
    for frame in episode.frames():
        digest.update(repr(frame.shape).encode())
        digest.update(frame.tobytes())
    actions = hashlib.sha256(episode.actions.tobytes()).hexdigest()
    rate = None if episode.fps is None else round(episode.fps, 6)
    return [actions, digest.hexdigest(), repr((len(episode), episode.action_names, episode.instruction, rate))]


def read_case(path: Path, good: list[str]) -> tuple[str, str, bool]:
    """Kind, what was said, and whether the doctor missed it."""
    try:
        findings = [] if ".mcap" in path.name else [(p.severity, f"{p.code}: {p.text}") for p in examine(path).problems]
        json.dumps(findings)
        try:
            # In this very process: what is measured is that damage is found before libhdf5 sees it, without the child that goes first.
            with open_here(path) if path.suffix == ".h5" else open_episode(path) as episode:
                found = content(episode)
        except JetvlaError as error:
            str(error).encode()
            missed = ".mcap" not in path.name and not any(severity == "error" for severity, _ in findings)
            return "refused", f"{type(error).__name__}: {error.what} ({error.got})", missed
        if found == good:
            return "same", "", False
        if findings:
            return "warned", "; ".join(text for _, text in findings), False
        kind = "stored" if path.suffix != ".h5" or found[:2] == _naive(path, episode.schema) else "silent"
        return kind, repr([a for a, b in zip(found, good, strict=True) if a != b]) if good else "", False
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "untyped",
            f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})",
            False,
        )


def _naive(path: Path, schema: str) -> list[str]:
    """Hashes of what h5py itself reads, asking nothing."""
    known: Schema = schema  # type: ignore[assignment]
    with h5py.File(path) as file:
        images, actions = file[IMAGES[known]][()], np.asarray(file["actions"][()], np.float32)
    digest = hashlib.sha256()
    for image in images:
        frame = (
            decode_picture(image.tobytes(), png=False)
            if image.ndim == 1
            else image[..., ::-1]
            if schema == "v6"
            else image
        )
        digest.update(repr(frame.shape).encode())
        digest.update(np.ascontiguousarray(frame).tobytes())
    return [hashlib.sha256(actions.tobytes()).hexdigest(), digest.hexdigest()]


def run_case(case: Case, folder: Path, good: dict[str, list[str]]) -> Outcome:
    """Make a case and read it in a child; both in children, so that making it leaves no memory behind."""
    made = in_child(lambda: str(case.make(folder)), patience_s=_PATIENCE_S * 5, limit_cpu_s=int(_PATIENCE_S * 5))
    assert made.said is not None, (case.name, made)
    path = Path(made.said)
    size = sum(each.stat().st_blocks * 512 for each in folder.rglob("*") if each.is_file() and not each.is_symlink())
    ended = in_child(
        lambda: read_case(path, good.get(case.sound, [])), patience_s=_PATIENCE_S, limit_cpu_s=_LIMIT_CPU_S
    )
    kind, said, missed = ended.said or ("killed", ended.why, False)
    return Outcome(case, kind, said[:2000], missed, ended.cpu_s, ended.memory, size)


def contents(sound: Sound) -> dict[str, list[str]]:
    """What the sound files say; none of them has an error."""
    found = {}
    for name in sound.names:
        path = opened(sound.folder / name)
        assert ".mcap" in name or not examine(path).errors, (name, examine(path).errors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EpisodeWarning)  # V6 stores no instruction
            with open_episode(path) as episode:
                found[name] = content(episode)
    return found


def run_all(chosen: Iterable[Case], folder: Path, sound: Sound) -> Iterator[Outcome]:
    """Every case, one after the other; its files are removed."""
    good = contents(sound)
    for case in chosen:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            yield run_case(case, Path(own), good)


def main(pattern: str = "", scale: str = "1") -> int:
    """Print the table; 1 if a promise was broken."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sound = make_sound(folder / "sound")
        outcomes = []
        for outcome in run_all((case for case in cases(sound, float(scale)) if pattern in case.name), folder, sound):
            outcomes.append(outcome)
            faults = outcome.faults()
            if faults or pattern:
                took = f"{outcome.cpu_s:.1f} s, {outcome.memory / 1e6:.0f} MB"
                print(
                    f"{outcome.case.name}: {', '.join(faults) or outcome.kind}; {took}; {outcome.said[:300]}",
                    file=sys.stderr,
                    flush=True,
                )
        print(table(outcomes, _TITLES))
    return int(any(outcome.faults() for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
