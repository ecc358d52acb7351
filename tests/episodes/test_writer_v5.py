"""What write_episode_v5 writes is V5 and is read back; what it cannot write leaves no file."""

from __future__ import annotations

import numpy as np
import pytest

from bundle.errors import EpisodeError, FrameError
from episodes.reader import open_episode
from episodes.writer_v5 import encode_jpeg, write_episode_v5

STEPS = np.arange(9, dtype=np.float32).reshape(3, 3)


@pytest.mark.parametrize("quality", [None, 95])
def test_round_trip(tmp_path, noise, quality):
    path = write_episode_v5(
        tmp_path / "e.h5",
        iter(noise),
        STEPS,
        instruction="go",
        timestamps=np.array([0.0, 0.25, 0.5]),
        jpeg_quality=quality,
        event_types=("a", "b", "c"),
        action_classes=np.array([1, 2, 3]),
        attributes={"place": "lab", "tries": 2},
    )
    with open_episode(path) as episode:
        assert episode.schema == "v5"
        np.testing.assert_array_equal(episode.actions, STEPS)
        assert (episode.instruction, episode.fps, episode.event_types) == ("go", 4.0, ("a", "b", "c"))
        assert episode.action_classes.tolist() == [1, 2, 3]
        assert episode.attributes == {"place": "lab", "tries": 2}
        assert (episode.jpeg(0) is None) == (quality is None)
        if quality is None:
            np.testing.assert_array_equal(np.stack(list(episode.frames())), noise)
        else:
            assert episode.jpeg(2) == encode_jpeg(noise[2], quality)


@pytest.mark.parametrize("quality", [None, 95])
@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_frames(tmp_path, noise, quality, count):
    frames = [noise[0]] * count
    with pytest.raises(EpisodeError, match="frames and actions differ in number"):
        write_episode_v5(tmp_path / "e.h5", frames, STEPS, instruction=None, timestamps=None, jpeg_quality=quality)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quality", [None, 95])
@pytest.mark.parametrize(
    "bad", [np.zeros((4, 5, 3), np.uint8), np.zeros((24, 32), np.uint8), np.zeros((24, 32, 3)), None]
)
def test_a_frame_that_does_not_fit(tmp_path, noise, quality, bad):
    with pytest.raises(FrameError, match="frame 1 is not an image of this episode"):
        write_episode_v5(
            tmp_path / "e.h5", [noise[0], bad, noise[2]], STEPS, instruction=None, timestamps=None, jpeg_quality=quality
        )
    assert list(tmp_path.iterdir()) == []
