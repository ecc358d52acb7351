from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("h5py")

from bundle.errors import ConfigError, EpisodeError
from bundle.manifest import Manifest
from calib.candidates import Recording, brightness, choose, deal_episodes
from calib.sample import Sample, draw, plan_stretches
from episodes.sources import find_sources
from episodes.synthetic import write_synthetic
from episodes.writer import write_episode
from tests.bundles import WINDOW, Tiny, make_bundle

LEFT, RIGHT = "go to the basket on the left", "go to the basket on the right"
FORWARD, STOP, BACK = (1.15, 0.0, 0.0), (0.0, 0.0, 0.0), (-1.15, -1.15, 0.0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Manifest.load(make_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten episodes of 18 frames, five for each side."""
    folder = tmp_path_factory.mktemp("recorded")
    for seed in range(10):
        write_synthetic(folder, "v1", side="right" if seed % 2 else "left", seed=seed, height=24, width=32)
    return folder


def write(
    path: Path,
    *,
    length: int = 18,
    instruction: str | None = LEFT,
    actions: Sequence[Sequence[float]] | None = None,
    black: Sequence[int] = (),
    light: float = 1.0,
) -> Path:
    """An episode of noise; frames in `black` are so, and `light` scales the others. No two names have the same actions."""
    number = sum(path.name.encode())
    rng = np.random.default_rng(number)
    pictures = (rng.integers(0, 256, (length, 24, 32, 3)) * light).astype(np.uint8)
    pictures[list(black)] = 0
    actions = actions or [(1.15, 0.0, number / 1e5)] * length
    return write_episode(path, iter(pictures), actions, instruction=instruction, fps=6.0)


def write_many(folder: Path, count: int = 5, **options: object) -> None:
    for index in range(count):
        write(folder / f"episode_{index}.h5", **options)  # type: ignore[arg-type]


def drawn(
    folder: Path, manifest: Manifest, *, frames: int = 16, held: int = 12, instruction: str | None = None, seed: int = 0
) -> Sample:
    return draw(
        find_sources([str(folder)]),
        manifest=manifest,
        frames=frames,
        search_frames=held,
        test_frames=held,
        instruction=instruction,
        seed=seed,
    )


def parts(sample: Sample) -> tuple[set[str], set[str], set[str]]:
    return (
        {each.source.name for each in sample.calibration},
        {each.source.name for each in sample.search},
        {each.source.name for each in sample.test},
    )


def by_name(sample: Sample) -> tuple[list[tuple[object, ...]], ...]:
    return (
        [(each.source.name, each.frame, each.instruction, each.stratum) for each in sample.calibration],
        [(each.source.name, each.start, each.stop, each.instruction) for each in sample.search],
        [(each.source.name, each.start, each.stop, each.instruction) for each in sample.test],
    )


def test_a_draw_depends_on_names_and_seed_and_on_nothing_else(
    recorded: Path, manifest: Manifest, tmp_path: Path
) -> None:
    sources = find_sources([str(recorded)])
    moved = shutil.copytree(recorded, tmp_path / "elsewhere")
    first = drawn(recorded, manifest)

    turned = draw(sources[::-1] + sources[:1], manifest=manifest, frames=16, search_frames=12, test_frames=12)

    assert turned == first
    assert by_name(drawn(moved, manifest)) == by_name(first)
    assert by_name(drawn(recorded, manifest, seed=1)) != by_name(first)


def test_both_instructions_are_calibrated_on_and_held_out(recorded: Path, manifest: Manifest) -> None:
    sample = drawn(recorded, manifest, frames=32, held=24)

    assert [len(part) for part in parts(sample)] == [6, 2, 2]
    assert sample.notes == ()
    assert {each.instruction for each in sample.search + sample.test} == {
        each.instruction for each in sample.calibration
    }
    told = Counter(each.instruction for each in sample.calibration)
    assert set(told.values()) == {16}
    assert len(set(sample.calibration)) == 32


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.sampled_from("abc")), min_size=3, max_size=60),
    window=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_no_episode_is_in_two_parts_whatever_the_counts(lengths: list[tuple[int, str]], window: int, seed: int) -> None:
    recordings = [
        Recording(Path(f"{index}.h5"), told, ("stop",) * length, "") for index, (length, told) in enumerate(lengths)
    ]

    dealt = deal_episodes(recordings, window=window, seed=seed)

    assert sorted(each.name for part in dealt for each in part) == sorted(each.name for each in recordings)
    calibration, *held = ([len(each) > window for each in part] for part in dealt)
    assert abs(len(calibration) - 0.6 * len(recordings)) <= 1.2
    assert len(held[0]) == len(held[1]) >= 1
    longer = sum(calibration) + sum(held[0]) + sum(held[1])
    assert any(held[1]) == (longer >= 1)
    assert any(held[0]) == (longer >= 2)


@given(
    sizes=st.dictionaries(st.tuples(*[st.sampled_from("abc")] * 3), st.integers(1, 9), min_size=1),
    count=st.integers(1, 60),
)
def test_choose_gives_every_stratum_its_turn(sizes: dict[tuple[str, ...], int], count: int) -> None:
    strata = {stratum: [(stratum, index) for index in range(size)] for stratum, size in sizes.items()}

    chosen = choose(strata, count)

    assert len(set(chosen)) == len(chosen) == min(count, sum(sizes.values()))
    given_out = Counter(stratum for stratum, _ in chosen)
    for stratum, size in sizes.items():
        assert given_out[stratum] >= min(size, max(given_out.values()) - 1)
    if count >= 3:
        assert {stratum[0] for stratum, _ in chosen} == {stratum[0] for stratum in sizes}


def test_a_rare_motion_is_calibrated_on(manifest: Manifest, tmp_path: Path) -> None:
    once = [*[FORWARD] * 38, BACK, STOP]
    write_many(tmp_path, 9, length=40, actions=once)

    sample = drawn(tmp_path, manifest)

    motions = Counter(each.stratum[1] for each in sample.calibration)
    assert set(motions) == {"+x", "-x-y", "stop"}
    assert motions["-x-y"] >= 3
    assert {each.stratum[2] for each in sample.calibration} == {"start", "middle", "end"}
    assert {each.frame for each in sample.calibration if each.stratum[1] == "-x-y"} == {38}


def test_motion_follows_the_columns_of_a_class_head(tmp_path: Path) -> None:
    manifest = Manifest.load(make_bundle(tmp_path / "bundle", Tiny(head="classes")))
    slow = [(0.34, 0.35, 5.0)] * 18  # 0.3 * 1.15 is 0.345; the policy has no angular_z
    write_many(tmp_path, actions=slow)

    sample = drawn(tmp_path, manifest)

    assert {each.stratum[1] for each in sample.calibration} == {"+y"}


def test_a_gripper_head_asks_for_no_recorded_gripper(recorded: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(make_bundle(tmp_path / "bundle", Tiny(head="actions_gripper")))

    assert len(drawn(recorded, manifest).calibration) == 16


def test_brightness_is_told_in_terciles_of_what_is_there(manifest: Manifest, tmp_path: Path) -> None:
    for index in range(9):
        write(tmp_path / f"{index}.h5", light=(0.3, 0.6, 0.9)[index % 3])

    sample = drawn(tmp_path, manifest, frames=30)

    light = Counter(each.stratum[3] for each in sample.calibration)
    assert set(light) == {"dark", "medium", "bright"}
    assert min(light.values()) >= 8


def test_no_more_images_are_read_than_four_for_each_frame_and_two_for_each_stretch(
    manifest: Manifest, tmp_path: Path
) -> None:
    write_many(tmp_path, 5, length=60)
    calls: list[None] = []

    sample = draw(
        find_sources([str(tmp_path)]),
        manifest=manifest,
        frames=16,
        search_frames=21,
        test_frames=21,
        advance=lambda: calls.append(None),
    )

    assert len(sample.search) == len(sample.test) == 3
    assert len(calls) == 4 * 16 + 2 * 6


# --- stretches --------------------------------------------------------------------------------------------------------------------


def test_stretches_exceed_the_window_and_lie_in_different_places(manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, 15, length=20)

    sample = drawn(tmp_path, manifest, held=21)

    for part in (sample.search, sample.test):
        assert [len(stretch) for stretch in part] == [WINDOW + 4] * 3
        assert sorted(stretch.start for stretch in part) == [0, 6, 13]
        assert len({stretch.source for stretch in part}) == 3


def test_an_episode_gives_several_stretches_when_there_are_no_others(manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, 3, length=60)

    sample = drawn(tmp_path, manifest, held=40)

    for part in (sample.search, sample.test):
        assert len(part) == 6
        assert 40 <= sum(len(stretch) for stretch in part) < 40 + WINDOW + 4
        ends = [(stretch.start, stretch.stop) for stretch in part]
        assert all(0 <= start < stop <= 60 for start, stop in ends)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))
    assert not any("asked for" in note for note in sample.notes if not note.startswith("calibration"))


def test_whole_episodes_are_used_and_a_note_says_so_when_more_is_asked_for(manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, 3)

    sample = drawn(tmp_path, manifest, held=100)

    assert sum(len(stretch) for stretch in sample.test) == 18
    assert "test: 18 frames of 100 asked for; its episodes (1) gave no more" in sample.notes


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12),
    wanted=st.integers(0, 300),
    window=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_stretches_add_up_and_never_overlap_wherever_they_lie(
    lengths: list[int], wanted: int, window: int, seed: int
) -> None:
    recordings = [Recording(Path(f"{index}.h5"), LEFT, ("stop",) * length, "") for index, length in enumerate(lengths)]

    plan = plan_stretches(recordings, wanted, window, seed)

    assert len({recording for recording, _ in plan}) == len(plan) >= 1
    sizes = []
    for recording, stretches in plan:
        before = 0
        for places in stretches:
            assert len({len(place) for place in places}) == 1
            assert before <= min(place.start for place in places)
            before = max(place.stop for place in places)
            assert len(places[0]) >= min(window + 4, len(recording))
            sizes.append(len(places[0]))
        assert before <= len(recording)
    assert min(wanted, sum(lengths)) <= sum(sizes) < wanted + window + 4 + len(sizes)


def test_the_only_episode_beyond_the_window_judges(manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, 12, length=WINDOW)
    write(tmp_path / "long.h5", length=WINDOW + 1)

    sample = drawn(tmp_path, manifest)

    assert max(len(stretch) for stretch in sample.test) == WINDOW + 1
    assert {len(stretch) for stretch in sample.search} == {WINDOW}


# --- what is left out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (np.zeros((9, 9, 3), np.uint8), None),
        (np.full((720, 1280, 3), 128, np.uint8), None),
        (np.arange(9 * 9 * 3).reshape(9, 9, 3).astype(np.uint8) // 30, None),
        (np.kron([[0, 100]], np.ones((400, 400)))[..., None].repeat(3, 2).astype(np.uint8), pytest.approx(50)),
    ],
)
def test_brightness_is_none_where_nothing_is_shown(frame: NDArray[np.uint8], expected: float | None) -> None:
    assert brightness(frame) == expected


def test_black_frames_are_left_out_and_named(manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, 5, black=range(8, 18))

    sample = drawn(tmp_path, manifest)

    assert len(sample.calibration) == 16
    assert {each.frame for each in sample.calibration} <= set(range(8))
    assert all(stretch.start == 0 for stretch in sample.search + sample.test)
    assert sum("left out frames that show nothing: " in note for note in sample.notes) == 3


def test_a_black_episode_is_no_part_and_leaves_none_empty(manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, 8)
    covered = [write(tmp_path / f"covered_{index}.h5", black=range(18)).name for index in range(6)]

    samples = [drawn(tmp_path, manifest, held=28, seed=seed) for seed in range(5)]

    for sample in samples:
        assert all(parts(sample))
        assert not set.union(*parts(sample)) & set(covered)
    assert any("covered_1.h5: left out, it shows nothing where it was looked at" in sample.notes for sample in samples)


def test_a_copy_of_an_episode_is_left_out(manifest: Manifest, tmp_path: Path) -> None:
    """Under any name: in another part it would be judged by what it was fitted to."""
    write_many(tmp_path)
    for index in range(5):
        for name in ("again", "zzz"):
            shutil.copyfile(tmp_path / f"episode_{index}.h5", tmp_path / f"{name}_{index}.h5")

    sample = drawn(tmp_path, manifest)

    assert [len(part) for part in parts(sample)] == [3, 1, 1]
    assert sum("left out, a copy of another episode" in note for note in sample.notes) == 10


@pytest.mark.parametrize("what", ["actions", "first frame", "instruction"])
def test_an_episode_that_differs_in_something_is_no_copy(manifest: Manifest, tmp_path: Path, what: str) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (18, 24, 32, 3), dtype=np.uint8)
    for index in range(5):
        own, actions = pictures.copy(), [list(FORWARD) for _ in range(18)]
        if what == "first frame":
            own[0, 5, 5, 1] = index
        if what == "actions":
            actions[17][1] = 0.01 * index
        told = f"{LEFT} {index}" if what == "instruction" else LEFT
        write_episode(tmp_path / f"{index}.h5", iter(own), actions, instruction=told, fps=6.0)

    sample = drawn(tmp_path, manifest)

    assert not any("copy" in note for note in sample.notes)
    assert len(set.union(*parts(sample))) == 5


@pytest.mark.parametrize("black", [range(18), range(1, 18)])
def test_nothing_but_black_frames(black: range, manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, black=black)

    with pytest.raises(EpisodeError, match=r"show nothing|too few frames") as caught:
        drawn(tmp_path, manifest)
    if len(black) == 18:
        assert "lens" in caught.value.hint


def test_episodes_of_another_robot_are_refused(recorded: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(make_bundle(tmp_path / "bundle"))
    lifting = msgspec.structs.replace(manifest.action, names=("linear_x", "lift"))
    changed = msgspec.structs.replace(manifest, action=lifting)

    with pytest.raises(EpisodeError, match="of another robot") as caught:
        drawn(recorded, changed)
    assert caught.value.got == "linear_x, linear_y, angular_z"
    assert caught.value.expected == "linear_x, lift"


def test_an_episode_without_an_instruction_is_left_out_unless_one_is_stated(manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, 4)
    write(tmp_path / "untold.h5", instruction=None)
    write(tmp_path / "drive_to_the_right.h5", instruction=None)

    own = drawn(tmp_path, manifest, held=36)
    stated = drawn(tmp_path, manifest, held=36, instruction=RIGHT)

    assert "untold.h5: left out, it has no instruction" in own.notes
    assert any("taken from the file name (drive_to_the_right.h5" in note for note in own.notes)
    assert "untold.h5" not in set.union(*parts(own))
    assert {each.instruction for each in stated.calibration} == {RIGHT}
    assert {each.instruction for each in stated.search + stated.test} == {RIGHT}
    assert not any("instruction" in note for note in stated.notes)


def test_no_instruction_anywhere(manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, instruction=None)

    with pytest.raises(EpisodeError, match="no episode has an instruction") as caught:
        drawn(tmp_path, manifest)
    assert "--instruction" in caught.value.hint


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_episodes(count: int, manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, count)
    write(tmp_path / "untold.h5", instruction=None)

    with pytest.raises(EpisodeError, match="too few episodes") as caught:
        drawn(tmp_path, manifest)
    assert str(caught.value.got).startswith(f"{count} that can be used")
    assert str(caught.value.expected).startswith("at least 3")


def test_too_few_frames_to_calibrate_on(manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, 3, length=15)

    with pytest.raises(EpisodeError, match="too few frames to calibrate on") as caught:
        drawn(tmp_path, manifest)
    assert str(caught.value.got).startswith("15 ")
    assert caught.value.expected == "at least 16"


def test_fewer_than_asked_for_is_said(manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path, 3)

    sample = drawn(tmp_path, manifest, frames=64)

    assert len(sample.calibration) == 18
    assert "calibration: 18 frames of 64 asked for; its episodes (1) gave no more" in sample.notes


def test_fewer_than_can_calibrate_are_not_to_be_asked_for(recorded: Path, manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match="too few calibration frames"):
        drawn(recorded, manifest, frames=15)


def test_a_damaged_file_is_named(manifest: Manifest, tmp_path: Path) -> None:
    write_many(tmp_path)
    damaged = tmp_path / "episode_3.h5"
    damaged.write_bytes(damaged.read_bytes()[:2000])

    with pytest.raises(EpisodeError, match=r"episode_3\.h5"):
        drawn(tmp_path, manifest)
