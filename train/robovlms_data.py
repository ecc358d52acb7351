"""What a RoboVLMs config says about its data: which files, on which scale, seen how.

Knows the loaders of RoboVLMs and its 2-DoF fork: their columns, clipping, filters, augmentation and split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from episodes.reader import CAMERAS
from train.config import PolicySpec
from train.robovlms_classes import NAV, letterboxed, loader_of
from train.robovlms_heads import ClassSettings
from train.robovlms_keys import LabConfig

_AXES = ("linear_x", "linear_y", "angular_z")
_PIXEL_NORMS = {
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "none": ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
}
_NAV_LEAST = 10  # frames of an episode that NavDataset reads
_TRAINS, _NAV_TRAINS = 0.8, 0.9  # share of the files where the config says none, of the fork's loader and of NavDataset
_SATURATION, _NAV_SATURATION = 0.3, 0.4
_CROP = 0.1  # the fork draws areas of 80 to 100 %, which are sides of about 90 to 100 %


def is_h5(lab: LabConfig) -> bool:
    """Whether the fork's loader of H5 episodes was to read the data."""
    kinds = [str(lab.get(f"{path}.type")) for path in lab.datasets("train_dataset")]
    return any(kind == NAV or kind.startswith("MobileVLA") for kind in kinds)


def _is_nav(lab: LabConfig, path: str) -> bool:
    """Whether the lab's NavDataset reads a dataset."""
    return loader_of(lab.dataset(path)) == NAV


def data_settings(lab: LabConfig, spec: PolicySpec, words: dict[str, Any], classes: ClassSettings) -> dict[str, Any]:
    """The section `data`.

    Args:
        words: the settings of prompts.
        classes: of a class head.

    Raises:
        ConfigError: no dataset, no folder, or normalisation of pixels that no policy was trained with.
    """
    fork = is_h5(lab)
    data: dict[str, Any] = {
        "actions": classes.axes or tuple(lab.get("jetvla.action_names", _axes(spec, lab))),
        "sources": [_source(lab, path) for path in lab.datasets("train_dataset")],
        "cameras": CAMERAS if lab.get("use_hand_rgb", False) else ("static",),
        "window": spec.window,
        "chunk": spec.chunk,
        "action_range": _action_range(lab, spec, fork=fork),
        "resize": lab.get("jetvla.resize", "letterbox" if _letterboxed(lab) else "bilinear" if fork else "bicubic"),
        "pixel_norm": _pixel_norm(lab, fork=fork),
        **words,
    }
    if not data["sources"]:
        raise lab.unusable("train_dataset", expected="an object with data_dir, the folder of the H5 episodes")
    if (fps := lab.get("jetvla.fps")) is not None:
        data["fps"] = fps
    _note_datasets(lab, data, fork=fork)
    return data


def augment_settings(lab: LabConfig) -> dict[str, Any]:
    """The section `augment`."""

    def asked(key: str) -> bool:
        found = [lab.get(f"{path}.{key}", False) for path in lab.datasets("train_dataset")]
        return any(found)

    augment: dict[str, Any] = {}
    if asked("augment"):
        augment["mirror"] = 0.5
    if asked("use_color_jitter"):
        nav = any(_is_nav(lab, path) for path in lab.datasets("train_dataset"))
        saturation = _NAV_SATURATION if nav else _SATURATION
        augment |= {"brightness": 0.4, "contrast": 0.4, "saturation": saturation, "hue": 0.1}
    if asked("use_random_crop"):
        augment["crop"] = _CROP
    stops = [lab.get(f"{path}.counterfactual_stop_prob", 0.0) for path in lab.datasets("train_dataset")]
    if len(augment.keys() - {"mirror"}) > 0:
        lab.assume("colours and crop are drawn once for an episode in an epoch, not for each frame")
    if max(stops, default=0.0) > 0:
        augment["stop"] = max(stops)
        lab.assume(
            "counterfactual_stop_prob: the sentences that stop the robot are augment.stop_words; the loader has its own"
        )
    return augment


def _letterboxed(lab: LabConfig) -> bool:
    modes = {lab.get(f"{path}.resize_mode", "direct") for path in lab.datasets("train_dataset")}
    if len(modes) > 1 or not modes <= {"direct", "letterbox"}:
        raise lab.unusable("train_dataset", expected="one resize_mode, direct or letterbox")
    kept = {letterboxed(lab.dataset(path)) for path in lab.datasets("train_dataset")}
    if len(kept) > 1:
        raise lab.unusable("train_dataset", expected="the same use_random_crop in all, where they are letterboxed")
    if modes == {"letterbox"} and kept == {False}:
        lab.assume(
            "without effect: resize_mode letterbox; "
            + (
                "the lab's loader leaves it out where use_random_crop crops"
                if any(_is_nav(lab, path) for path in lab.datasets("train_dataset"))
                else f"{NAV} alone reads it"
            )
        )
    return kept == {True}


def box_annotations(lab: LabConfig) -> Path | None:
    """The file of box annotations that an auxiliary loss would learn from; None where it is off, or the file is not there.

    Without the file the loader has no boxes, and the loss is nothing.
    """
    for path in lab.datasets("train_dataset"):
        asked = lab.get(f"{path}.grounding_aux") or {}
        lab.get("grounding_aux")
        if not asked.get("enabled", False):
            continue
        beside = Path(str(lab.get(f"{path}.data_dir", ""))).parent.parent / "docs" / "v5" / "bbox_truth_mini.json"
        truth = Path(str(asked.get("truth_path", beside)))
        if truth.exists():
            return truth
        lab.assume(f"grounding_aux has no effect: its annotations, {truth}, are not there")
    return None


def _axes(spec: PolicySpec, lab: LabConfig) -> tuple[str, ...]:
    """The recorded columns that the head learns: the fork's loader takes the first two, unless the head has more velocities."""
    lab.get("act_head.action_dim")
    if spec.head.kind != "velocities":
        return _AXES[:2]
    if spec.head.outputs > len(_AXES):
        raise lab.unusable("act_head.action_dim", expected=f"at most {len(_AXES)} velocities: {', '.join(_AXES)}")
    return _AXES[: spec.head.outputs]


def _source(lab: LabConfig, path: str) -> dict[str, Any]:
    """One dataset as a source: its files, and which of them."""
    source: dict[str, Any] = {"files": [_files(lab, path)]}
    least = lab.get(f"{path}.min_episode_frames", _NAV_LEAST if _is_nav(lab, path) else 0)
    filters = {
        "exclude": tuple(lab.get(f"{path}.exclude_path_types", ())),
        "families": tuple(lab.get(f"{path}.include_path_families", ())),
        "least_frames": least,
        "curved": lab.get(f"{path}.curvature_only", False),
        "path_shares": lab.get(f"{path}.path_type_weights", {}),
        "family_shares": lab.get(f"{path}.path_family_weights", {}),
    }
    if filters["path_shares"] and filters["family_shares"]:
        filters["path_shares"] = {}
        lab.assume(f"{path}.path_type_weights has no effect beside path_family_weights")
    if filters["path_shares"] or filters["family_shares"]:
        lab.assume(
            f"{path}: shares are of the training part, drawn after the split; the loader draws before it, so that an episode may be in both"
        )
    return source | {key: value for key, value in filters.items() if value}


def _files(lab: LabConfig, path: str) -> str:
    mixed = lab.get(f"{path}.data_root_dir") if lab.get(f"{path}.data_dir") is None else None
    folder = str(mixed or lab.require(f"{path}.data_dir")).rstrip("/")
    kind = lab.get(f"{path}.type", "no type")
    if not is_h5(lab):
        lab.assume(f"{path}.type {kind} is not read; H5 episodes are looked for in {folder}")
    return f"{folder}/{lab.get(f'{path}.episode_pattern', 'episode_*.h5')}"


def _action_range(lab: LabConfig, spec: PolicySpec, *, fork: bool) -> tuple[float, float] | Literal["auto"]:
    lab.get("norm_action"), lab.get("norm_min"), lab.get("norm_max")
    if spec.head.kind == "classes":
        return "auto"
    ours = lab.get("jetvla.action_minimum"), lab.get("jetvla.action_maximum")
    if ours[0] is not None and ours[1] is not None:
        return ours
    if not spec.normalized:
        lab.assume("norm_action is not set: actions are clipped to [-1, 1], as the fork's loader does")
        return -1.0, 1.0
    if fork and (spec.minimum, spec.maximum) != (-1.0, 1.0):
        lab.assume("the fork's loader clips to [-1, 1] whatever norm_min and norm_max say; this run scales from them")
    return spec.minimum, spec.maximum


def _pixel_norm(lab: LabConfig, *, fork: bool) -> str:
    mean, std = lab.get("image_mean"), lab.get("image_std")
    ours: str | None = lab.get("jetvla.pixel_norm")
    if ours is not None:
        return ours
    if fork:
        lab.assume(
            "pixels: before February 2026 the fork's loader subtracted no mean whatever image_mean says (data.pixel_norm)"
        )
    for name, (known_mean, known_std) in _PIXEL_NORMS.items():
        if (mean or _PIXEL_NORMS["clip"][0]) == known_mean and (std or _PIXEL_NORMS["clip"][1]) == known_std:
            return name
    raise lab.unusable("image_mean" if mean is not None else "image_std", expected="CLIP's mean and std, or 0 and 1")


def _note_datasets(lab: LabConfig, data: dict[str, Any], *, fork: bool) -> None:
    """The share that validates, and where the fork's loader does what ours does not."""
    paths = lab.datasets("train_dataset")
    shares = {lab.get(f"{path}.train_split", _NAV_TRAINS if _is_nav(lab, path) else _TRAINS) for path in paths}
    data["val_share"] = round(1 - max(shares), 6)
    if fork:
        lab.assume(
            "the split is drawn by episode, left and right alike; the fork's is by sorted file name (data.split)"
        )
        lab.assume(
            "an epoch is every window once; the fork draws fewer at random: T - W - n + 1 for an episode of T frames"
        )
    for path in paths:
        for key in ("window_size", "fwd_pred_next_n"):
            if (inner := lab.get(f"{path}.{key}", lab.get(key))) != lab.get(key):
                lab.assume(f"{path}.{key} {inner} differs from {key} {lab.get(key)}, which counts")
        preset = lab.get(f"{path}.instruction_preset")
        if preset is not None and not _is_nav(lab, path):
            lab.assume(
                f"{path}.instruction_preset {preset}: the loader draws sentences that stand in its code; here the words are those of "
                "the files"
            )
        if lab.get(f"{path}.stratified_split", False):
            lab.assume("stratified_split is what every split is here: left and right are split alike")
        lab.get(f"{path}.grounding_prefix")
    trained = {_pattern(lab, path) for path in paths}
    others = sorted({_pattern(lab, path) for path in lab.datasets("val_dataset")} - trained)
    if others:
        lab.assume(
            f"val_dataset names other files, which are not read: {', '.join(others)}; a share of train_dataset validates"
        )


def _pattern(lab: LabConfig, path: str) -> str:
    for key in ("type", "is_validation", "train_split"):
        lab.get(f"{path}.{key}")
    return f"{lab.get(f'{path}.data_dir', '')}/{lab.get(f'{path}.episode_pattern', 'episode_*.h5')}"
