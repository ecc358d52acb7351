"""Everything that a quantization takes from recordings: frames to calibrate on, stretches to search by and to judge by, and their identity.

Binds calib/sample.py (which frames) and calib/frames.py (their pixels) to the command line and its messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.errors import ConfigError, EpisodeError
from bundle.manifest import Manifest
from bundle.prompt_template import takes_words
from calib.calibrate import Seen
from calib.config import QuantizeConfig
from calib.frames import calibration_frames, frames_sha256, random_sample, stretch_frames
from calib.sample import Sample, Stretch, draw
from calib.trial import Held
from calib.workspace import request_sha256
from episodes.sources import find_sources
from export.console import Reporter


@dataclass(frozen=True)
class Data:
    """What a run works with.

    Attributes:
        sample: which frames; None for made-up pictures.
        seen: calibration frames.
        search, test: held-out stretches; no episode is in two of the three.
        sha256: id of the calibration frames.
    """

    sample: Sample | None
    seen: tuple[Seen, ...]
    search: tuple[Held, ...]
    test: tuple[Held, ...]
    sha256: str


def read_data(config: QuantizeConfig, manifest: Manifest, reporter: Reporter) -> Data:
    """Draw frames from the recordings and read them.

    Raises:
        EpisodeError: the recordings are another robot's, too few, too short, damaged, or show nothing.
    """
    if not config.episodes:
        return _made_up(config, manifest, reporter)
    sources = find_sources(config.episodes)
    with reporter.count_bar("looking at frames", 4 * config.frames) as advance:
        sample = draw(
            sources,
            manifest=manifest,
            frames=config.frames,
            search_frames=config.held_out,
            test_frames=config.held_out,
            instruction=config.instruction,
            seed=config.seed,
            advance=advance,
        )
    sample = replace(sample, notes=tuple(_readable(note) for note in sample.notes))
    for note in sample.notes:
        reporter.warn(note)
    _check_memory(sample, manifest)
    seen = tuple(
        Seen(frame, chosen.instruction, str(chosen.source)) for chosen, frame in calibration_frames(sample, manifest)
    )
    names = _names(sources)
    parts = [
        tuple(Held(stretch, names[stretch.source], stretch_frames(stretch, manifest)) for stretch in part)
        for part in (sample.search, sample.test)
    ]
    sha256 = frames_sha256((each.instruction, each.frame) for each in seen)
    held = [sum(len(each.frames) for each in part) for part in parts]
    used = {each.episode for each in seen} | {str(each.stretch.source) for part in parts for each in part}
    reporter.result(
        f"{len(used)} of {len(sources)} episodes: {len(seen)} calibration frames in {len(strata(sample))} strata, "
        f"{held[0]} frames to search by, {held[1]} to judge by; id {sha256[:12]}"
    )
    return Data(sample, seen, parts[0], parts[1], sha256)


def _check_memory(sample: Sample, manifest: Manifest) -> None:
    """Raises EpisodeError unless each held-out part has a stretch over which the policy's memory fills and slides."""
    window = manifest.dimensions.window
    for name, part in (("search", sample.search), ("test", sample.test)):
        longest = max((len(each) for each in part), default=0)
        if longest <= window:
            raise EpisodeError(
                f"no episode to {name} by is longer than the policy's memory",
                got=f"{longest} frames at most",
                expected=f"more than {window}",
                hint="quantization errors add up in the memory: take longer recordings, or a larger --held-out.",
            )


def _made_up(config: QuantizeConfig, manifest: Manifest, reporter: Reporter) -> Data:
    reporter.warn(
        "made-up pictures: speed and memory will be right, accuracy means nothing, and the bundle will say so."
    )
    length = manifest.dimensions.window + 4
    pictures = random_sample(manifest, frames=config.frames + 2 * length, seed=config.seed)
    told = config.instruction or next((each.text for each in manifest.prompt.instructions), None)
    if told is None and not takes_words(manifest.prompt.template):
        told = ""
    if told is None:
        raise ConfigError(
            "no instruction",
            got="none here, and none in the bundle",
            expected="what the policy is told",
            hint="--instruction '...'",
        )
    seen = tuple(Seen(frame, told, "made-up") for frame in pictures[: config.frames])
    held = [
        Held(Stretch(Path(), 0, length, told), f"made-up-{part}", np.stack(pictures[start : start + length]))
        for part, start in (("search", config.frames), ("test", config.frames + length))
    ]
    return Data(None, seen, (held[0],), (held[1],), frames_sha256((each.instruction, each.frame) for each in seen))


def held_sha256(data: Data) -> list[str]:
    """Identity of the held-out frames, in their order."""
    return [
        request_sha256(each.key, each.stretch.instruction, frames_sha256((each.key, frame) for frame in each.frames))
        for each in (*data.search, *data.test)
    ]


def frame_finder(data: Data) -> Callable[[str, int], NDArray[np.uint8]]:
    """Looks up a test frame by episode name and index: uint8 [s, s, 3]."""

    def frame(episode: str, index: int) -> NDArray[np.uint8]:
        held = next(
            each for each in data.test if each.episode == episode and each.stretch.start <= index < each.stretch.stop
        )
        picture: NDArray[np.uint8] = held.frames[index - held.stretch.start][-1]
        return picture

    return frame


def _names(sources: Sequence[Path]) -> dict[Path, str]:
    """Episodes by file name where that is enough to tell them apart."""
    count = Counter(source.name for source in sources)
    return {source: _readable(source.name if count[source.name] == 1 else str(source)) for source in sources}


def _readable(name: str) -> str:
    """A file name that is not UTF-8, with its bytes escaped: it goes into JSON and onto a page."""
    return name.encode("utf-8", "backslashreplace").decode()


def strata(sample: Sample | None) -> dict[str, int]:
    """How many calibration frames each kind of frame has."""
    return dict(Counter(" · ".join(chosen.stratum) for chosen in sample.calibration)) if sample else {}
