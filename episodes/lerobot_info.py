"""Reads meta/info.json of a LeRobot v3 dataset: rate, cameras, axes, and where its files are.

The file comes from other programs and other people: everything in it is checked, and its path templates cannot lead out of the folder.
Needs no pyarrow. Knows nothing about tables and videos.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bundle.errors import EpisodeError
from bundle.reading_limits import is_there, read_json

INFO = "meta/info.json"
TASKS = "meta/tasks.parquet"
ACTION = "action"
COPY_AGAIN = "copy the whole dataset again; if it is like this at its source too, export it again or leave it out."
_FPS = (0.1, 240.0)
_MOST_EPISODES = 1_000_000
_HAND = re.compile(r"(?i)hand|wrist|gripper")
# Other names under which robots record the three velocities, in the same units; all else keeps its name.
_AXES = {
    "linear_x": "linear_x",
    "vx": "linear_x",
    "x_vel": "linear_x",
    "linear_y": "linear_y",
    "vy": "linear_y",
    "y_vel": "linear_y",
    "angular_z": "angular_z",
    "wz": "angular_z",
}


@dataclass(frozen=True)
class Camera:
    """A feature that holds images: its name, and whether they are in a video or in the tables."""

    name: str
    is_video: bool


@dataclass(frozen=True)
class Info:
    """What a dataset says about itself.

    Attributes:
        folder: of the dataset.
        episodes: how many there are.
        fps: frames per second.
        action_names: of the columns of `action`; velocities under the names of episodes/actions.py.
        cameras: depth maps are left out.
        data_path, video_path: templates, relative to the folder.
    """

    folder: Path
    episodes: int
    fps: float
    action_names: tuple[str, ...]
    cameras: tuple[Camera, ...]
    data_path: str
    video_path: str | None

    def camera(self, name: str | None) -> Camera:
        """The camera of that name, or the only one that is not a hand's.

        Raises:
            EpisodeError: there is none of that name, or several where none was named.
        """
        hand = self.hand() if name is None else None
        chosen = [camera for camera in self.cameras if name in (None, camera.name) and camera != hand]
        if len(chosen) == 1:
            return chosen[0]
        names = ", ".join(camera.name for camera in self.cameras) or "none"
        raise EpisodeError(
            f"{self.folder} has {len(self.cameras)} cameras"
            if name is None
            else f"{self.folder} has no camera {name!r}",
            got=names,
            expected="one camera, or the name of one" if name is None else "a camera of the dataset",
            hint=f"pass camera={self.cameras[0].name!r}; training wants one camera, or a second one named hand, wrist or gripper."
            if self.cameras
            else "a policy needs images: leave this dataset out.",
        )

    def hand(self) -> Camera | None:
        """The second of two cameras, where its name says that it is at the hand and that of the other does not."""
        hands = [camera for camera in self.cameras if _HAND.search(camera.name)]
        return hands[0] if len(self.cameras) == 2 and len(hands) == 1 else None

    def data_file(self, chunk: int, file: int) -> Path:
        """The table of `chunk` and `file`."""
        return self._file(self.data_path, chunk_index=chunk, file_index=file)

    def video_file(self, camera: str, chunk: int, file: int) -> Path:
        """The video of `camera`, `chunk` and `file`."""
        return self._file(self.video_path or "", video_key=camera, chunk_index=chunk, file_index=file)

    def _file(self, template: str, **values: object) -> Path:
        try:
            relative = PurePosixPath(template.format(**values))
        except (LookupError, ValueError, AttributeError, TypeError):
            relative = PurePosixPath("..")
        if relative.is_absolute() or ".." in relative.parts or not relative.name:
            raise _damaged(self.folder, f"path template {template!r}", "a path below the dataset's folder")
        return self.folder / relative


def read_info(folder: Path) -> Info:
    """Read and check meta/info.json.

    Raises:
        EpisodeError: it is missing or damaged, or the dataset is not of version 3.
    """
    content = _load(folder)
    _check_version(folder, content.get("codebase_version"))
    fps, episodes = content.get("fps"), content.get("total_episodes")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not _FPS[0] <= fps <= _FPS[1]:
        raise _damaged(folder, f"fps = {fps!r}", f"frames per second, {_FPS[0]:g} to {_FPS[1]:g}")
    if isinstance(episodes, bool) or not isinstance(episodes, int) or not 0 <= episodes <= _MOST_EPISODES:
        raise _damaged(folder, f"total_episodes = {episodes!r}", "how many episodes there are")
    features = content.get("features")
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise _damaged(folder, "no table of features", "features with dtype, shape and names")
    data_path, video_path = content.get("data_path"), content.get("video_path")
    if not isinstance(data_path, str) or not isinstance(video_path, (str, type(None))):
        raise _damaged(folder, f"data_path = {data_path!r}, video_path = {video_path!r}", "path templates")
    return Info(
        folder=folder,
        episodes=episodes,
        fps=float(fps),
        action_names=_action_names(folder, features.get(ACTION)),
        cameras=tuple(
            Camera(name, feature["dtype"] == "video")
            for name, feature in features.items()
            if feature.get("dtype") in ("image", "video") and not _is_depth(feature)
        ),
        data_path=data_path,
        video_path=video_path,
    )


def _load(folder: Path) -> dict[str, object]:
    path = folder / INFO
    if not is_there(path):
        raise EpisodeError(
            f"{folder} is not a LeRobot dataset",
            got=f"no {INFO}",
            expected="the folder of a LeRobot v3 dataset",
            hint="pass the folder that holds meta, data and maybe videos.",
        )
    try:
        content = read_json(path, error=EpisodeError)
    except EpisodeError as error:
        raise _damaged(folder, f"{error.what.removeprefix(str(path))} ({error.got})".strip(), "JSON") from error
    if not isinstance(content, dict):
        raise _damaged(folder, type(content).__name__, "a JSON object")
    return content


def _check_version(folder: Path, version: object) -> None:
    if isinstance(version, str) and version.startswith("v3."):
        return
    older = isinstance(version, str) and version.startswith(("v1.", "v2."))
    raise EpisodeError(
        f"{folder} is a LeRobot dataset of another version",
        got=version,
        expected="v3.0",
        hint=_converting(folder)
        if older
        else "this version of jetvla reads v3 only; export it with a lerobot that writes v3.",
    )


def _action_names(folder: Path, feature: object) -> tuple[str, ...]:
    if not isinstance(feature, dict):
        raise _damaged(folder, "no feature `action`", "the commanded velocities")
    names, shape = feature.get("names"), feature.get("shape")
    if isinstance(names, Mapping) and len(names) == 1:
        names = next(iter(names.values()))  # {"axes": [...]}
    width = shape[0] if isinstance(shape, list) and len(shape) == 1 else None
    texts = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if not isinstance(names, list) or not len(names) == len(texts) == width:
        raise EpisodeError(
            f"{folder} does not name the columns of `action`",
            got=f"shape {shape}, names {names}",
            expected='one name for each column, for example ["linear_x", "linear_y", "angular_z"]',
            hint=f"write features.action.names into {INFO}; which column is which cannot be guessed.",
        )
    known = tuple(_AXES.get(name.lower().replace(".", "_").replace(" ", "_"), name) for name in texts)
    if len(set(known)) != len(known):
        raise _damaged(folder, f"action names {', '.join(texts)}", "different names")
    return known


def _is_depth(feature: Mapping[str, object]) -> bool:
    details = feature.get("info")
    return isinstance(details, dict) and bool(details.get("is_depth_map") or details.get("video.is_depth_map"))


def _damaged(folder: Path, got: object, expected: str) -> EpisodeError:
    return EpisodeError(f"{folder / INFO} is damaged", got=got, expected=expected, hint=COPY_AGAIN)


def _converting(folder: Path) -> str:
    """LeRobot's own command for a folder on this disk; without the last option it would rewrite a dataset of that name on the Hub."""
    place = folder.absolute()
    return (
        "convert it with lerobot's own script, which replaces the folder and keeps the old one beside it: python -m "
        "lerobot.datasets.v30.convert_dataset_v21_to_v30 "
        f"--root {shlex.quote(str(place.parent))} --repo-id {shlex.quote(place.name)} --push-to-hub false"
    )
