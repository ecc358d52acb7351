"""What a RoboVLMs config says about its data: which files, on which scale, seen how.

Knows the loaders of RoboVLMs and its 2-DoF fork: their columns, clipping, filters, augmentation and split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from episodes.reader import CAMERAS
from episodes.resize import ResizeFilter
from train.config import PolicySpec
from train.robovlms_classes import NAV, V5_KEYS, letterboxed, loader_of
from train.robovlms_heads import ClassSettings
from train.robovlms_keys import LabConfig
from train.robovlms_prompt import override_words

_AXES = ("linear_x", "linear_y", "angular_z")
_PIXEL_NORMS = {
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "none": ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
}
_NAV_LEAST = 10  # frames of an episode that NavDataset reads
_TRAINS, _NAV_TRAINS = 0.8, 0.9  # share of the files where the config says none, of the fork's loader and of NavDataset
_CROP = 0.1  # the fork draws areas of 80 to 100 %, which are sides of about 90 to 100 %
_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.3, "hue": 0.1}
_NAV_JITTER = _JITTER | {"saturation": 0.4}


def is_h5(lab: LabConfig) -> bool:
    """Whether the fork's loader of H5 episodes was to read the data."""
    kinds = [str(lab.get(f"{path}.type")) for path in lab.datasets("train_dataset")]
    return any(kind == NAV or kind.startswith("MobileVLA") for kind in kinds)


def _is_nav(lab: LabConfig, path: str) -> bool:
    """Whether the lab's NavDataset reads a dataset."""
    return loader_of(lab.dataset(path)) == NAV


def _any_nav(lab: LabConfig) -> bool:
    """Whether it reads any of them."""
    return any(_is_nav(lab, path) for path in lab.datasets("train_dataset"))


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
        "resize": lab.get("jetvla.resize", _resize(lab, spec)),
        "pixel_norm": _pixel_norm(lab, fork=fork),
        **words,
    }
    if not data["sources"]:
        raise lab.unusable("train_dataset", expected="an object with data_dir, the folder of the H5 episodes")
    if (fps := lab.get("jetvla.fps")) is not None:
        data["fps"] = fps
    _note_datasets(lab, data, fork=fork)
    return data


def augment_settings(lab: LabConfig, actions: Sequence[str]) -> dict[str, Any]:
    """The section `augment`.

    Args:
        actions: the columns that are learned.
    """
    paths = lab.datasets("train_dataset")

    def most(key: str) -> float:
        return max([lab.get(f"{path}.{key}", 0) for path in paths], default=0)

    nav = _any_nav(lab)
    augment: dict[str, Any] = {}
    if most("augment"):
        augment["mirror"] = 0.5
    if most("use_color_jitter"):
        augment |= _NAV_JITTER if nav else _JITTER
    if most("use_random_crop"):
        augment["crop"] = _CROP
        sides = "4 : 3" if nav else "1.1 : 1"
        lab.assume(
            f"use_random_crop: up to a tenth of the sides is cut off at random; the loader allows no crop wider than {sides}, so that of "
            "16 : 9 pictures it always takes the middle, which the robot then does not see so (augment.crop)"
        )
    if len(augment.keys() - {"mirror"}) > 0:
        lab.assume("colours and crop are drawn once for an episode in an epoch, not for each frame")
    if most("counterfactual_stop_prob") > 0:
        augment["stop"] = most("counterfactual_stop_prob")
        lab.assume(
            "counterfactual_stop_prob: the sentences that stop the robot are augment.stop_words; the loader has its own"
        )
    if most("counterfactual_steer_prob") > 0:
        augment["steer"] = most("counterfactual_steer_prob")
        lab.assume(
            "counterfactual_steer_prob: the sentences are augment.slide_words and augment.turn_words, and a turn to the left is one to the "
            "left; the loader has its own sentences, and exchanges the turns"
        )
        if "angular_z" not in actions:
            augment["turn_words"] = ()
            lab.assume("counterfactual_steer_prob: nothing is told to turn, since turns are not learned")
    return augment


def _resize(lab: LabConfig, spec: PolicySpec) -> ResizeFilter:
    paths = lab.datasets("train_dataset")
    modes = {lab.get(f"{path}.resize_mode", "direct") for path in paths}
    if len(modes) > 1 or not modes <= {"direct", "letterbox"}:
        raise lab.unusable("train_dataset", expected="one resize_mode, direct or letterbox")
    kept = {letterboxed(lab.dataset(path)) for path in paths}
    if len(kept) > 1:
        raise lab.unusable("train_dataset", expected="the same use_random_crop in all, where they are letterboxed")
    if modes == {"letterbox"} and kept == {False}:
        because = (
            "the lab's loader leaves it out where use_random_crop crops" if _any_nav(lab) else f"{NAV} alone reads it"
        )
        lab.assume(f"without effect: resize_mode letterbox; {because}")
    if kept == {True} and any(lab.get(f"{path}.use_color_jitter", False) for path in paths):
        lab.assume(
            "resize_mode letterbox: colours change after it, those of its bars as well; in the loader bars stay black"
        )
    return spec.resize


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
    keys = ("type", "instruction_preset", "instruction_override", *V5_KEYS)
    words = override_words({key: lab.get(f"{path}.{key}") for key in keys if lab.has(f"{path}.{key}")})
    if words:
        source["words"] = words
        lab.assume(
            f"{path}.instruction_override: an episode is told one of its sentences in an epoch; the loader draws for each window"
        )
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
    if _any_nav(lab):
        return "clip"  # whatever image_mean and image_std say
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
        drawn = "leaves out those with a chunk beyond the end" if _any_nav(lab) else "draws fewer at random"
        lab.assume(
            "the split is drawn by episode, left and right alike; the fork's is by sorted file name (data.split)"
        )
        lab.assume(f"an epoch is every window once; the loader {drawn}: T - W - n + 1 for an episode of T frames")
        if not _any_nav(lab):
            lab.assume(
                "a file without a sentence is told the one for the side in its name; since February 2026 the fork's loader draws one of "
                "five there (data.sources.words)"
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
