"""Files of torch.save: what torch reads is read to the bit; what lies, is damaged, or wants to run code is refused by name."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bundle import reading_limits
from bundle.errors import CheckpointError
from train import plain_pickle, torch_file
from train.checkpoint_file import read_raw
from train.plain_pickle import ForbiddenGlobalError, read_pickle

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Dense tensors in every form that a state dict has: transposed, cut out of others, without elements, parameters."""
    size = draw(st.lists(st.integers(0, 4), max_size=4))
    made = torch.arange(max(1, int(torch.tensor(size).prod())) + 5).to(draw(st.sampled_from(DTYPES)))
    made = made[draw(st.integers(0, 4)) :][: int(torch.tensor(size).prod())].reshape(size)
    if draw(st.booleans()) and made.dim() > 1:
        made = made.transpose(0, 1)
    if draw(st.booleans()) and made.is_floating_point():
        made = torch.nn.Parameter(made, requires_grad=draw(st.booleans()))
    return made


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z.]{1,8}", fullmatch=True), tensors(), min_size=1, max_size=4), st.booleans())
def test_tensors_are_those_that_torch_reads(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor], new: bool
) -> None:
    path = tmp_path_factory.mktemp("file") / "a.pt"
    state["alias"] = next(iter(state.values()))
    torch.save({"state_dict": OrderedDict(state)}, path, _use_new_zipfile_serialization=new)
    expected = torch.load(path, weights_only=True)["state_dict"]
    found = read_raw(path).state
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape, found[name].stride()) == (
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        )
        assert torch.equal(found[name], tensor)
    assert found["alias"].data_ptr() == found[next(iter(state))].data_ptr()


def test_everything_that_trainers_put_beside_weights_is_read(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    content = {
        "state_dict": layer.state_dict(),
        "hyper_parameters": {
            "configs": {"a": (1, 2.5, None, True), "path": Path("/x/y"), "raw": b"\0\xff", "set": {1, 2}}
        },
        "optimizer_states": [torch.optim.AdamW(layer.parameters()).state_dict()],
        "pytorch-lightning_version": "2.2",
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "random": torch.get_rng_state(),
        "bytes": bytearray(b"ab"),
        "large": 1 << 127,
    }
    path = tmp_path / "a.ckpt"
    torch.save(content, path)
    raw = read_raw(path)
    assert raw.config == {"a": (1, 2.5, None, True), "path": "/x/y", "raw": b"\0\xff", "set": {1, 2}}
    assert raw.kind == "lightning"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner, inner, inner),
        max_leaves=20,
    )
)
def test_plain_data_of_any_protocol_is_read_as_it_was_written(protocol: int, content: Any) -> None:
    assert read_pickle(io.BytesIO(pickle.dumps([content, content], protocol)), {}) == [content, content]


@given(st.binary(max_size=60))
def test_any_bytes_end_in_plain_data_or_a_refusal(raw: bytes) -> None:
    with contextlib.suppress(ValueError, ForbiddenGlobalError):
        read_pickle(io.BytesIO(b"\x80\x02" + raw), {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "a.pt"
    torch.save({"state_dict": {"first": torch.arange(64.0), "second": torch.arange(32.0)}}, path)
    return path.read_bytes()


def refused(path: Path, content: bytes, what: str) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_raw(path)
    assert caught.value.what == f"{path} {what}"
    return str(caught.value.got)


def member(saved: bytes, name: str) -> tuple[int, int]:
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(name))
    names, extras = struct.unpack_from("<2H", saved, info.header_offset + 26)
    return info.header_offset + 30 + names + extras, info.file_size


@pytest.mark.parametrize(("name", "tensor"), [("data/0", "first"), ("data/1", "second")])
@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_flipped_bit_in_a_weight_is_found(saved: bytes, tmp_path: Path, name: str, tensor: str, place: int) -> None:
    start, length = member(saved, name)
    changed = bytearray(saved)
    changed[start + place % length] ^= 1
    got = refused(tmp_path / "a.pt", bytes(changed), "is damaged")
    assert got == f"the bytes of {tensor} are not those that were written (CRC-32)"


def test_a_flipped_bit_in_what_describes_the_weights_is_found(saved: bytes, tmp_path: Path) -> None:
    start, length = member(saved, "data.pkl")
    changed = bytearray(saved)
    changed[start + length // 2] ^= 1
    assert "data.pkl are not those" in refused(tmp_path / "a.pt", bytes(changed), "is truncated or not a checkpoint")


def test_a_file_that_was_written_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": {"a": torch.arange(4.0)}}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read_raw(tmp_path / "a.pt").state["a"], torch.arange(4.0))


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"a/{name}", content)
    return target.getvalue()


def members(saved: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def test_a_zip_that_was_packed_again_uncompressed_is_read(saved: bytes, tmp_path: Path) -> None:
    """Its numbers no longer stand at multiples of their size."""
    (tmp_path / "a.pt").write_bytes(zipped(members(saved)))
    assert torch.equal(read_raw(tmp_path / "a.pt").state["first"], torch.arange(64.0))


def test_a_zip_that_was_packed_again_compressed_is_refused(saved: bytes, tmp_path: Path) -> None:
    content = zipped(members(saved), zipfile.ZIP_DEFLATED)
    assert "is compressed" in refused(tmp_path / "a.pt", content, "is truncated or not a checkpoint")


@pytest.mark.parametrize("length", [0, 252, 260])
def test_a_storage_of_another_length_is_refused(saved: bytes, tmp_path: Path, length: int) -> None:
    content = {**members(saved), "data/0": b"\0" * length}
    got = refused(tmp_path / "a.pt", zipped(content), "is damaged")
    assert got == f"first lies in a storage of 256 bytes, of which the file has {length}"


def test_a_storage_that_is_not_there_is_refused(saved: bytes, tmp_path: Path) -> None:
    content = members(saved)
    del content["data/1"]
    got = refused(tmp_path / "a.pt", zipped(content), "is damaged")
    assert got == "second lies in a storage of 128 bytes, of which the file has none of them"


@pytest.mark.parametrize(("key", "value"), [("byteorder", b"big"), ("data.pkl", b"\x80\x02}q\x00"), ("data.pkl", b"")])
def test_what_describes_the_numbers_must_be_whole_and_of_this_order(
    saved: bytes, tmp_path: Path, key: str, value: bytes
) -> None:
    refused(tmp_path / "a.pt", zipped({**members(saved), key: value}), "is truncated or not a checkpoint")


def test_members_that_overlap_or_stand_twice_are_refused(saved: bytes, tmp_path: Path) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("a/data.pkl", b"x")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/data.pkl", b"y")
    assert "twice" in refused(tmp_path / "a.pt", target.getvalue(), "is truncated or not a checkpoint")

    changed = bytearray(saved)  # the directory's entry for the second storage leads to the first
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        first, second = (archive.getinfo(f"a/data/{index}").header_offset for index in (0, 1))
    at = changed.rfind(struct.pack("<L", second), changed.find(b"PK\1\2"))
    changed[at : at + 4] = struct.pack("<L", first)
    assert "overlap" in refused(tmp_path / "a.pt", bytes(changed), "is truncated or not a checkpoint")


@pytest.mark.parametrize(
    ("size", "stride", "offset", "what"),
    [
        ((1 << 20, 1 << 20), (0, 0), 0, "repeats its numbers"),
        ((64, 64), (1, 1), 0, "repeats its numbers"),
        ((65,), (1,), 0, "reaches beyond its storage of 256 bytes"),
        ((8, 9), (9, 1), 0, "reaches beyond its storage"),
        ((1,), (1,), 64, "reaches beyond its storage"),
        ((2, 2), (1 << 40, 1), 0, "reaches beyond its storage"),
    ],
)
def test_a_tensor_that_its_storage_does_not_hold_is_refused(
    saved: bytes, tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int, what: str
) -> None:
    assert what in refused(tmp_path / "a.pt", claiming(saved, size, stride, offset), "is damaged")


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((-1,), (1,), 0),
        ((1,), (-1,), 0),
        ((1,), (1,), -1),
        ((1 << 70,), (1,), 0),
        ((1,) * 9, (1,) * 9, 0),
        ((1,), (), 0),
    ],
)
def test_sizes_that_are_none_are_refused(
    saved: bytes, tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    refused(tmp_path / "a.pt", claiming(saved, size, stride, offset), "is truncated or not a checkpoint")


class Claim:
    """Pickled as torch pickles a tensor of storage 0."""

    def __init__(self, *shape: object) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple[object, ...]:
        size, stride, offset = self.shape
        return torch._utils._rebuild_tensor_v2, (_Storage(), offset, size, stride, False, OrderedDict())


class _Storage:
    pass


class _Pickler(pickle.Pickler):
    def persistent_id(self, each: object) -> object:
        return ("storage", torch.FloatStorage, "0", "cpu", 64) if isinstance(each, _Storage) else None


def claiming(saved: bytes, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> bytes:
    target = io.BytesIO()
    _Pickler(target, 2).dump({"state_dict": {"x": Claim(size, stride, offset)}})
    return zipped({**members(saved), "data.pkl": target.getvalue()})


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.empty(3, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
    ],
    ids=["sparse", "meta", "complex"],
)
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path: Path, tensor: Tensor, kind: str) -> None:
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {"a": torch.ones(1), "weight": tensor}}, path)
    with pytest.raises(CheckpointError) as caught:
        read_raw(path)
    assert caught.value.what == f"{path} holds tensors of a kind that is not read"
    assert caught.value.got == f"weight ({kind})"


@pytest.mark.parametrize(
    "name", [7, "a\0b", "\x1b[2J", "x" * 600, "\ud800"], ids=["number", "nul", "escape", "long", "half"]
)
def test_keys_that_are_no_names_are_refused(tmp_path: Path, name: object) -> None:
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {name: torch.ones(1)}}, path)
    with pytest.raises(CheckpointError, match="holds keys that are no names"):
        read_raw(path)


BOMBS = {
    "bytearray": b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
    "repeated text": b"(X\x00\x00\x10\x00"
    + b"x" * (1 << 20)
    + b"q\x000"
    + b"c_codecs\nencode\nh\x00\x85R" * 40
    + b"l.",
    "repeated list": b"](" + b"K\x01" * 100_000 + b"eq\x01(" + b"ccollections\nOrderedDict\nh\x01\x85R" * 400 + b"l.",
    "deep key": b"K\x01" + b"\x85" * 100_000 + b"q\x00}h\x00K\x01s.",
    "large key": b"}\x8b\x00\x00\x01\x00" + b"\x7f" * (1 << 16) + b"K\x01s.",
    "far memo": b"K\x01r\xff\xff\xff\xffr\xff\xff\xff\x7f.",
    "no end": b"K\x01" * 1000,
    "huge string": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    "deep marks": b"(" * 100_000 + b"N.",
    "call of data": b"K\x01)R.",
    "state on a list": b"]}b.",
    "get what is not": b"h\x07.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_grow_or_end_nowhere_are_refused_or_small(name: str) -> None:
    with contextlib.suppress(ValueError):
        found = read_pickle(io.BytesIO(b"\x80\x02" + BOMBS[name]), {})
        assert name in ("far memo", "deep marks"), found


def test_endless_pickles_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pickle, "PICKLE_STEPS", 100)
    with pytest.raises(ValueError, match="more than 100 steps"):
        read_pickle(io.BytesIO(b"(" + b"N" * 200 + b"l."), {})


def test_more_tensors_than_any_policy_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_file.TENSORS == reading_limits.TENSORS >= 10_000
    monkeypatch.setattr(torch_file, "TENSORS", 3)
    torch.save({"state_dict": {str(index): torch.ones(1) for index in range(4)}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="4 tensors, more than 3"):
        read_raw(tmp_path / "a.pt")


def test_a_config_that_is_written_out_endlessly_is_refused(tmp_path: Path) -> None:
    laughs: list[Any] = ["lol"]
    for _ in range(50):
        laughs = [laughs, laughs]
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": {"configs": {"a": laughs}}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"the training config in .* holds too many values"):
        read_raw(tmp_path / "a.pt")
