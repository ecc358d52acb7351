"""Splits are drawn by episode and stratum, the same for the same names and seed, and nothing leaks from one part into the other."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.errors import ConfigError
from episodes.reader import EpisodeWarning
from tests.training_data import LEFT, RIGHT, episode
from train.episode_set import TrainingEpisode
from train.run_config import AugmentConfig, Kind
from train.split import Split, draw_split, mix, part_episodes, read_split, save_split

ROOT = Path(__file__).resolve().parents[2]


def several(left: int, right: int, kind: Kind = "real") -> list[TrainingEpisode]:
    return [
        episode(f"{kind}_{side}_{number}.h5", kind=kind, instruction=text)
        for side, text, count in (("l", LEFT, left), ("r", RIGHT, right))
        for number in range(count)
    ]


@settings(max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=3),
    share=st.floats(0.05, 0.95),
    seed=st.integers(-3, 3),
    order=st.randoms(use_true_random=False),
)
def test_a_draw_is_a_stratified_partition(
    sizes: list[tuple[int, int]], share: float, seed: int, order: random.Random
) -> None:
    kinds: tuple[Kind, ...] = ("real", "sim", "augmented")
    episodes = [each for kind, size in zip(kinds, sizes, strict=False) for each in several(*size, kind=kind)]
    if len(episodes) < 2:
        return
    split = draw_split(episodes, val_share=share, seed=seed)

    assert sorted([*split.train, *split.val]) == sorted(each.name for each in episodes)
    assert split.train
    assert split.val
    part_episodes(episodes, split)
    shuffled = list(episodes)
    order.shuffle(shuffled)
    assert draw_split(shuffled, val_share=share, seed=seed) == split
    # At most six strata here: the share is kept up to one episode for each.
    assert abs(len(split.val) - share * len(episodes)) <= 6
    strata = Counter((each.kind, each.instruction) for each in episodes)
    validated = Counter((each.kind, each.instruction) for each in episodes if each.name in split.val)
    target = max(round(share * len(episodes)), 1)
    for stratum, size in strata.items():
        assert abs(validated[stratum] - share * size) <= 1.5
        if size >= 2:
            assert validated[stratum] < size
            if sum(count >= 2 for count in strata.values()) <= 2 * target:
                assert validated[stratum] > 0


@pytest.mark.parametrize("total", [100, 250])
def test_the_share_is_exact_for_the_labs_sets(total: int) -> None:
    split = draw_split(several(total, total), val_share=0.2, seed=0)
    assert len(split.val) == 2 * total // 5
    assert sum("_l_" in name for name in split.val) == total // 5


def test_many_small_strata_do_not_inflate_validation() -> None:
    episodes = [episode(f"{n}_{k}.h5", instruction=f"go to {n}") for n in range(50) for k in range(2)]
    assert len(draw_split(episodes, val_share=0.2, seed=0).val) == 20


def test_two_episodes_are_enough_and_one_is_not() -> None:
    split = draw_split(several(2, 0), val_share=0.01, seed=0)
    assert (len(split.train), len(split.val)) == (1, 1)
    with pytest.raises(ConfigError, match=r"cannot be split(.|\n)*got: +1 episodes"):
        draw_split(several(1, 0), val_share=0.5, seed=0)
    copies = [episode("a.h5"), episode("a_mirror.h5", kind="augmented")]
    with pytest.raises(ConfigError, match="2 copies of one episode"):
        draw_split(copies, val_share=0.5, seed=0)


def test_seeds_draw_differently() -> None:
    episodes = several(20, 20)
    assert len({draw_split(episodes, val_share=0.2, seed=seed).sha256 for seed in range(5)}) == 5


def test_another_process_draws_the_same() -> None:
    program = """
from tests.training_data import LEFT, RIGHT, episode
from train.split import draw_split
episodes = [episode(f"{n}.h5", instruction=(LEFT, RIGHT)[n % 2]) for n in range(20)]
print(draw_split(episodes, val_share=0.2, seed=1).sha256)
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_copies_stay_with_their_original() -> None:
    episodes = []
    for number in range(12):
        episodes.append(episode(f"ep_{number}.h5"))
        episodes.append(episode(f"ep_{number}_mirror.h5", instruction=RIGHT))  # a kind that does not say so
        episodes.append(episode(f"ep_{number}_aug3.h5", kind="augmented"))
        episodes.append(episode(f"ep_{number}_rain_v2.h5", kind="augmented"))
        episodes.append(episode(f"again_{number}.h5", sha256=episode(f"ep_{number}.h5").sha256))
    for seed in range(5):
        split = draw_split(episodes, val_share=0.25, seed=seed)
        families = Counter(name.removesuffix(".h5").split("_")[1] for name in split.val)
        assert len(split.val) == 15
        assert set(families.values()) == {5}
        part_episodes(episodes, split)  # warns of nothing


def test_names_that_merely_begin_alike_are_no_copies() -> None:
    episodes = [episode("ep_1.h5"), episode("ep_12.h5", kind="augmented"), episode("ep_1b.h5", kind="augmented")]
    episodes.append(episode("ep_1_second.h5"))  # a recording, not augmented
    split = draw_split(episodes, val_share=0.5, seed=0)
    assert len(split.val) == 2


def test_copies_of_an_absent_original_stay_together() -> None:
    episodes = [episode(f"ep_{n}_aug{k}.h5", kind="augmented") for n in range(6) for k in range(3)]
    split = draw_split(episodes, val_share=0.3, seed=0)
    assert set(Counter(name.split("_")[1] for name in split.val).values()) == {3}


# --- files ------------------------------------------------------------------------------------------------------------------


def test_a_split_survives_its_file(tmp_path: Path) -> None:
    split = draw_split([*several(5, 5), episode("왼쪽.h5")], val_share=0.2, seed=3)
    save_split(tmp_path / "split.json", split)
    assert read_split(tmp_path / "split.json") == split
    assert "왼쪽.h5" in (tmp_path / "split.json").read_text(encoding="utf-8")
    assert read_split(tmp_path / "split.json").sha256 == split.sha256


def test_the_hash_is_of_the_parts_alone() -> None:
    drawn = Split(train=("a", "b"), val=("c",), seed=1, val_share=0.2)
    assert Split(train=("b", "a"), val=("c",)).sha256 == drawn.sha256
    assert Split(train=("a",), val=("b", "c")).sha256 != drawn.sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a split"),
        ("[]", "is not a split"),
        ('{"train": ["a"]}', "`val`"),
        ('{"train": ["a"], "val": ["b"], "test": []}', "unknown field `test`"),
        ('{"train": ["a"], "val": [1]}', r"\$\.val"),
        ('{"train": ["a"], "val": []}', "1 train, 0 val"),
        ('{"train": ["a"], "val": ["a"]}', "a more than once"),
        (b"\xff", "is not a split"),
    ],
)
def test_what_is_no_split(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "split.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        read_split(path)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_split_or_an_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any-split.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        read_split(path)


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        read_split(tmp_path / "none.json")


# --- use --------------------------------------------------------------------------------------------------------------------


def test_parts_keep_the_order_of_the_episodes() -> None:
    episodes = [episode(f"{n}.h5") for n in (3, 1, 2, 0)]
    train, val = part_episodes(episodes, Split(train=("1.h5", "0.h5"), val=("2.h5", "3.h5")))
    assert [each.name for each in train] == ["1.h5", "0.h5"]
    assert [each.name for each in val] == ["3.h5", "2.h5"]


def test_a_split_of_other_episodes() -> None:
    split = Split(train=("a.h5",), val=("b.h5", "gone.h5"))
    with pytest.raises(ConfigError) as error:
        part_episodes([episode("a.h5"), episode("b.h5"), episode("new.h5")], split)
    assert "1 in the split but not among the episodes: gone.h5" in str(error.value)
    assert "1 episodes in no part: new.h5" in str(error.value)


def test_the_same_content_in_both_parts_is_a_leak() -> None:
    same = "0" * 64
    episodes = [episode("a.h5", sha256=same), episode("b.h5", sha256=same)]
    with pytest.raises(ConfigError, match=r"among the training episodes under other names(.|\n)*b\.h5 = a\.h5"):
        part_episodes(episodes, Split(train=("a.h5",), val=("b.h5",)))


@pytest.mark.parametrize(
    ("train", "val"), [("ep.h5", "ep_mirror.h5"), ("ep_aug3.h5", "ep.h5"), ("ep_aug1.h5", "ep_flip_2.h5")]
)
def test_a_copy_in_the_other_part_is_warned_of(train: str, val: str) -> None:
    with pytest.warns(EpisodeWarning, match=rf"1 validation episodes have an augmented copy.*{val}"):
        part_episodes([episode(train), episode(val)], Split(train=(train,), val=(val,)))


def test_unrelated_names_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part_episodes([episode("ep_1.h5"), episode("ep_2.h5")], Split(train=("ep_1.h5",), val=("ep_2.h5",)))


def test_mix_counts_episodes_frames_and_views() -> None:
    episodes = [episode("a.h5", length=5), episode("b.h5", length=7, kind="sim"), episode("c.h5", length=3)]
    split = Split(train=("a.h5", "b.h5"), val=("c.h5",))
    found = mix(episodes, split, AugmentConfig(mirror=0.5, blur=1.0, share=0.25))
    assert found == {
        "train": {"real": {"episodes": 1, "frames": 5}, "sim": {"episodes": 1, "frames": 7}},
        "val": {"real": {"episodes": 1, "frames": 3}},
        "views_per_epoch": {"episodes": 2, "mirrored": 1.0, "augmented": 0.5},
    }
    assert json.loads(json.dumps(found)) == found
    assert mix(episodes, split)["views_per_epoch"] == {"episodes": 2, "mirrored": 0.0, "augmented": 0.0}
    assert mix(episodes, split, AugmentConfig(share=1.0))["views_per_epoch"]["augmented"] == 0


def test_a_split_is_plain_data() -> None:
    split = Split(train=("a",), val=("b",), seed=1, val_share=0.5)
    assert msgspec.to_builtins(split) == {"train": ("a",), "val": ("b",), "seed": 1, "val_share": 0.5}
