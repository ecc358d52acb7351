"""Reads the tables of a LeRobot dataset: small columns as a whole, images for one episode at a time.

Images are JPEG or PNG files inside a column. Parquet stores columns in groups of rows, so those of one episode are fetched together, at
the first frame that is asked for.

Needs pyarrow. Knows nothing about what the columns mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bundle.errors import EpisodeError, PictureError
from episodes.container import reading
from episodes.lerobot_info import COPY_AGAIN
from episodes.pictures import decode_picture


@dataclass
class TableFrames:
    """Images of rows `first` to `first + count - 1` of a table; fetched at the first read.

    Attributes:
        name: of the episode, for errors.
        path: of the table.
        column: that holds the images.
    """

    name: str
    path: Path
    column: str
    first: int
    count: int
    _images: list[bytes | None] | None = field(default=None, repr=False)
    _closed: bool = field(default=False, repr=False)

    def __bool__(self) -> bool:
        return not self._closed

    def stored(self) -> list[bytes | None]:
        """All images as they are stored; None where there is none.

        Raises:
            EpisodeError: the table cannot be read.
        """
        if self._images is None:
            with reading(self.path, self.column), pq.ParquetFile(self.path) as file:
                self._images = _slice(file, self.column, self.first, self.count).field("bytes").to_pylist()
        return self._images

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Frame `index` as a new uint8 [H, W, 3] RGB array.

        Raises:
            EpisodeError: it is missing or damaged.
        """
        image = self.stored()[index]
        try:
            if image is None:
                raise ValueError("the table does not hold the image")
            return decode_picture(image)
        except (PictureError, ValueError) as error:
            raise EpisodeError(
                f"{self.name}: frame {index} of {self.count} is corrupt",
                got=error.got if isinstance(error, PictureError) else error,
                expected="a complete JPEG or PNG image of 8 bits a channel",
                hint="copy the dataset again; if it is like this at its source too, leave the episode out.",
            ) from error

    def read_jpeg(self, index: int) -> bytes | None:
        """The stored bytes of frame `index` where they are JPEG, unchecked, else None."""
        image = self.stored()[index]
        return image if image is not None and image.startswith(b"\xff\xd8") else None

    def close(self) -> None:
        """Forget the images."""
        self._closed, self._images = True, None


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Small columns of a table.

    Raises:
        EpisodeError: the file is missing or damaged, or lacks a column or a value.
    """
    with reading(path, "the table"), pq.ParquetFile(path) as file:
        table = file.read(columns=list(columns), use_threads=False)
    missing = [name for name in columns if name not in table.column_names]
    empty = [name for name in table.column_names if table.column(name).null_count]
    if missing or empty:
        raise EpisodeError(
            f"{path} lacks " + ("columns" if missing else "values"),
            got=f"none in {', '.join(missing or empty)}",
            expected=", ".join(columns),
            hint=COPY_AGAIN,
        )
    return table


def _slice(file: pq.ParquetFile, column: str, first: int, count: int) -> pa.StructArray:
    """Rows of one column, from the row groups that hold them."""
    starts = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))])
    low = int(np.searchsorted(starts, first, side="right")) - 1
    high = int(np.searchsorted(starts, first + count, side="left"))
    table = file.read_row_groups(list(range(low, high)), columns=[column], use_threads=False)
    return table.column(column).slice(first - int(starts[low]), count).combine_chunks()
