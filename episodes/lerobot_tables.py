"""Reads the tables of a LeRobot dataset: small columns as a whole, images for one episode at a time.

Images are JPEG or PNG files inside a column. Parquet stores columns in groups of rows, so those of one episode are fetched together, at
the first frame that is asked for.

Needs pyarrow. Knows nothing about what the columns mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bundle.errors import EpisodeError, PictureError
from bundle.reading_limits import (
    CONFIG_BYTES,
    TABLE_BYTES_A_BYTE,
    TABLE_FREE_BYTES,
    TABLE_HEADER_ITEMS,
    TABLE_ROWS,
    TABLE_VALUES,
    check_regular_file,
)
from episodes.container import reading
from episodes.lerobot_info import COPY_AGAIN
from episodes.pictures import decode_picture
from episodes.pixel_budget import PixelBudget

_AT_A_TIME = 4


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
    _budget: PixelBudget = field(default_factory=lambda: PixelBudget(0), repr=False)
    _closed: bool = field(default=False, repr=False)

    def __bool__(self) -> bool:
        return not self._closed

    def stored(self) -> list[bytes | None]:
        """All images as they are stored; None where there is none.

        Raises:
            EpisodeError: the table cannot be read.
        """
        if self._images is None:
            with open_table(self.path, [self.column]) as file, reading(self.path, self.column):
                self._images = _images(file, self.column, self.first, self.count, self.path)
            self._budget = PixelBudget(self.path.stat().st_size)
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
            picture = decode_picture(image)
            if reason := self._budget.exceeded(index, picture.nbytes):
                raise ValueError(reason)
            return picture
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


@contextmanager
def open_table(path: Path, columns: Sequence[str] | None = None, **options: Any) -> Iterator[pq.ParquetFile]:
    """Open a table of which `columns` (by default all) are small enough to be read.

    Checksums of pages are checked where they are stored; our own tables have them.

    Raises:
        EpisodeError: no regular file, damaged, or of an absurd size.
    """
    size = check_regular_file(path, error=EpisodeError, hint=COPY_AGAIN).st_size
    with reading(path, "the table"):
        file = pq.ParquetFile(
            path,
            thrift_string_size_limit=min(size, CONFIG_BYTES),
            thrift_container_size_limit=TABLE_HEADER_ITEMS,
            page_checksum_verification=True,
            **options,
        )
    with file:
        with reading(path, "the table"):
            rows, values, unpacked = _size(file.metadata, columns)
        most = TABLE_FREE_BYTES + TABLE_BYTES_A_BYTE * size
        if rows > TABLE_ROWS or values > TABLE_VALUES or unpacked > most:
            raise EpisodeError(
                f"{path} is of an absurd size",
                got=f"{rows} rows, {values} values, {unpacked} bytes unpacked from {size}",
                expected=f"at most {TABLE_ROWS} rows, {TABLE_VALUES} values, {most} bytes",
                hint="leave the dataset out; no recorder writes such a table.",
            )
        yield file


def _size(metadata: pq.FileMetaData, columns: Sequence[str] | None) -> tuple[int, int, int]:
    """Rows, values and bytes of `columns`."""
    values = unpacked = 0
    for group in range(metadata.num_row_groups):
        parts = metadata.row_group(group)
        for place in range(metadata.num_columns):
            part = parts.column(place)
            name = part.path_in_schema
            if columns is None or any(name == column or name.startswith(f"{column}.") for column in columns):
                values += part.num_values
                unpacked += part.total_uncompressed_size
    return metadata.num_rows, values, unpacked


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Small columns of a table.

    Raises:
        EpisodeError: the file is missing or damaged, or lacks a column or a value.
    """
    with open_table(path, columns) as file, reading(path, "the table"):
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


def _images(file: pq.ParquetFile, column: str, first: int, count: int, path: Path) -> list[bytes | None]:
    """Rows of a column of images, from the row groups that hold them; a few at a time, as a table can name one image for all rows."""
    starts = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))])
    low = int(np.searchsorted(starts, first, side="right")) - 1
    high = int(np.searchsorted(starts, first + count, side="left"))
    most = TABLE_FREE_BYTES + TABLE_BYTES_A_BYTE * path.stat().st_size
    images: list[bytes | None] = []
    held, row = 0, int(starts[low])
    for batch in file.iter_batches(_AT_A_TIME, row_groups=list(range(low, high)), columns=[column], use_threads=False):
        for image in batch.column(0).slice(min(len(batch), max(0, first - row)), count - len(images)).field("bytes"):
            images.append(image.as_py())
            held += len(images[-1] or b"")
        row += len(batch)
        if held > most:
            raise ValueError(f"{held} bytes of images, more than {most}")
        if len(images) == count:
            break
    return images
