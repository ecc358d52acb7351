"""Hostile, absurd and damaged episodes, datasets and recordings, made again from sound ones (tests/hostile_episodes_run.py reads them).

A case is made when its turn comes, in a folder of its own, from a seed: thousands of files need no room, and each can be made alone.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t
from PIL import Image

from episodes.lerobot import export_lerobot
from episodes.synthetic import SyntheticSchema, write_synthetic
from episodes.writer import write_episode
from tests.recordings import drive, end_of_run, record

T, H, W = 8, 24, 32
SECTOR = 512
_MB = 1 << 20
_SCHEMAS: tuple[SyntheticSchema, ...] = ("v1", "v5", "v5_jpeg", "v6")
TEXT = np.array([b"Navigate to the gray basket on the left"], "S256")


@dataclass(frozen=True)
class Sound:
    """Files that are good, by name: `v1.h5`, `lerobot`, `run.mcap`, ..."""

    folder: Path
    names: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """Something to read.

    Attributes:
        name: KIND/WHAT.
        make: writes it into a folder; gives the path to open.
        sound: name of the good file that it was made from; empty where there is none.
        must_refuse: reading it as if it were good would be wrong, whatever it says.
    """

    name: str
    make: Callable[[Path], Path]
    sound: str = ""
    must_refuse: bool = False


def make_sound(folder: Path) -> Sound:
    """Good files of every kind that jetvla reads."""
    folder.mkdir(parents=True)
    for schema in _SCHEMAS:
        made = write_synthetic(folder, schema, side="left", seed=3, height=H, width=W, length=T)
        made.rename(folder / f"{schema}_left.h5")
    with h5py.File(folder / "v1_left.h5") as file:
        frames, actions = file["images"][()], file["actions"][()]
    for name, options in {
        "contiguous_left.h5": {},
        "fletcher_left.h5": {"chunks": (2, H, W, 3), "fletcher32": True},
        "chunked_left.h5": {"chunks": (3, 7, 11, 2), "compression": "lzf", "shuffle": True},
    }.items():
        with h5py.File(folder / name, "w", libver="latest" if "chunked" in name else None) as file:
            file.create_dataset("images", data=frames, **options)
            file["actions"], file["language_instruction"] = actions, TEXT
            file.attrs["total_duration"] = T / 6
    paths = [
        write_episode(
            folder / f"export_{n}.h5", frames[::step], actions[::step], instruction=f"Go {n}", fps=6.0
        )
        for n, step in enumerate((1, -1))
    ]  # fmt: skip
    export_lerobot(paths, folder / "tables", fps=6.0)
    export_lerobot(paths, folder / "videos", fps=6.0, video=True)
    for path in paths:
        path.unlink()
    events = [*drive(T, 1000.0, height=H, width=W), end_of_run(1100.0)]
    record(folder, events).rename(folder / "run.mcap")
    _compressed(folder / "run.mcap", folder / "zstd.mcap")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return Sound(folder, tuple(names))


def opened(sound: Path) -> Path:
    """What to open of a good file: a dataset is read by its episodes."""
    return Path(f"{sound}#0") if sound.is_dir() else sound


def cases(sound: Sound, scale: float = 1.0) -> Iterator[Case]:
    """All of them; `scale` shrinks the number of random ones."""
    yield from _mutations(sound, scale)
    yield from _structures(sound, scale)
    yield from _bombs(sound)
    yield from _elsewhere(sound)


# --- damage ---------------------------------------------------------------------------------------------------------------


def _mutations(sound: Sound, scale: float) -> Iterator[Case]:
    kinds: dict[str, tuple[Callable[[bytes, random.Random], bytes], int]] = {
        "flipped bytes": (_flip, 110),
        "cut off": (_cut, 50),
        "zeroed sectors": (_zero, 60),
        "moved blocks": (_move, 40),
    }
    for name in sound.names:
        source = sound.folder / name
        files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
        for kind, (mutate, count) in kinds.items():
            for number in range(max(1, round(count * scale))):
                inner = files[number % len(files)].relative_to(source)
                yield Case(
                    f"{kind}/{name} {inner} {number}",
                    partial(_mutated, source, inner, mutate, f"{kind}{name}{number}"),
                    name,
                )


def _mutated(
    source: Path, inner: Path, mutate: Callable[[bytes, random.Random], bytes], seed: str, folder: Path
) -> Path:
    target = _copied(source, folder)
    victim = target / inner
    victim.write_bytes(mutate(victim.read_bytes(), random.Random(seed)))
    return opened(target)


def _copied(source: Path, folder: Path) -> Path:
    target = folder / source.name
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    return target


def _flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        # Half of them near the beginning, where most of what is not pixels lies.
        place = rng.randrange(min(len(out), 4096) if rng.random() < 0.5 else len(out))
        out[place] = rng.choice((0, 0xFF, out[place] ^ 1 << rng.randrange(8), rng.randrange(256)))
    return bytes(out)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _zero(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((SECTOR, SECTOR, 8 * SECTOR))
    start = rng.randrange(-(-len(data) // size)) * size
    return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]


def _move(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((8, 64, SECTOR))
    start, end = (rng.randrange(max(1, len(data) - size)) for _ in range(2))
    return data[:end] + data[start : start + size] + data[end + size :]


# --- structure ------------------------------------------------------------------------------------------------------------


_VALUES: tuple[object, ...] = (
    -6.0, 0.0, 1e9, float("nan"), float("inf"), "", "six", b"\xff\xfe", np.array([], "f4"), np.arange(5), h5py.Empty("f4"), True,
    np.array([[b"a", b"b"]]), "x" * 60_000,
)  # fmt: skip
_NAMES = ("fps", "total_duration", "language_instruction", "num_frames", "scenario", "format", "\u03c9")


def _structures(sound: Sound, scale: float) -> Iterator[Case]:
    for name in sound.names:
        if name.endswith(".h5"):
            for number in range(max(2, round(60 * scale))):
                yield Case(f"structure/{name} {number}", partial(_restructured, sound.folder / name, number), name)
        elif (sound.folder / name).is_dir():
            for number in range(max(2, round(60 * scale))):
                yield Case(f"structure/{name} {number}", partial(_rewritten, sound.folder / name, number), name)


def _restructured(source: Path, seed: int, folder: Path) -> Path:
    """One to three changes through h5py."""
    path, rng = _copied(source, folder), random.Random(f"{source.name}{seed}")
    with h5py.File(path, "a") as file:
        for _ in range(rng.choice((1, 1, 2, 3))):
            names = _datasets(file)
            if not names:
                break
            with suppress(
                OSError, TypeError, ValueError, MemoryError, RuntimeError
            ):  # what h5py cannot make is passed over
                _changed(file, rng.choice(names), rng)
    return path


def _changed(file: h5py.File, name: str, rng: random.Random) -> None:
    """One change."""
    change = rng.randrange(9) if file[name].shape else 1
    if change == 0:
        file.attrs[rng.choice(_NAMES)] = rng.choice(_VALUES)
    elif change == 1:
        del file[name]
    elif change == 2:
        _replaced(file, name, rng.choice(_VALUES))
    elif change == 3:
        _replaced(file, name, None, shape=file[name].shape, dtype=file[name].dtype)
    elif change == 4:
        shape = tuple(rng.choice((0, 1, side, side + 1, 1 << 33)) for side in file[name].shape)
        _replaced(file, name, None, shape=shape, dtype=file[name].dtype, chunks=True if 0 not in shape else None)
    elif change == 5 and file[name].dtype.kind in "fiu":
        _replaced(file, name, file[name][()].astype(rng.choice((">f8", "<f2", ">i4", "u1", "?"))))
    elif change == 6:
        data = file[name][()]
        _replaced(file, name, h5py.SoftLink(rng.choice((f"/{name}", "/gone", "/copy", "../x"))))
        if "copy" not in file:
            file["copy"] = data
    elif change == 7 and file[name].ndim:
        kept = file[name][: max(1, len(file[name]) - rng.randrange(3))]
        _replaced(file, name, None, shape=file[name].shape, dtype=file[name].dtype)
        file[name][: len(kept)] = kept
    elif rng.random() < 0.5 and "z" not in file:
        file.move(name, "z")
    else:
        file.attrs[rng.choice(_NAMES)] = rng.choice(_VALUES)


def _datasets(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _replaced(file: h5py.File, name: str, value: Any, **options: Any) -> None:
    del file[name]
    if value is None:
        file.create_dataset(name, **options)
    else:
        file[name] = value


def _rewritten(source: Path, seed: int, folder: Path) -> Path:
    """One change to a dataset's tables or to its info."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    target, rng = _copied(source, folder), random.Random(f"{source.name}{seed}")
    tables = sorted(target.rglob("*.parquet"))
    if seed % 3 == 0:
        path = target / "meta/info.json"
        content = json.loads(path.read_text())
        holder = rng.choice((content, content["features"], content["features"]["action"]))
        key = rng.choice(sorted(holder))
        if rng.random() < 0.3:
            del holder[key]
        else:
            holder[key] = rng.choice((None, -1, 0, 1e300, "x", [], {}, [[]], True, "../{x}", "/etc/passwd", 10**30))
        path.write_text(json.dumps(content))
        return opened(target)
    path = rng.choice(tables)
    table = pq.read_table(path)
    place = rng.randrange(table.num_columns)
    name = table.column_names[place]
    change = rng.randrange(4)
    if change == 0:
        table = table.drop_columns([name])
    elif change == 1:
        other = rng.choice(
            (
                pa.nulls(len(table)),
                pa.array(["x"] * len(table)),
                pa.array([1e300] * len(table)),
                pa.array([-1] * len(table)),
            )
        )
        table = table.set_column(place, name, other)
    elif change == 2:
        table = table.take(rng.sample(range(len(table)), len(table)))
    else:
        table = table.slice(0, rng.randrange(len(table)))
    pq.write_table(table, path)
    return opened(target)


# --- bombs ----------------------------------------------------------------------------------------------------------------


def _bombs(sound: Sound) -> Iterator[Case]:
    jpegs: dict[str, Callable[[], bytes]] = {
        "13,000 pixels squared": partial(_large_jpeg, 13_000),
        "20,000 scans": partial(_scans, 20_000),
    }
    for name, make in jpegs.items():
        yield Case(f"bombs/JPEG of {name} in HDF5", partial(_jpeg_h5, sound, make), must_refuse=True)
        yield Case(f"bombs/JPEG of {name} in a table", partial(_jpeg_table, sound, make), must_refuse=True)
    for number, build in enumerate((
        _many_frames, _sparse_actions, _heap_attribute, _dense_attribute, _heap_text, _fixed_text, _packed_text, _packed_actions,
        _growing_chunk, _tiny_chunks, _huge_frames, _zstd_chunk, _shared_chunk, _many_attributes, _many_groups, _many_datasets,
        _circle, _black_frames, _packed_frames, _growing_frames, _many_vlen_frames,
    )):  # fmt: skip
        yield Case(
            f"bombs/{number} {build.__name__.strip('_').replace('_', ' ')} in HDF5",
            partial(_built, build),
            must_refuse=True,
        )
    for build in (
        _info_large, _info_deep, _info_many, _table_rows, _table_dictionary, _table_packed, _task_large, _task_dictionary, _video_large,
        _table_values,
    ):  # fmt: skip
        name = f"bombs/{build.__name__.strip('_').replace('_', ' ')} in LeRobot"
        yield Case(name, partial(_rebuilt, sound, build), must_refuse=True)
    for record_bomb in (_mcap_packed, _mcap_declared, _mcap_messages, _mcap_lz4, _mcap_settings, _mcap_metadata):
        name = f"bombs/{record_bomb.__name__.strip('_').replace('_', ' ')} in MCAP"
        yield Case(name, partial(_re_recorded, sound, record_bomb), "run.mcap")


def _built(build: Callable[[h5py.File], object], folder: Path) -> Path:
    path = folder / "bomb_left.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["language_instruction"] = TEXT
        build(file)
        if "actions" not in file:
            file["actions"] = np.ones((T, 3), np.float32)
        if "images" not in file and "observations" not in file:
            file["images"] = np.random.default_rng(0).integers(1, 255, (T, H, W, 3), np.uint8)
    return path


def _many_frames(file: h5py.File) -> None:
    """A billion frames, and twelve gigabytes of actions."""
    file.create_dataset("images", (10**9, 4, 4, 3), np.uint8, chunks=(1000, 4, 4, 3))[0] = 1
    file.create_dataset("actions", (10**9, 3), np.float32, chunks=(10**6, 3))[0] = 1


def _sparse_actions(file: h5py.File) -> None:
    """The same with a place in the file for each, which takes no room on the disk."""
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    for name, shape, kind in (("images", (10**9, 1, 1, 3), h5t.STD_U8LE), ("actions", (10**9, 3), h5t.IEEE_F32LE)):
        h5d.create(file.id, name.encode(), kind, h5s.create_simple(shape), properties)


def _heap_attribute(file: h5py.File) -> None:
    file.attrs["note"] = "x" * (300 * _MB)


def _dense_attribute(file: h5py.File) -> None:
    file.attrs.create("note", np.zeros(300 * _MB, np.uint8))


def _heap_text(file: h5py.File) -> None:
    del file["language_instruction"]
    file["language_instruction"] = ["x" * (1 << 30)]


def _fixed_text(file: h5py.File) -> None:
    del file["language_instruction"]
    kind = h5t.C_S1.copy()
    kind.set_size(5 * 10**9)
    h5d.create(file.id, b"language_instruction", kind, h5s.create_simple((1,)))


def _packed_text(file: h5py.File) -> None:
    del file["language_instruction"]
    _packed(file, "language_instruction", (1,), np.dtype(f"S{1 << 30}"), (1,), 1 << 30)


def _packed_actions(file: h5py.File) -> None:
    """2.4 GB of actions in 2 MB."""
    count = 200_000_000
    file.create_dataset("images", (count, 1, 1, 3), np.uint8, chunks=(10**6, 1, 1, 3))
    _packed(file, "actions", (count, 3), np.dtype("f4"), (count, 3), count * 12)


def _growing_chunk(file: h5py.File) -> None:
    """A chunk that declares 96 bytes and unpacks to 2.4 GB."""
    _packed(file, "actions", (T, 3), np.dtype("f4"), (T, 3), 2_400_000_000)


def _growing_frames(file: h5py.File) -> None:
    _packed(file, "images", (T, H, W, 3), np.dtype("u1"), (T, H, W, 3), 2_400_000_000)


def _packed(file: h5py.File, name: str, shape: tuple[int, ...], kind: Any, chunks: tuple[int, ...], size: int) -> None:
    """One chunk of zeros, compressed."""
    dataset = file.create_dataset(name, shape, kind, chunks=chunks, compression="gzip")
    dataset.id.write_direct_chunk((0,) * len(shape), _zeros(size))


@cache
def _zeros(size: int) -> bytes:
    packer = zlib.compressobj(1)
    block = bytes(16 * _MB)
    pieces = [packer.compress(block[: min(len(block), size - start)]) for start in range(0, size, len(block))]
    return b"".join([*pieces, packer.flush()])


def _tiny_chunks(file: h5py.File) -> None:
    file.create_dataset("images", (T, 240, 320, 3), np.uint8, chunks=(1, 1, 1, 1))[0, :40] = 7


def _huge_frames(file: h5py.File) -> None:
    file.create_dataset("images", (T, 30_000, 30_000, 3), np.uint8, chunks=(1, 1000, 1000, 3))


def _black_frames(file: h5py.File) -> None:
    """Six thousand pixels squared, each frame a few kilobytes."""
    shape = (300, 6000, 6000, 3)
    dataset = file.create_dataset("images", shape, np.uint8, chunks=(1, *shape[1:]), compression="gzip")
    for index in range(shape[0]):
        dataset.id.write_direct_chunk((index, 0, 0, 0), _zeros(6000 * 6000 * 3))
    file["actions"] = np.ones((shape[0], 3), np.float32)


def _packed_frames(file: h5py.File) -> None:
    """A chunk of 300 MB holds all frames: unpacked for each of them, that takes minutes."""
    shape = (5000, 160, 128, 3)
    _packed(file, "images", shape, np.dtype("u1"), shape, int(np.prod(shape)))
    file["actions"] = np.ones((shape[0], 3), np.float32)


def _zstd_chunk(file: h5py.File) -> None:
    """A frame of Zstandard whose header declares 8 GB."""
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_chunk((T, H, W, 3))
    with suppress(ImportError):
        import_module("hdf5plugin")
    if h5py.h5z.filter_avail(32015):
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    else:
        properties.set_deflate(3)
    made = h5d.create(file.id, b"images", h5t.STD_U8LE, h5s.create_simple((T, H, W, 3)), properties)
    made.write_direct_chunk((0,) * 4, b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 8 << 30) + bytes(64))


def _shared_chunk(file: h5py.File) -> None:
    """250,000 frames of which one was written."""
    file.create_dataset("images", (250_000, H, W, 3), np.uint8, chunks=(1, H, W, 3))[0] = 9
    file["actions"] = np.ones((250_000, 3), np.float32)


def _many_attributes(file: h5py.File) -> None:
    for number in range(100_000):
        file.attrs.create(f"a{number}", 1)


def _many_groups(file: h5py.File) -> None:
    """Nested ten thousand deep, and nothing that is an episode."""
    del file["language_instruction"]
    group = file
    for _ in range(10_000):
        group = group.create_group("g")
    file["observations"] = 1


def _many_datasets(file: h5py.File) -> None:
    for number in range(50_000):
        file.create_dataset(f"d{number}", (), "u1")
    file["observations"] = 1


def _circle(file: h5py.File) -> None:
    group = file.create_group("g")
    group["up"] = file["/"]
    file["images"] = h5py.SoftLink("/g/up/images")


def _many_vlen_frames(file: h5py.File) -> None:
    """JPEG frames, all of them the same bytes: 250,000 of 1.5 megapixels."""
    images = file.create_dataset(
        "observations/images", (250_000,), h5py.vlen_dtype(np.uint8), chunks=(250_000,), compression="gzip"
    )
    one = file.create_dataset("one", (1,), h5py.vlen_dtype(np.uint8))
    one[0] = np.frombuffer(_large_jpeg(1200), np.uint8)
    file.flush()
    with Path(file.filename).open("rb") as raw:
        raw.seek(one.id.get_offset())
        reference = raw.read(16)
    images.id.write_direct_chunk((0,), zlib.compress(reference * 250_000, 1))
    file["actions"] = np.ones((250_000, 3), np.float32)


@cache
def _large_jpeg(side: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (side, side), 128).save(out, "JPEG", quality=30)
    return out.getvalue()


@cache
def _scans(count: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (2048, 2048), 128).save(out, "JPEG", progressive=True, quality=30)
    data = out.getvalue()
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * (count - data.count(b"\xff\xda")) + data[-2:]


def _jpeg_h5(sound: Sound, make: Callable[[], bytes], folder: Path) -> Path:
    path = _copied(sound.folder / "v5_jpeg_left.h5", folder)
    with h5py.File(path, "a") as file:
        file["observations/images"][2] = np.frombuffer(make(), np.uint8)
    return path


def _jpeg_table(sound: Sound, make: Callable[[], bytes], folder: Path) -> Path:
    def change(target: Path) -> None:
        _with_images(target, lambda count: [make()] * count)

    return _rebuilt(sound, change, folder)


def _rebuilt(sound: Sound, build: Callable[[Path], object], folder: Path) -> Path:
    target = _copied(sound.folder / ("videos" if "video" in getattr(build, "__name__", "") else "tables"), folder)
    build(target)
    return opened(target)


def _with_images(target: Path, images: Callable[[int], list[bytes]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = next(target.glob("data/*/*.parquet"))
    table = pq.read_table(path)
    place = next(n for n, name in enumerate(table.column_names) if "image" in name)
    column = pa.array(
        [{"bytes": image, "path": None} for image in images(len(table))], type=table.schema.field(place).type
    )
    pq.write_table(
        table.set_column(place, table.column_names[place], column),
        path,
        compression="zstd",
        dictionary_pagesize_limit=1 << 30,
    )


def _info_large(target: Path) -> None:
    with (target / "meta/info.json").open("r+b") as file:
        file.seek(0, 2)
        file.truncate(2 << 30)


def _info_deep(target: Path) -> None:
    (target / "meta/info.json").write_text("[" * 2_000_000)


def _info_many(target: Path) -> None:
    path = target / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total_episodes": 10**6, "total_frames": 10**9}))


def _table_rows(target: Path) -> None:
    """Three hundred million rows of the same values, in a few kilobytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = next(target.glob("data/*/*.parquet"))
    table = pq.read_table(path)
    block = pa.concat_tables([table.slice(0, 1)] * 100_000).combine_chunks()
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(300):
            writer.write_table(block, row_group_size=len(block))


def _table_values(target: Path) -> None:
    """One action of a hundred million values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = next(target.glob("data/*/*.parquet"))
    table = pq.read_table(path)
    place = table.column_names.index("action")
    values = pa.array(np.zeros(100_000_000, np.float32))
    offsets = pa.array(np.array([0] * len(table) + [len(values)], np.int32))
    pq.write_table(table.set_column(place, "action", pa.ListArray.from_arrays(offsets, values)), path)


def _table_dictionary(target: Path) -> None:
    """A picture of 30 MB for every row, stored once."""
    _with_images(target, lambda count: [b"\xff\xd8" + bytes(30 * _MB)] * count)


def _table_packed(target: Path) -> None:
    """Pictures of zeros that differ, of a gigabyte in a few kilobytes."""
    _with_images(target, lambda count: [b"\xff\xd8" + bytes([number]) + bytes(70 * _MB) for number in range(count)])


def _task_large(target: Path) -> None:
    _with_tasks(target, ["x" * (500 * _MB)])


def _task_dictionary(target: Path) -> None:
    _with_tasks(target, ["x" * (4 * _MB)] * 400)


def _with_tasks(target: Path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"task_index": np.arange(len(texts)), "task": pa.array(texts, pa.large_string())})
    pq.write_table(table, target / "meta/tasks.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30)


def _video_large(target: Path) -> None:
    """Frames of 8000 x 8000 in one that should have 24 x 32."""
    import av

    with av.open(str(next(target.rglob("*.mp4"))), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=6)
        stream.width = stream.height = 8000
        stream.pix_fmt = "yuv420p"
        for _ in range(2 * T):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.zeros((8000, 8000), np.uint8), format="gray").reformat(
                        format="yuv420p"
                    )
                )
            )
        container.mux(stream.encode(None))


# --- recordings -----------------------------------------------------------------------------------------------------------


def _compressed(source: Path, target: Path) -> None:
    """A recording again, with chunks compressed by Zstandard, as `mcap compress` makes it."""
    from mcap.reader import make_reader
    from mcap.writer import CompressionType, Writer

    with source.open("rb") as reading, target.open("wb") as writing:
        reader, writer = make_reader(reading), Writer(writing, compression=CompressionType.ZSTD, chunk_size=4096)
        writer.start()
        schemas: dict[int, int] = {}
        channels: dict[int, int] = {}
        for schema, channel, message in reader.iter_messages():
            assert schema is not None
            if schema.id not in schemas:
                schemas[schema.id] = writer.register_schema(schema.name, schema.encoding, schema.data)
            if channel.id not in channels:
                channels[channel.id] = writer.register_channel(
                    channel.topic, channel.message_encoding, schemas[schema.id]
                )
            writer.add_message(channels[channel.id], message.log_time, message.data, message.publish_time)
        for metadata in reader.iter_metadata():
            writer.add_metadata(metadata.name, metadata.metadata)
        writer.finish()


def _re_recorded(sound: Sound, build: Callable[[], bytes], folder: Path) -> Path:
    """A record put into an unfinished recording, before everything else but its header."""
    path = _copied(sound.folder / "run.mcap", folder)
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data, 9)
    place = 8 + 9 + length
    path.write_bytes(data[:place] + build() + data[place:])
    return path


def _record(opcode: int, body: bytes) -> bytes:
    return struct.pack("<BQ", opcode, len(body)) + body


def _chunk(compression: str, packed: bytes, size: int) -> bytes:
    name = compression.encode()
    head = struct.pack("<QQQII", 0, 0, size, 0, len(name)) + name + struct.pack("<Q", len(packed))
    return _record(6, head + packed)


def _mcap_packed() -> bytes:
    import zstandard

    return _chunk("zstd", zstandard.compress(bytes(1 << 30)), 1 << 30)


def _mcap_declared() -> bytes:
    return _chunk("zstd", b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 8 << 30) + bytes(64), 1000)


def _mcap_lz4() -> bytes:
    import lz4.frame

    return _chunk("lz4", lz4.frame.compress(bytes(1 << 30)), 1000)


def _mcap_messages() -> bytes:
    """Three million messages without content."""
    import zstandard

    channel = _record(4, struct.pack("<HHI", 9, 0, 1) + b"t" + struct.pack("<I", 0) + struct.pack("<I", 0))
    messages = channel + _record(5, struct.pack("<HIQQ", 9, 0, 0, 0)) * 3_000_000
    return _chunk("zstd", zstandard.compress(messages), len(messages))


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


def _mcap_settings() -> bytes:
    settings = _text("settings") + _text("[" * 1_000_000)
    return _record(0x0C, _text("jetvla") + struct.pack("<I", len(settings)) + settings)


def _mcap_metadata() -> bytes:
    texts = b"".join(_text(f"k{number}") + _text("") for number in range(3_000_000))
    return _record(0x0C, _text("jetvla") + struct.pack("<I", len(texts)) + texts)


# --- files elsewhere ------------------------------------------------------------------------------------------------------


def _elsewhere(sound: Sound) -> Iterator[Case]:
    """Named pipes, devices, and files of the machine that are none of the episode's."""
    for kind in ("pipe", "device", "file"):
        for way in ("external storage", "external link", "virtual source"):
            yield Case(f"elsewhere/{kind} by {way}", partial(_led_away, kind, way), must_refuse=True)
    for name in sound.names:
        source = sound.folder / name
        files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
        for inner in files:
            for kind in ("pipe", "device"):
                make = partial(_exchanged, source, inner.relative_to(source), kind)
                yield Case(
                    f"elsewhere/{kind} for {name} {inner.relative_to(source)}",
                    make,
                    must_refuse=inner.name != "stats.json",
                )
    yield Case("elsewhere/playlist for a video", partial(_rebuilt, sound, _playlist_video), must_refuse=True)


def _target(kind: str, folder: Path) -> Path:
    if kind == "pipe":
        os.mkfifo(folder / "pipe")
        (folder / "link").symlink_to("pipe")
        return folder / "link"
    return Path("/dev/zero" if kind == "device" else "/etc/passwd")


def _led_away(kind: str, way: str, folder: Path) -> Path:
    target, path = _target(kind, folder), folder / "away_left.h5"
    with h5py.File(path, "w") as file:
        file["actions"], file["language_instruction"] = np.ones((T, 3), np.float32), TEXT
        if way == "external storage":
            file.create_dataset("images", (T, 2, 2, 3), np.uint8, external=[(str(target), 0, h5py.h5f.UNLIMITED)])
        elif way == "external link":
            file["images"] = h5py.ExternalLink(str(target), "/images")
        else:
            layout = h5py.VirtualLayout((T, 2, 2, 3), np.uint8)
            layout[:] = h5py.VirtualSource(str(target), "images", (T, 2, 2, 3))
            file.create_virtual_dataset("images", layout)
    return path


def _exchanged(source: Path, inner: Path, kind: str, folder: Path) -> Path:
    copied = _copied(source, folder)
    (copied / inner).unlink()
    (copied / inner).symlink_to(_target(kind, folder))
    return opened(copied)


def _playlist_video(target: Path) -> None:
    next(target.rglob("*.mp4")).write_text("ffconcat version 1.0\nfile /etc/passwd\n")
