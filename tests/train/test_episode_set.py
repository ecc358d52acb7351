"""Episodes of every schema become one thing, and all that is wrong with them is said at once."""

from __future__ import annotations

import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.testing import assert_allclose

from bundle.errors import ConfigError, EpisodeError
from bundle.hashing import sha256_file
from episodes import first_contact
from episodes.frames import FrameSource
from episodes.instruction import sides_in_text
from episodes.reader import EpisodeWarning
from episodes.writer import write_episode
from tests.hanging_episodes import write_hanging
from tests.training_data import HEIGHT, LEFT, RIGHT, WIDTH, episode, read, write_schema, write_v1
from train.episode_set import TrainingEpisode, read_episodes
from train.run_config import DataConfig, SourceConfig


def from_folder(
    folder: Path,
    *,
    actions: tuple[str, ...] = ("linear_x", "linear_y"),
    fps: float | None = None,
    instruction: str | None = None,
) -> tuple[TrainingEpisode, ...]:
    source = SourceConfig(files=(str(folder),), instruction=instruction)
    return read_episodes(DataConfig(sources=(source,), actions=actions, fps=fps), folder)


def edit(path: Path, name: str, value: object) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = value


def test_every_schema(tmp_path: Path) -> None:
    paths = [write_schema(tmp_path, schema, seed=1) for schema in ("v1", "v5", "v5_jpeg", "v6")]
    episodes = {each.path: each for each in read(tmp_path)}
    assert [episodes[path].schema for path in paths] == ["v1", "v5", "v5", "v6"]
    for path, each in episodes.items():
        assert each.name == path.name
        assert each.sha256 == sha256_file(path)
        assert each.fps == pytest.approx(6.0)
        assert each.actions.shape == (len(each), 2) == (12, 2)
        assert each.actions.dtype == np.float32
        assert each.side == "right"
        assert each.instruction.endswith("on the right")


def test_columns_come_by_name_in_the_order_asked_for(tmp_path: Path) -> None:
    write_v1(tmp_path, "a.h5", length=3)
    (three,) = from_folder(tmp_path, actions=("angular_z", "linear_x"))
    assert three.action_names == ("angular_z", "linear_x")
    assert_allclose(three.actions, [[0, 0], [0.001, 0.1], [0.002, 0.2]], rtol=1e-6)


def test_two_axes_are_enough_where_two_are_learned(tmp_path: Path) -> None:
    path = write_v1(tmp_path, "a.h5", length=3)
    edit(path, "actions", np.ones((3, 2), np.float32))
    (planar,) = from_folder(tmp_path)
    assert planar.actions.shape == (3, 2)
    with pytest.raises(EpisodeError, match=r"a\.h5 has no action angular_z \(linear_x, linear_y\)") as error:
        from_folder(tmp_path, actions=("linear_x", "linear_y", "angular_z"))
    assert "leave that axis out of data.actions" in error.value.hint


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    write_v1(tmp_path, "good.h5")
    nan = write_v1(tmp_path, "nan.h5", length=3)
    edit(nan, "actions", np.full((3, 3), np.nan, np.float32))
    write_v1(tmp_path, "one_frame.h5", length=1)
    (tmp_path / "truncated.h5").write_bytes((tmp_path / "good.h5").read_bytes()[:900])
    write_v1(tmp_path, "wordless.h5", instruction=None)
    with pytest.raises(EpisodeError) as error:
        from_folder(tmp_path)
    message = str(error.value)
    assert "4 of 5 episodes cannot be trained on" in message
    assert "nan.h5: action 0 is not finite (linear_x = nan" in message
    assert "one_frame.h5 is too short (1 frame)" in message
    assert "truncated.h5 is truncated or damaged" in message
    assert "wordless.h5 has no instruction (none stored" in message
    assert "good.h5" not in message
    assert "set `instruction` of these files' source" in message
    assert "episodes/doctor.py" in message


def test_at_most_ten_bad_files_are_listed(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"bad_{number:02}.h5").write_bytes(b"")
    with pytest.raises(EpisodeError, match="12 of 12") as error:
        from_folder(tmp_path)
    listed = [line for line in str(error.value).splitlines() if "bad_" in line]
    assert [line.split("bad_")[-1][:2] for line in listed] == [f"{number:02}" for number in range(10)]
    assert "and 2 more" in str(error.value)


def test_assumed_instructions_are_one_warning(tmp_path: Path) -> None:
    for number in range(3):
        write_v1(tmp_path, f"{number}_left.h5", instruction=None)
    write_v1(tmp_path, "3_right.h5", instruction=None)
    write_v1(tmp_path, "4.h5")
    with pytest.warns(EpisodeWarning) as caught:
        episodes = from_folder(tmp_path)
    (warning,) = caught
    assert "3 of 5 store no instruction; assuming 'Navigate around" in str(warning.message)
    assert "1 of 5 store no instruction" in str(warning.message)
    assert warning.filename == __file__
    assert [each.side for each in episodes] == ["left", "left", "left", "right", "left"]


def test_the_sources_instruction_is_for_files_that_do_not_say(tmp_path: Path) -> None:
    write_v1(tmp_path, "0_stored.h5", instruction=RIGHT)
    write_v1(tmp_path, "1.h5", instruction=None)
    write_v1(tmp_path, "2_left.h5", instruction=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what the config says is not assumed
        episodes = from_folder(tmp_path, instruction=" Go to the basket ")
    assert [each.instruction for each in episodes] == [RIGHT, "Go to the basket", "Go to the basket"]


def test_a_name_that_contradicts_the_instruction_is_mentioned(tmp_path: Path) -> None:
    write_v1(tmp_path, "weak_right.h5", instruction=LEFT)
    write_v1(tmp_path, "left_and_right.h5", instruction=LEFT)
    with pytest.warns(EpisodeWarning, match=r"1 are told another side than their name says: weak_right\.h5"):
        from_folder(tmp_path)


def test_copies_are_mentioned(tmp_path: Path) -> None:
    path = write_v1(tmp_path, "a.h5")
    (tmp_path / "b.h5").write_bytes(path.read_bytes())
    with pytest.warns(EpisodeWarning, match=r"1 have the same content as another one: b\.h5"):
        from_folder(tmp_path)


@pytest.mark.filterwarnings("ignore::episodes.reader.EpisodeWarning")
def test_schemas_may_not_mix_within_a_source(tmp_path: Path) -> None:
    write_schema(tmp_path, "v1")
    for seed in range(2):
        write_schema(tmp_path, "v6", seed=seed)
    with pytest.raises(ConfigError, match=r"data\.sources\[0\] mixes(.|\n)*1 x v1, 2 x v6") as error:
        from_folder(tmp_path)
    assert "make a source of each" in error.value.hint
    apart = (SourceConfig(files=("*core*",)), SourceConfig(files=("*weak*",), kind="sim"))
    episodes = read_episodes(DataConfig(sources=apart), tmp_path)
    assert [(each.schema, each.kind) for each in episodes] == [("v1", "real"), ("v6", "sim"), ("v6", "sim")]
    named = (SourceConfig(files=("*.h5",), schema="v1"),)
    assert {each.schema for each in read_episodes(DataConfig(sources=named), tmp_path)} == {"v1"}


def test_frame_rates_must_agree(tmp_path: Path) -> None:
    for number, fps in enumerate((6.0, 6.3, 6.5)):
        write_v1(tmp_path, f"{number}.h5", fps=fps)
    assert len(from_folder(tmp_path)) == 3
    assert len(from_folder(tmp_path, fps=6.0)) == 3
    write_v1(tmp_path, "3.h5", fps=30.0)
    with pytest.raises(ConfigError, match=r"different frame rates(.|\n)*30 fps: 1(.|\n)*farthest: 3\.h5"):
        from_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"do not have 6 fps(.|\n)*within 10 % of 6 fps"):
        from_folder(tmp_path, fps=6.0)


def test_files_that_tell_no_rate_agree_with_any(tmp_path: Path) -> None:
    write_v1(tmp_path, "0.h5")
    path = write_v1(tmp_path, "1.h5")
    with h5py.File(path, "r+") as file:
        del file.attrs["total_duration"]
    assert [each.fps for each in from_folder(tmp_path, fps=6.0)] == [6.0, None]


def test_hashes_are_remembered_and_progress_told(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_v1(tmp_path / "data", "0.h5")
    write_v1(tmp_path / "data", "1.h5", length=7)
    seen: list[tuple[int, int]] = []
    data = DataConfig(sources=(SourceConfig(files=("data",)),))
    read_episodes(data, tmp_path, lambda *done: seen.append(done), cache=tmp_path / "cache")
    assert seen == [(1, 2), (2, 2)]
    assert (tmp_path / "cache" / "file-hashes.json").exists()


def test_no_image_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_v1(tmp_path, "a.h5")
    monkeypatch.setattr(FrameSource, "_stored", lambda *_: pytest.fail("a frame was read"))
    assert len(from_folder(tmp_path)) == 1


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("the basket on the LEFT", {"left"}),
        ("first left, then right", {"left", "right"}),
        ("the leftover", set()),
        ("왼쪽으로", {"left"}),
        ("우측 병", {"right"}),
    ],
)
def test_sides_in_a_text(text: str, sides: set[str]) -> None:
    assert sides_in_text(text) == sides


@pytest.mark.parametrize(
    ("names", "actions", "side"),
    [
        (("linear_x", "linear_y"), [[1, 0.5], [1, -0.1]], "left"),
        (("linear_x", "linear_y"), [[1, -0.5], [1, 0.1]], "right"),
        (("linear_x", "linear_y"), [[1, 0], [1, 0]], "none"),
        (("linear_x", "angular_z"), [[1, 0.5], [1, 0.1]], "left"),
        (("linear_x",), [[1], [1]], "none"),
    ],
)
def test_actions_tell_the_side_where_words_do_not(
    names: tuple[str, ...], actions: list[list[float]], side: str
) -> None:
    values = np.array(actions, np.float32)
    assert episode("a.h5", instruction="go", actions=values, names=names).side == side
    assert episode("a.h5", instruction="pass left and right", actions=values, names=names).side == side
    assert episode("a.h5", instruction=LEFT, actions=values, names=names).side == "left"


def test_an_optional_axis_counts_as_zero_where_it_is_missing(tmp_path: Path) -> None:
    write_v1(tmp_path, "b.h5", length=3)
    path = write_v1(tmp_path, "a.h5", length=3)
    edit(path, "actions", np.ones((3, 2), np.float32))
    axes = ("linear_x", "linear_y", "angular_z")
    data = DataConfig(sources=(SourceConfig(files=("*.h5",)),), actions=axes)
    planar, turning = read_episodes(data, tmp_path, optional=("angular_z",))
    assert_allclose(planar.actions, [[1, 1, 0]] * 3)
    assert_allclose(turning.actions[:, 2], [0, 0.001, 0.002], rtol=1e-6)


def test_words_are_kept_without_the_text_around_them(tmp_path: Path) -> None:
    write_v1(tmp_path, "a.h5", instruction=f"<grounding>{LEFT}")
    source = SourceConfig(files=("*.h5",))
    (whole,) = read_episodes(DataConfig(sources=(source,), prompt_template="<grounding>{instruction}"), tmp_path)
    assert whole.instruction == LEFT
    with pytest.raises(EpisodeError, match="already carries a part of a prompt") as error:
        read_episodes(DataConfig(sources=(source,)), tmp_path)
    assert "data.prompt_template" in error.value.hint


def test_a_policy_without_words_needs_none(tmp_path: Path) -> None:
    write_v1(tmp_path, "a.h5", instruction=None)
    data = DataConfig(sources=(SourceConfig(files=("*.h5",)),), prompt_template="<grounding>")
    (silent,) = read_episodes(data, tmp_path)
    assert silent.instruction == ""


def test_filters_by_length_and_movement_leave_episodes_out_and_say_so(tmp_path: Path) -> None:
    straight = np.tile(np.array([1.0, 0.0, 0.0], np.float32), (12, 1))
    curved = straight.copy()
    curved[3, 1] = 0.5
    for name, actions in (("straight", straight), ("curved", curved), ("short", curved[:5])):
        frames = (np.full((HEIGHT, WIDTH, 3), index, np.uint8) for index in range(len(actions)))
        write_episode(tmp_path / f"{name}_left.h5", frames, actions, instruction=LEFT, fps=6.0)
    source = SourceConfig(files=("*.h5",), curved=True, least_frames=10)
    with pytest.warns(EpisodeWarning, match="2 more are left out"):
        kept = read_episodes(DataConfig(sources=(source,)), tmp_path)
    assert [each.stem for each in kept] == ["curved_left"]

    with pytest.raises(ConfigError, match="leave no episode"):
        read_episodes(DataConfig(sources=(SourceConfig(files=("*.h5",), least_frames=13),)), tmp_path)


def test_filters_by_name_leave_files_unopened(tmp_path: Path) -> None:
    (tmp_path / "broken_straight.h5").write_bytes(b"no episode")
    write_v1(tmp_path, "good_left.h5")
    source = SourceConfig(files=("*.h5",), exclude=("straight",))
    assert [each.stem for each in read_episodes(DataConfig(sources=(source,)), tmp_path)] == ["good_left"]
    with pytest.raises(ConfigError, match="leaves out every file"):
        read_episodes(DataConfig(sources=(SourceConfig(files=("*.h5",), exclude=("left", "straight")),)), tmp_path)


def test_sentences_of_a_source_replace_what_its_files_say(tmp_path: Path) -> None:
    write_v1(tmp_path, "a_target_left_right_path.h5", length=3, instruction=LEFT)
    write_v1(tmp_path, "b.h5", length=3, instruction=RIGHT)
    words = {"right": ("Go right", "<grounding>An image of a robot Head right"), "left": ("Go left",)}
    data = DataConfig(sources=(SourceConfig(files=(str(tmp_path),), words=words),))

    right, plain = read_episodes(data, tmp_path)
    assert (right.instruction, right.words) == ("Go right", ("Go right", "Head right"))  # without the text around it
    assert (plain.instruction, plain.words) == (RIGHT, ())

    data = DataConfig(sources=data.sources, prompt_template="<grounding>")
    assert [(each.instruction, each.words) for each in read_episodes(data, tmp_path)] == [("", ()), ("", ())]


def test_a_file_without_words_needs_none_of_its_own_where_the_source_has_them(tmp_path: Path) -> None:
    write_v1(tmp_path, "a.h5", length=3, instruction=None)
    with pytest.raises(EpisodeError, match="has no instruction"):
        from_folder(tmp_path)
    source = SourceConfig(files=(str(tmp_path),), words={"other": ("Go",)})
    (silent,) = read_episodes(DataConfig(sources=(source,)), tmp_path)
    assert silent.instruction == "Go"


def test_a_file_that_hangs_the_library_is_one_of_those_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_contact, "CPU_S", 1.0)
    write_v1(tmp_path, "good.h5", length=3)
    hanging = write_hanging(tmp_path, where="observations/images")
    with pytest.raises(EpisodeError) as caught:
        from_folder(tmp_path)
    assert "1 of 2" in str(caught.value)
    assert f"{hanging} is damaged: reading it does not end" in str(caught.value)
