"""In which order a lab's run numbered its classes: what its loader's code says, where it says one thing.

Facts about the public loaders. The fork's MobileVLAH5Dataset knows nine directions. NavDataset of the lab began with the same nine (and
six, without those backwards), and from V5 on knows eight, with turns in place; six then are the eight with diagonals and turns labelled
as sideways motions. A config does not tell which code read it, but V5 brought keys that the earlier code did not have. Where a head is of
another size than its loader's labels, nobody can tell what the outputs mean, so the order must be stated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from episodes.resize import ResizeFilter
from train.action_classes import ORDERS

NAV, FORK = "NavDataset", "MobileVLAH5Dataset"
# Read by NavDataset since its V5 alone.
V5_KEYS = (
    "grounding_prefix", "stratified_split", "exclude_path_types", "include_path_families", "path_type_weights",
    "path_family_weights", "resize_mode", "counterfactual_steer_prob", "use_bbox_target", "grounding_aux",
)  # fmt: skip
_FOLDED = {"FL": "L", "FR": "R", "TurnL": "L", "TurnR": "R"}


@dataclass(frozen=True)
class ClassOrder:
    """What a config says of its classes.

    Attributes:
        names: in order; empty where they must be stated.
        source: where the order is from, or why there is none.
        relabel: see train.action_classes.ClassTable.
    """

    names: tuple[str, ...]
    source: str
    relabel: dict[str, str] = field(default_factory=dict)


def dataset_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first training dataset of a RoboVLMs config; empty where it has none."""
    found = config.get("train_dataset")
    first = found[0] if isinstance(found, list) and found else found
    return first if isinstance(first, Mapping) else {}


def reads_hdf5(dataset: Mapping[str, Any]) -> bool:
    """Whether the loader is one of the two for HDF5 episodes."""
    return dataset.get("type") in (NAV, FORK)


def loader_of(dataset: Mapping[str, Any]) -> str | None:
    """Whose code reads a dataset: its type, but the lab's package puts its NavDataset in the place of the fork's loader, too.

    Keys that the fork's loader does not have then tell which of the two it was.
    """
    kind = dataset.get("type")
    return NAV if kind == FORK and any(key in dataset for key in V5_KEYS) else kind


def letterboxed(dataset: Mapping[str, Any]) -> bool:
    """Whether a dataset's frames keep their sides' ratio. Where it crops at random, the lab's loader leaves that out."""
    asked = loader_of(dataset) == NAV and dataset.get("resize_mode") == "letterbox"
    return asked and not dataset.get("use_random_crop", False)


def lab_resize(config: Mapping[str, Any]) -> ResizeFilter:
    """How the loader that a RoboVLMs config names brings frames to the model's size."""
    dataset = dataset_of(config)
    if letterboxed(dataset):
        return "letterbox"
    return "bilinear" if reads_hdf5(dataset) else "bicubic"


def is_v5(dataset: Mapping[str, Any]) -> bool:
    """Whether a NavDataset was read by the lab's loader of V5 or later."""
    return loader_of(dataset) == NAV and any(key in dataset for key in V5_KEYS)


def class_order(config: Mapping[str, Any], count: int) -> ClassOrder:
    """The order of `count` classes that a RoboVLMs config means."""
    dataset = dataset_of(config)
    kind, labelled = loader_of(dataset), dataset.get("num_classes", 9)
    if kind == NAV and is_v5(dataset):
        expected, loader = (6 if labelled == 6 else 8), f"{NAV} of V5"
    elif kind == NAV:
        expected, loader = (6 if labelled == 6 else 9), f"{NAV} before V5"
    elif kind == FORK:
        expected, loader = 9, f"the fork's {FORK}"
    elif count in ORDERS:
        return ClassOrder(ORDERS[count], f"assumed: the lab's order of {count}")
    else:
        return ClassOrder((), f"the lab has orders of {', '.join(map(str, ORDERS))} classes alone")
    if expected != count:
        said = f" with num_classes {labelled}" if kind == NAV else ""
        labels = " ".join(ORDERS[expected])
        return ClassOrder((), f"{loader}{said} labels {expected} classes ({labels}), and the head has {count}")
    folded = dict(_FOLDED) if expected == 6 and is_v5(dataset) else {}
    return ClassOrder(ORDERS[count], f"assumed: the order of {loader}", folded)
