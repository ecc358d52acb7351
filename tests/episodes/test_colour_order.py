"""A file in the other colour order is suspected among others, and correct sets are not."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from episodes.colour_order import compare_colours, is_split
from episodes.examination import examine
from episodes.synthetic import write_synthetic

SIZE = {"height": 48, "width": 64, "length": 8}


def write_set(folder, schemas):
    return [
        write_synthetic(folder, schema, side="left" if seed % 2 else "right", seed=seed, **SIZE)
        for seed, schema in enumerate(schemas)
    ]


def swap(path):
    name = "observations/images" if "basket" in path.name else "images"
    with h5py.File(path, "r+") as file:
        file[name][:] = file[name][:][..., ::-1]


def compare(paths):
    return compare_colours([examine(path).bands for path in paths])


def suspects(paths):
    return [index for index, found in enumerate(compare(paths)) if found is not None and found.suspect]


@pytest.mark.parametrize(
    "schemas",
    [["v6"] * 3, ["v6"] * 8, ["v1"] * 8, ["v1", "v5", "v5_jpeg", "v6"] * 3, ["v1"] * 5 + ["v6"] * 2],
    ids=lambda schemas: f"{len(schemas)} of {'+'.join(sorted(set(schemas)))}",
)
def test_a_correct_set(tmp_path, schemas):
    assert suspects(write_set(tmp_path, schemas)) == []


@pytest.mark.parametrize("schemas", [["v6"] * 6, ["v1"] * 6, ["v1", "v5", "v6"] * 2])
@pytest.mark.parametrize("wrong", [0, 4])
def test_one_swapped_file(tmp_path, schemas, wrong):
    paths = write_set(tmp_path, schemas)
    swap(paths[wrong])
    found = compare(paths)
    assert suspects(paths) == [wrong]
    assert found[wrong].confidence == "high"
    assert found[wrong].as_read > 5 * found[wrong].swapped
    assert not is_split(found)


def test_few_files_give_low_confidence(tmp_path):
    paths = write_set(tmp_path, ["v6"] * 3)
    swap(paths[1])
    assert suspects(paths) == [1]
    assert compare(paths)[1].confidence == "low"


def test_a_set_that_is_half_wrong_is_split(tmp_path):
    paths = write_set(tmp_path, ["v6"] * 6)
    for path in paths[::2]:
        swap(path)
    assert is_split(compare(paths))


def test_two_files_and_files_without_pictures_are_not_compared(tmp_path):
    bands = [examine(path).bands for path in write_set(tmp_path, ["v6"] * 2)]
    assert compare_colours([bands[0], None, bands[1]]) == [None, None, None]
    assert compare_colours([]) == []
    assert not is_split([])


def test_grey_surroundings_tell_nothing():
    random = np.random.default_rng(0)
    grey = [
        tuple((level + red, level) for level, red in zip(range(0, 160, 20), shift, strict=True))
        for shift in random.normal(0, 2, (9, 8))
    ]
    assert not any(found.suspect for found in compare_colours(grey))


def test_another_place_is_no_confident_suspect():
    """Blue where the others are brown, but not the swapped brown."""
    brown = [tuple((150.0 + shade, 70.0 + shade) for _ in range(8)) for shade in range(-4, 5)]
    elsewhere = ((90.0, 120.0),) * 8
    found = compare_colours([*brown, elsewhere])[-1]
    assert not (found.suspect and found.confidence == "high")


@pytest.mark.parametrize(
    ("others", "one", "suspect"),
    [
        ((150, 100), (100, 150), True),
        ((100, 95), (95, 100), True),
        ((100, 97), (97, 100), False),  # too little colour: light and compression do as much
        ((150, 100), (122, 128), False),  # 28 grey levels away, 22 after swapping: neither fits
        ((150, 100), (150, 100), False),
    ],
)
def test_limits(others, one, suspect):
    found = compare_colours([(tuple(map(float, others)),) * 8] * 4 + [(tuple(map(float, one)),) * 8])
    assert found[-1].suspect is suspect
