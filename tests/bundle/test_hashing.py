"""Hashes of files are those of `sha256sum`; hashes of tensors depend on name, type, shape and values, and on nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, integer_dtypes

from bundle import hashing
from bundle.hashing import sha256_arrays, sha256_file

some_arrays = arrays(integer_dtypes() | st.sampled_from([np.float16, np.float32, np.bool_]), array_shapes(min_side=0))


@given(data=st.binary(max_size=100))
def test_a_file_hashes_as_its_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("hash") / "file"
    path.write_bytes(data)
    pieces: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "_CHUNK_BYTES", 16)  # many pieces, and files that end exactly with one
        digest = sha256_file(path, pieces.append)

    assert digest == hashlib.sha256(data).hexdigest()
    assert sum(pieces) == len(data)
    assert len(pieces) == -(-len(data) // 16)


def test_a_file_of_more_than_one_real_piece(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((8 << 20) + 1)
    (tmp_path / "file").write_bytes(data)
    pieces: list[int] = []

    assert sha256_file(tmp_path / "file", pieces.append) == hashlib.sha256(data).hexdigest()
    assert pieces == [8 << 20, 1]


def test_the_recipe_for_arrays_is_fixed() -> None:
    """The digest of base weights stands in checkpoints and bundles: another recipe would disown all of them."""
    array = np.array([[1, 2], [3, 4]], np.float32)
    expected = hashlib.sha256(b"x|float32|(2, 2)|" + array.tobytes())

    assert sha256_arrays([("x", array)]) == expected.hexdigest()
    expected.update(b"empty|int64|(0,)|" + b"scalar|uint8|()|\x07")
    more = [("x", array), ("empty", np.zeros(0, np.int64)), ("scalar", np.array(7, np.uint8))]
    assert sha256_arrays(more) == expected.hexdigest()


@given(some_arrays)
def test_how_an_array_lies_in_memory_does_not_matter(array: np.ndarray) -> None:
    sparse = np.zeros((*array.shape, 2), array.dtype)
    sparse[..., 0] = array
    pieces: list[int] = []

    digest = sha256_arrays([("x", array)], pieces.append)

    assert digest == sha256_arrays([("x", np.asfortranarray(array))]) == sha256_arrays([("x", sparse[..., 0])])
    assert pieces == [array.nbytes]


@given(some_arrays.filter(lambda array: array.size > 0), st.data())
def test_every_bit_matters(array: np.ndarray, data: st.DataObject) -> None:
    raw = bytearray(array.tobytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    other = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)

    assert sha256_arrays([("x", array)]) != sha256_arrays([("x", other)])


def test_name_type_shape_and_order_matter() -> None:
    a, b = np.arange(4, dtype=np.int32), np.arange(4, 8, dtype=np.int32)
    variants = [
        [("a", a), ("b", b)],
        [("b", b), ("a", a)],
        [("a", b), ("b", a)],
        [("a", a), ("c", b)],
        [("a", a.reshape(2, 2)), ("b", b)],
        [("a", a.view(np.float32)), ("b", b)],
        [("a", np.concatenate([a, b]))],
    ]

    assert len({sha256_arrays(variant) for variant in variants}) == len(variants)
