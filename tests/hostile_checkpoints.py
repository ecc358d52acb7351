"""Checkpoints that are hostile, absurd or damaged, each made by a function of a folder; what scripts/try_hostile_checkpoints loads.

Everything is made from one sound tiny checkpoint and a seed, so that a run can be repeated. A case says whether loading it may succeed:
one byte that changed in a place that nobody reads leaves the policy as it was, which the run verifies.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import stat
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import Edit, configs, rewrite
from train.synthetic import SyntheticFiles

_SEED = 20260407
_CONFIG_VALUES: dict[str, object] = {
    "1e7": 10_000_000, "negative": -1, "30 digits": 10**30, "5000 digits": 10**5000, "nan": float("nan"), "inf": float("inf"),
    "text": "\0\ud800\x1b[2J", "none": None, "list": [[]], "deep": None,
}  # fmt: skip
_CONFIG_KEYS = (
    "act_head.hidden_size", "act_head.num_layers", "act_head.latent", "act_head.action_dim", "train_setup.lora_r",
    "train_setup.lora_alpha", "window_size", "fwd_pred_next_n", "norm_min", "norm_max", "image_size", "jetvla",
)  # fmt: skip
_CODE = (
    "os system", "posix system", "subprocess Popen", "builtins eval", "builtins exec", "builtins open", "builtins getattr",
    "builtins __import__", "builtins compile", "pickle loads", "_pickle loads", "torch load", "torch.hub load", "importlib import_module",
    "runpy _run_code", "pathlib Path.touch", "ctypes CDLL", "operator attrgetter", "functools partial", "types FunctionType",
    "torch.storage _load_from_bytes", "torch.jit load", "numpy load", "numpy.core.multiarray _reconstruct", "codecs decode",
    "torch._utils _rebuild_tensor_v2.__globals__", "collections OrderedDict.fromkeys", "collections namedtuple", "cProfile run",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: `kind/what`.
        make: writes it into a folder that holds `base`, and returns its path.
        may_load: whether a policy may come of it that is another than the sound one: what was changed is then said in the file.
        stated: arguments of train.checkpoint.load.
    """

    name: str
    make: Callable[[Path], Path]
    may_load: bool = False
    config: str | None = None
    base: str | None = None


def cases(sound: SyntheticFiles, marker: Path) -> Iterator[Case]:
    """All of them; code that runs makes `marker`."""
    yield from _code(marker)
    yield from _flipped(sound)
    yield from _cut(sound)
    yield from _bombs()
    yield from _lying(sound)
    yield from _weights(sound)
    yield from _settings(sound)
    yield from _texts(sound)
    yield from _safetensors(sound)
    yield from _places()
    yield from _adapters(sound)


# --- code ---------------------------------------------------------------------------------------------------------------


def _containers(pickled: bytes) -> dict[str, bytes]:
    row = b"".join(pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return {"zip": zipped({"data.pkl": pickled}), "row": row + pickled + pickle.dumps([], 2), "bare": pickled}


def zipped(members: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"a/{name}", content)
    return target.getvalue()


def _code(marker: Path) -> Iterator[Case]:
    command = f"touch {marker}".encode()
    source = f"open({str(marker)!r}, 'w').close()".encode()
    arguments = b"(X" + struct.pack("<L", len(command)) + command + b"t"
    evaluated = b"(X" + struct.pack("<L", len(source)) + source + b"t"
    for code in _CODE:
        module, name = code.split()
        own = evaluated if name in ("eval", "exec") else arguments
        pickled = b"\x80\x02c" + f"{module}\n{name}\n".encode() + own + b"R."
        for container, content in _containers(pickled).items():
            yield _file(f"code/{module}.{name} in {container}", content)
    text = b"\x8c" + bytes([len(command)]) + command
    ways = {
        "INST": b"(" + text + b"iposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\n" + text + b"o.",
        "NEWOBJ": b"cposix\nsystem\n" + text + b"\x85\x81.",
        "NEWOBJ_EX": b"cposix\nsystem\n" + text + b"\x85}\x92.",
        "STACK_GLOBAL": b"\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R.",
        "EXT1": b"\x82\x01" + text + b"\x85R.",
        "BUILD": b"ccollections\nOrderedDict\n)R}\x8c\x0c__setstate__cposix\nsystem\nsb" + text + b"b.",
        "PERSID": b"Pposix system\n.",
        "nested in a dict": b"}\x8c\x0astate_dict}\x8c\x01xcposix\nsystem\n" + text + b"\x85Rss.",
        "REDUCE of a tensor's function": b"ctorch._utils\n_rebuild_tensor_v2\n(cposix\nsystem\nK\x00))\x89NtR.",
        "from_type": b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nctorch\nTensor\n" + text + b"\x85NtR.",
    }
    for way, pickled in ways.items():
        for container, content in _containers(b"\x80\x04" + pickled).items():
            yield _file(f"code/by {way} in {container}", content)


def _file(name: str, content: bytes, suffix: str = ".ckpt") -> Case:
    def make(folder: Path) -> Path:
        path = folder / f"policy{suffix}"
        path.write_bytes(content)
        return path

    return Case(name, make)


# --- damage -------------------------------------------------------------------------------------------------------------


def _flipped(sound: SyntheticFiles) -> Iterator[Case]:
    """Single bytes: half of them in numbers, the others in what describes them."""
    content = sound.checkpoint.read_bytes()
    chance = random.Random(_SEED)
    with zipfile.ZipFile(sound.checkpoint) as archive:
        infos = archive.infolist()
        start = archive.start_dir
    pickled = next(info for info in infos if info.filename.endswith("data.pkl"))
    numbers = [info for info in infos if "/data/" in info.filename and info.file_size > 0]
    for index in range(60):
        info = chance.choice(numbers)
        yield _changed(
            f"flip/number {index}", content, info.header_offset + 130 + chance.randrange(info.file_size), chance
        )
    for index in range(30):
        yield _changed(f"flip/pickle {index}", content, 60 + chance.randrange(pickled.file_size), chance)
    for index in range(30):
        yield _changed(f"flip/directory {index}", content, chance.randrange(start, len(content)), chance)


def _changed(name: str, content: bytes, place: int, chance: random.Random) -> Case:
    place, bit = min(place, len(content) - 1), 1 << chance.randrange(8)
    return _lazy(name, lambda: content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])


def _lazy(name: str, content: Callable[[], bytes]) -> Case:
    """A file that is made when it is needed: hundreds of them do not fit."""

    def make(folder: Path) -> Path:
        path = folder / "policy.ckpt"
        path.write_bytes(content())
        return path

    return Case(name, make)


def _cut(sound: SyntheticFiles) -> Iterator[Case]:
    content = sound.checkpoint.read_bytes()
    for share in (0, 1, 10, 30, 50, 70, 90, 99):
        yield _lazy(f"cut/at {share} %", lambda share=share: content[: len(content) * share // 100])  # type: ignore[misc]
    chance = random.Random(_SEED + 1)
    for index in range(8):
        place = chance.randrange(len(content))
        yield _lazy(f"cut/zeros {index}", lambda place=place: content[:place] + b"\0" * 4096 + content[place + 4096 :])  # type: ignore[misc]
        yield _lazy(f"cut/a byte more {index}", lambda place=place: content[:place] + b"x" + content[place:])  # type: ignore[misc]


# --- bombs --------------------------------------------------------------------------------------------------------------


def _bombs() -> Iterator[Case]:
    doubling = (
        b"]" + b"q\x00" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(200))
    )
    pickles = {
        "bytearray of a terabyte": b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        "text that is encoded again": b"(X\x00\x00\x40\x00" + b"x" * (4 << 20)
        + b"q\x00" + b"c_codecs\nencode\nh\x00\x85R" * 4000 + b"l.",
        "list that is copied again": b"](" + b"K\x01" * 300_000 + b"eq\x01(" + b"cbuiltins\nset\nh\x01\x85R" * 9000 + b"l.",
        "tuple in a tuple, as a key": b"K\x01" + b"\x85" * 1_000_000 + b"q\x00}h\x00K\x01s.",
        "list in a list": b"]" * 1_000_000 + b"a" * 999_999 + b".",
        "dictionary in a dictionary": b"}K\x01" * 500_000 + b"N" + b"s" * 500_000 + b".",
        "lists of the same lists": doubling + b".",
        "list in itself": b"]q\x00h\x00a.",
        "long integer": b"\x8b\x00\x00\x00\x01" + b"\x7f" * (1 << 24) + b".",
        "long integer as a key": b"}\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20) + b"q\x00" + b"K\x01s" + b"h\x00K\x01s" * 100_000 + b".",
        "integer of many digits": b"L" + b"1" * 100_000 + b"L\n.",
        "far memo": b"K\x01r\xff\xff\xff\xffr\xff\xff\xff\x7f.",
        "three million steps": b"]" + b"K\x01a" * 1_500_000 + b".",
        "three million values": b"(" + b"N" * 3_000_000 + b"l.",
        "string beyond the file": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
        "bytearray beyond the file": b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
        "frame beyond the file": b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
        "a million marks": b"(" * 1_000_000 + b"N.",
    }  # fmt: skip
    for name, pickled in pickles.items():
        inside = (
            pickled if name.endswith(("file", "values")) else b"}X\x0a\x00\x00\x00state_dict" + pickled[:-1] + b"s."
        )
        for container, content in _containers(b"\x80\x04" + inside).items():
            yield _file(f"bomb/{name} in {container}", content)
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0) + b"a/data/0"
    directory = entry * 1_000_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(directory), 64, 0)
    yield _file("bomb/zip of a million members", b"PK\3\4" + b"\0" * 60 + directory + end)
    small = directory[: 54 * 200_000]
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(small), 64, 0)
    yield _file("bomb/zip of members at one place", b"PK\3\4" + b"\0" * 60 + small + end)
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * (200 << 20))
    yield _file("bomb/zip that inflates", deflated.getvalue())


# --- tensors that lie ---------------------------------------------------------------------------------------------------


class _Claim:
    def __init__(self, *shape: Any) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        key, count, offset, size, stride = self.shape
        return torch._utils._rebuild_tensor_v2, (_Storage(key, count), offset, size, stride, False, OrderedDict())


class _Storage:
    def __init__(self, key: str, count: int) -> None:
        self.key, self.count = key, count


class _Pickler(pickle.Pickler):
    def persistent_id(self, each: Any) -> Any:
        return ("storage", torch.FloatStorage, each.key, "cpu", each.count) if isinstance(each, _Storage) else None


def _lying(sound: SyntheticFiles) -> Iterator[Case]:
    claims = {
        "terabyte of zeros": ("0", 16, 0, (1 << 20, 1 << 20), (0, 0)),
        "terabyte that is not there": ("0", 1 << 38, 0, (1 << 38,), (1,)),
        "storage of another length": ("0", 17, 0, (17,), (1,)),
        "no storage": ("9", 16, 0, (16,), (1,)),
        "negative size": ("0", 16, 0, (-16,), (1,)),
        "negative stride": ("0", 16, 15, (16,), (-1,)),
        "negative offset": ("0", 16, -1, (16,), (1,)),
        "offset beyond": ("0", 16, 1, (16,), (1,)),
        "stride beyond": ("0", 16, 0, (4, 4), (5, 1)),
        "overflowing product": ("0", 16, 0, (1 << 40, 1 << 40), (1 << 40, 1)),
        "sizes of 100 digits": ("0", 16, 0, (10**100,), (1,)),
        "thousand dimensions": ("0", 16, 0, (1,) * 1000, (1,) * 1000),
        "empty and endless": ("0", 16, 0, (0, 1 << 47), (1, 1)),
        "size of another length": ("0", 16, 0, (4, 4), (1,)),
        "member outside": ("../../etc/passwd", 16, 0, (16,), (1,)),
    }
    for name, claim in claims.items():
        target = io.BytesIO()
        _Pickler(target, 2).dump({"state_dict": {"model.action_token": _Claim(*claim)}})
        yield _file(f"lie/{name}", zipped({"data.pkl": target.getvalue(), "data/0": b"\0" * 64}))
    count = 60_000
    target = io.BytesIO()
    _Pickler(target, 2).dump(
        {"state_dict": {f"model.x{index}": _Claim("0", 16, 0, (16,), (1,)) for index in range(count)}}
    )
    yield _file(f"lie/{count} tensors", zipped({"data.pkl": target.getvalue(), "data/0": b"\0" * 64}))

    def aliased(content: dict[str, Any]) -> None:
        """Every matrix of a shape is the same one: the config agrees with all of them."""
        seen: dict[tuple[int, ...], torch.Tensor] = {}
        state = content["state_dict"]
        for name, tensor in state.items():
            state[name] = seen.setdefault(tuple(tensor.shape), torch.zeros(1).expand(tensor.shape))

    yield _edited("lie/expanded tensors that fit the config", sound, aliased)


# --- weights ------------------------------------------------------------------------------------------------------------


def _edited(name: str, sound: SyntheticFiles, edit: Edit, *, may_load: bool = False) -> Case:
    def changed(content: dict[str, Any]) -> None:
        configs(content)["vlm"]["pretrained_model_name_or_path"] = str(sound.base)
        edit(content)

    return Case(name, lambda folder: rewrite(sound.checkpoint, folder / "policy.ckpt", changed), may_load)


def _weights(sound: SyntheticFiles) -> Iterator[Case]:
    q = "text_model.model.layers.0.self_attn.q_proj"
    places = {
        "token": "action_token", "norm": "text_model.model.layer_norm.weight", "class": "vision_model.model.embeddings.class_embedding",
        "linear": f"{q}.base_layer.weight", "down": f"{q}.lora_A.default.weight", "up": f"{q}.lora_B.default.weight",
        "embedding": "embed_tokens.weight", "head": "act_head.actions.mlp.0.weight",
    }  # fmt: skip
    values: dict[str, Callable[[torch.Tensor], object]] = {
        "scalar": lambda tensor: torch.zeros(()), "empty": lambda tensor: torch.zeros(0), "flat": lambda tensor: tensor.flatten()[:-1],
        "deeper": lambda tensor: tensor[None, None], "integers": lambda tensor: tensor.long(),
        "nan": lambda tensor: torch.full_like(tensor, float("nan")), "sparse": lambda tensor: tensor.to_sparse(),
        "meta": lambda tensor: tensor.to("meta"), "text": lambda tensor: "no tensor", "8 bit": lambda tensor: tensor.to(torch.uint8),
    }  # fmt: skip
    for place, suffix in places.items():
        for value, change in values.items():

            def edit(
                content: dict[str, Any], suffix: str = suffix, change: Callable[[torch.Tensor], object] = change
            ) -> None:
                state = content["state_dict"]
                found = [name for name in state if name.endswith(suffix)]
                assert found, suffix
                state.update({name: change(state[name]) for name in found})

            yield _edited(f"weight/{place}: {value}", sound, edit)

    def flood(content: dict[str, Any]) -> None:
        one = torch.zeros(4, 64)
        content["state_dict"].update({f"model.backbone.m{index}.lora_A.default.weight": one for index in range(30_000)})

    yield _edited("weight/30000 adapters of nothing", sound, flood)


# --- settings -----------------------------------------------------------------------------------------------------------


def _deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def _settings(sound: SyntheticFiles) -> Iterator[Case]:
    for path in _CONFIG_KEYS:
        section, _, key = path.rpartition(".")
        for name, written in _CONFIG_VALUES.items():

            def edit(
                content: dict[str, Any],
                section: str = section,
                key: str = key,
                name: str = name,
                written: object = written,
            ) -> None:
                config = configs(content)
                (config[section] if section else config)[key] = _deep(100) if name == "deep" else written

            # Sizes of windows and ranges of actions are what the config says; nothing in the weights could contradict.
            yield _edited(f"config/{path} = {name}", sound, edit, may_load=True)


# --- texts --------------------------------------------------------------------------------------------------------------


def _texts(sound: SyntheticFiles) -> Iterator[Case]:
    texts: dict[str, Callable[[Path], object]] = {
        "deep lists": lambda path: path.write_text("[" * 1_000_000),
        "deep objects": lambda path: path.write_text('{"a":' * 900 + "1" + "}" * 900),
        "100000 digits": lambda path: path.write_text('{"window_size": ' + "1" * 100_000 + "}"),
        "a million values": lambda path: path.write_text("[" + "[]," * 1_000_000 + "1]"),
        "a million keys": lambda path: path.write_text("{" + ",".join(f'"{index}":1' for index in range(1_000_000)) + "}"),
        "no text": lambda path: path.write_bytes(b"\xff\xfe\xfd" * 1000),
        "100 GB of zeros": lambda path: path.touch() or os.truncate(path, 100 << 30),
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "directory": Path.mkdir,
        "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
        "nul in parent": lambda path: path.write_text(json.dumps({"parent": "a\0b"})),
        "parent of 10000 letters": lambda path: path.write_text(json.dumps({"parent": "x" * 10_000})),
        "half a pair in parent": lambda path: path.write_text(json.dumps({"parent": "\ud800"})),
        "circle": lambda path: path.write_text(json.dumps({"parent": path.name})),
        "chain of 1000": lambda path: _chain(path, 1000),
        "infinity": lambda path: path.write_text('{"window_size": Infinity}'),
    }  # fmt: skip
    for name, write in texts.items():

        def stated(folder: Path, write: Callable[[Path], object] = write) -> Path:
            write(folder / "stated.json")
            return Path(shutil.copy(sound.checkpoint, folder / "policy.ckpt"))

        def beside(folder: Path, write: Callable[[Path], object] = write) -> Path:
            write(folder / "policy.json")
            return rewrite(sound.checkpoint, folder / "policy.ckpt", lambda content: content.pop("hyper_parameters"))

        def base(folder: Path, write: Callable[[Path], object] = write) -> Path:
            (folder / "other").mkdir()
            write(folder / "other" / "config.json")
            return Path(shutil.copy(sound.checkpoint, folder / "policy.ckpt"))

        yield Case(f"text/stated config: {name}", stated, config="stated.json")
        yield Case(f"text/config beside: {name}", beside)
        yield Case(f"text/base: {name}", base, base="other")
    dimensions = {
        "text_config": {"layers": 10**7, "embed_dim": 10**9, "vocab_size": 10**12, "max_position_embeddings": 10**9, "attention_heads": -1},
        "vision_config": {"num_hidden_layers": 10**7, "hidden_size": 10**9, "image_size": 10**9, "patch_size": 0, "num_channels": 10**9},
    }  # fmt: skip
    for section, keys in dimensions.items():
        for key, value in keys.items():

            def sized(folder: Path, section: str = section, key: str = key, value: int = value) -> Path:
                (folder / "other").mkdir()
                config = json.loads((sound.base / "config.json").read_text())
                config[section][key] = value
                (folder / "other" / "config.json").write_text(json.dumps(config))
                return Path(shutil.copy(sound.checkpoint, folder / "policy.ckpt"))

            yield Case(f"text/base: {section}.{key} {value}", sized, base="other")


def _chain(path: Path, length: int) -> None:
    path.write_text(json.dumps({"parent": "c0.json"}))
    for index in range(length):
        (path.parent / f"c{index}.json").write_text(json.dumps({"parent": f"c{index + 1}.json"}))


# --- safetensors --------------------------------------------------------------------------------------------------------


def safetensors(header: bytes, numbers: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + numbers


def _safetensors(sound: SyntheticFiles) -> Iterator[Case]:
    def one(**fields: object) -> bytes:
        entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **fields}
        return safetensors(
            json.dumps({"a": entry, "__metadata__": {"format": "jetvla-policy/1", "config": "{}"}}).encode(), b"\0" * 16
        )

    files = {
        "header of an exabyte": struct.pack("<Q", 1 << 60) + b"{}",
        "header of 90 MB": safetensors(b"{" + b" " * (90 << 20) + b"}"),
        "header beyond the file": struct.pack("<Q", 1000) + b"{}",
        "deep header": safetensors(b'{"a":' * 100_000),
        "a million tensors": safetensors(
            b"{" + b",".join(b'"%d":{}' % index for index in range(1_000_000)) + b"}"
        ),
        "digits": safetensors(b'{"a": ' + b"1" * 100_000 + b"}"),
        "list": safetensors(b"[]"),
        "metadata of numbers": safetensors(b'{"__metadata__": {"a": 1}}'),
        "metadata as a list": safetensors(b'{"__metadata__": []}'),
        "empty": b"",
        "seven bytes": b"\0" * 7,
        "negative shape": one(shape=[-4]),
        "overflowing shape": one(shape=[1 << 62, 1 << 62]),
        "shape of another size": one(shape=[5]),
        "offsets beyond": one(data_offsets=[0, 1600], shape=[400]),
        "offsets reversed": one(data_offsets=[16, 0]),
        "unknown type": one(dtype="F99"),
        "type of 4 bits": one(dtype="F4", shape=[32]),
        "type without torch": one(dtype="F8_E8M0", shape=[16]),
        "config of deep lists": safetensors(
            json.dumps({"__metadata__": {"format": "jetvla-policy/1", "config": "[" * 100_000}}).encode()
        ),
        "config of no object": safetensors(
            json.dumps({"__metadata__": {"format": "jetvla-policy/1", "config": "3"}}).encode()
        ),
    }  # fmt: skip
    for name, content in files.items():
        yield _file(f"safetensors/{name}", content, ".safetensors")

        def base(folder: Path, content: bytes = content) -> Path:
            shutil.copytree(sound.base, folder / "other")
            (folder / "other" / "model.safetensors").write_bytes(content)
            return Path(shutil.copy(sound.checkpoint, folder / "policy.ckpt"))

        yield Case(f"safetensors/base: {name}", base, base="other")


# --- places -------------------------------------------------------------------------------------------------------------


def _places() -> Iterator[Case]:
    makers: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "random device": lambda path: path.symlink_to("/dev/urandom"),
        "directory": Path.mkdir,
        "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
        "link to nothing": lambda path: path.symlink_to("gone"),
        "link to itself": lambda path: path.symlink_to(path.name),
        "100 GB of zeros": lambda path: path.touch() or os.truncate(path, 100 << 30),
        "100 GB of zip": lambda path: path.write_bytes(b"PK\3\4") and os.truncate(path, 100 << 30),
        "process memory": lambda path: path.symlink_to("/proc/self/mem"),
        "process maps": lambda path: path.symlink_to("/proc/self/maps"),
    }
    for name, write in makers.items():
        for suffix in (".ckpt", ".safetensors"):

            def make(folder: Path, write: Callable[[Path], object] = write, suffix: str = suffix) -> Path:
                write(folder / f"policy{suffix}")
                return folder / f"policy{suffix}"

            yield Case(f"place/{name}{suffix}", make)


# --- adapters -----------------------------------------------------------------------------------------------------------


def _adapters(sound: SyntheticFiles) -> Iterator[Case]:
    """peft's folders: its config, its weights."""
    configured: dict[str, Callable[[dict[str, Any]], object]] = {
        "rank of zero": lambda config: config.update(r=0),
        "rank of 30 digits": lambda config: config.update(r=10**30),
        "alpha of nothing": lambda config: config.update(lora_alpha=None),
        "alpha without end": lambda config: config.update(lora_alpha=float("inf")),
        "patterns that never end": lambda config: config.update(rank_pattern={r"([a-z_.0-9]+)*!": 4}),
        "patterns that take long": lambda config: config.update(alpha_pattern={".*" * 30 + "!": 4}),
        "many patterns": lambda config: config.update(alpha_pattern={f".*{index}": 4 for index in range(5000)}),
        "patterns of no pattern": lambda config: config.update(rank_pattern={"(": 4}),
        "patterns of lists": lambda config: config.update(alpha_pattern=[1]),
        "another kind": lambda config: config.update(peft_type="IA3"),
        "a field of a newer peft": lambda config: config.update(use_magic=True),
        "deep": lambda config: config.update(target_modules=_deep(100)),
        "nul": lambda config: config.update(base_model_name_or_path="a\0b", r="\0"),
    }  # fmt: skip
    for name, change in configured.items():

        def make(folder: Path, change: Callable[[dict[str, Any]], object] = change) -> Path:
            return adapter_folder(sound, folder, change)

        yield Case(f"adapter/{name}", make)
    damaged: dict[str, Callable[[Path], object]] = {
        "config of deep lists": lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000),
        "config of a list": lambda folder: (folder / "adapter_config.json").write_text("[]"),
        "weights of a pipe": lambda folder: _become_pipe(folder / "adapter_model.safetensors"),
        "weights cut": lambda folder: os.truncate(folder / "adapter_model.safetensors", 1000),
        "head of a pipe": lambda folder: _become_pipe(folder / "policy.pt"),
        "head cut": lambda folder: os.truncate(folder / "policy.pt", 1000),
        "weights of scalars": lambda folder: save_file(
            {name: torch.zeros(()) for name in load_file(folder / "adapter_model.safetensors")}, folder / "adapter_model.safetensors"
        ),
        "weights of another rank": lambda folder: save_file(
            {name: torch.zeros(7, 7) for name in load_file(folder / "adapter_model.safetensors")}, folder / "adapter_model.safetensors"
        ),
    }  # fmt: skip
    for name, damage in damaged.items():

        def broken(folder: Path, damage: Callable[[Path], object] = damage) -> Path:
            made = adapter_folder(sound, folder, lambda config: None)
            damage(made)
            return made

        yield Case(f"adapter/{name}", broken)


def _become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def adapter_folder(sound: SyntheticFiles, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    target = folder / "adapter"
    target.mkdir()
    content = torch.load(sound.checkpoint, weights_only=True)
    state = content["state_dict"]
    root = "model.model.base_model.model."
    adapters = {
        "base_model.model." + name.removeprefix(root).replace(".default.", "."): tensor.clone()
        for name, tensor in state.items()
        if name.startswith(root) and ".lora_" in name
    }
    save_file(adapters, target / "adapter_model.safetensors")
    head = {name: tensor for name, tensor in state.items() if "act_head" in name or "action_token" in name}
    settings = configs(content)
    settings["vlm"]["pretrained_model_name_or_path"] = str(sound.base)
    torch.save({"state_dict": head, "hyper_parameters": {"configs": settings}}, target / "policy.pt")
    setup = settings["train_setup"]
    config = {"peft_type": "LORA", "r": setup["lora_r"], "lora_alpha": setup["lora_alpha"]}
    change(config)
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target
