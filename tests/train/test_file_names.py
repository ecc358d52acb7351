"""What file names say of a path, which episodes a source keeps, and how often each is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from train.episode_choice import weighted
from train.episode_set import TrainingEpisode
from train.file_names import family_of, is_straight, named, path_of, path_type_of
from train.run_config import SourceConfig

STEM = "episode_20260407_120000_target_left_straight_path__core"


def episode(stem: str, source: int = 0) -> TrainingEpisode:
    actions = np.ones((4, 2), np.float32)
    return TrainingEpisode(Path(f"{stem}.h5"), "real", "v5", "", "go", actions, 5.0, source=source)


@pytest.mark.parametrize(
    ("stem", "kind", "family", "path"),
    [
        (STEM, "straight", "left_straight", "straight"),  # straight is asked for first
        ("episode_target_right_left_path_2", "left", "right_left", "left"),
        ("episode_target_left_right_path_2", "left", "left_right", "right"),
        ("episode_basket_1box_hori_right", "right", "other", "other"),
        ("episode_target_left", "left", "other", "other"),
        ("episode_1", "other", "other", "other"),
    ],
)
def test_what_a_name_says(stem: str, kind: str, family: str, path: str) -> None:
    assert path_type_of(stem) == kind
    assert family_of(stem) == family
    assert path_of(stem) == path


def test_filters_by_name() -> None:
    assert named(STEM, SourceConfig(files=("a",)))
    assert not named(STEM, SourceConfig(files=("a",), exclude=("center", "straight")))
    assert named(STEM, SourceConfig(files=("a",), families=("left_straight",)))
    assert not named(STEM, SourceConfig(files=("a",), families=("left_left",)))


@pytest.mark.parametrize(
    ("actions", "straight"),
    [
        ([[1, 0], [0.5, 0.3]], True),
        ([[1, 0], [1, 0.31]], False),
        ([[1, 0], [1, -0.31]], False),
        ([[1, 0], [0.29, 0]], False),
    ],
)
def test_driving_straight_ahead(actions: list[list[float]], straight: bool) -> None:
    assert is_straight(np.array(actions, np.float32), ("linear_x", "linear_y")) is straight


def test_shares_are_of_the_number_of_episodes() -> None:
    episodes = [
        episode(f"{kind}_{number}")
        for kind, count in (("straight", 6), ("left", 2), ("right", 2))
        for number in range(count)
    ]
    source = SourceConfig(files=("a",), path_shares={"straight": 0.3, "left": 0.4, "right": 0.3})

    chosen = weighted(episodes, [source], seed=1)

    stems = [each.stem for each in chosen]
    assert [sum(kind in stem for stem in stems) for kind in ("straight", "left", "right")] == [3, 4, 3]
    assert {stems.count(f"left_{number}") for number in range(2)} == {2}  # too few are repeated evenly
    assert {stems.count(f"right_{number}") for number in range(2)} == {1, 2}
    assert len({stem for stem in stems if "straight" in stem}) == 3  # enough are not
    assert chosen == weighted(episodes, [source], seed=1)
    assert any(weighted(episodes, [source], seed=seed) != chosen for seed in range(2, 8))


def test_groups_without_a_share_are_left_out_and_other_sources_stay() -> None:
    episodes = [episode("e_target_left_left_path"), episode("e_target_left_right_path"), episode("straight", source=1)]
    sources = [SourceConfig(files=("a",), family_shares={"left_left": 1.0}), SourceConfig(files=("b",))]

    assert [each.stem for each in weighted(episodes, sources, seed=0)] == [
        "e_target_left_left_path", "e_target_left_left_path", "straight",
    ]  # fmt: skip
