"""Episodes on which libhdf5 never ends, although nothing that is looked at beforehand is wrong with them."""

from __future__ import annotations

import struct
from pathlib import Path

import h5py
import numpy as np

from episodes.synthetic import write_synthetic

_BYTES = 4096


def write_hanging(folder: Path, *, where: str = "language_instruction") -> Path:
    """A V5 episode whose instruction, or first picture, lies in a damaged collection of the heap, within another dataset's storage.

    Args:
        where: language_instruction hangs who opens the file, observations/images who reads frame 0.
    """
    path = write_synthetic(folder, "v5_jpeg", side="left", seed=7, height=24, width=32, length=6)
    with h5py.File(path, "a") as file:
        del file["language_instruction"]
        file.create_dataset("language_instruction", data=np.array(["Go left"], object), dtype=h5py.string_dtype())
        # Whatever follows the header are zeros: objects of no size, over which the library steps for ever.
        collection = b"GCOL\x01\0\0\0" + struct.pack("<Q", _BYTES) + bytes(_BYTES - 16)
        file["hidden"] = np.frombuffer(collection, np.uint8)
        file.flush()
        place, reference = file["hidden"].id.get_offset(), file[where].id.get_offset()
    data = bytearray(path.read_bytes())
    data[reference + 4 : reference + 12] = struct.pack("<Q", place)
    path.write_bytes(data)
    return path
