"""Makes checkpoints that look as the labs' do, with random weights: for tests, demos, and rehearsals without a robot.

The layout is exact to the key (see synthetic_layout), the numbers behave like a trained net's (see synthetic_weights),
and beside the checkpoint stands the base directory that its config names. Everything follows from the options and their
seed. A full-size file is made in the memory of its own tensors: they are drawn in place and written without a copy.
"""

from __future__ import annotations

import json
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bundle.atomic import disk_errors, write_bytes
from bundle.errors import StorageError
from train.robovlms_layout import Key
from train.synthetic_layout import SyntheticOptions, dimensions, is_trained, state_keys
from train.synthetic_records import BASE_FOLDER, STEPS, lightning_records
from train.synthetic_tokenizer import make_tokenizer
from train.synthetic_weights import random_weight

__all__ = ["SyntheticFiles", "SyntheticOptions", "make_checkpoint", "total_bytes"]

Progress = Callable[[int], None]
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class SyntheticFiles:
    """What was written: the Lightning file and the Hugging Face directory that its config names."""

    checkpoint: Path
    base: Path


def make_checkpoint(folder: Path, options: SyntheticOptions, progress: Progress | None = None) -> SyntheticFiles:
    """Write a checkpoint and its base directory into `folder`, each file entirely or not at all.

    Args:
        progress: gets the size of each piece of work; they add up to about `total_bytes(options)`.

    Raises:
        ConfigError: options that no policy can have.
        StorageError: `folder` is not one, or the disk is full; a file that did not fit leaves the old one as it was.
    """
    report = progress or _ignore
    files = SyntheticFiles(folder / f"epoch=0-step={STEPS}.ckpt", folder / BASE_FOLDER)
    keys = state_keys(options)
    _make_folder(files.base)
    shapes = {key.name: key.shape for key in keys}
    scaling = dimensions(options.size).lora_scaling
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensors[name] = random_weight(name, shape, seed=options.seed, lora_scaling=scaling)
        report(tensors[name].nbytes)
    _write_base(files.base, options, tensors, report)
    _write_lightning(files.checkpoint, options, keys, tensors, report)
    return files


def total_bytes(options: SyntheticOptions) -> int:
    """How much `make_checkpoint` will report: every byte that it draws or writes."""
    shapes = {key.name: key.shape for key in state_keys(options)}
    drawn = sum(shape.numel() for shape in shapes.values())
    moments = 2 * sum(shape.numel() for name, shape in shapes.items() if is_trained(name))
    base = sum(shape.numel() for name, shape in shapes.items() if not is_trained(name)) if options.base_weights else 0
    return _FLOAT_BYTES * (drawn + base + drawn + moments)


def _write_lightning(
    path: Path, options: SyntheticOptions, keys: list[Key], tensors: Mapping[str, Tensor], report: Progress
) -> None:
    state = OrderedDict((key.raw, tensors[key.name]) for key in keys)
    # Where nn.Module.state_dict leaves its versions; weights-only unpicklers must cope with it.
    state._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    moments = _adamw_state(options, {name: tensor for name, tensor in tensors.items() if is_trained(name)})
    records = lightning_records(options, state, moments)
    with _new_file(path, report) as file:
        try:
            torch.save(records, file)  # type: ignore[arg-type] # it needs write and flush only
        except RuntimeError:
            # torch reports a failed write as a defect of its archive; the file knows what the system said.
            if file.error is not None:
                raise file.error from None
            raise


def _adamw_state(options: SyntheticOptions, trained: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """AdamW's moments after STEPS steps with small random gradients."""
    state = {}
    for index, (name, tensor) in enumerate(trained.items()):
        gradient = random_weight(f"gradient of {name}", tensor.shape, seed=options.seed, lora_scaling=1.0)
        squares = gradient.square().mul_(1e-6)
        state[index] = {"step": torch.tensor(float(STEPS)), "exp_avg": gradient.mul_(1e-3), "exp_avg_sq": squares}
    return state


def _write_base(folder: Path, options: SyntheticOptions, tensors: Mapping[str, Tensor], report: Progress) -> None:
    kosmos = dimensions(options.size).kosmos
    config = {"architectures": ["Kosmos2ForConditionalGeneration"], **kosmos.to_diff_dict()}
    write_bytes(folder / "config.json", f"{json.dumps(config, indent=2)}\n".encode())
    tokenizer = make_tokenizer(kosmos.text_config.vocab_size)
    write_bytes(folder / "tokenizer.json", tokenizer.to_str().encode())
    weights = folder / "model.safetensors"
    if options.base_weights:
        origin = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if not is_trained(name)}
        with _new_file(weights, report) as file:
            _write_safetensors(file, origin)
    else:
        weights.unlink(missing_ok=True)


def _write_safetensors(file: _CountedFile, tensors: Mapping[str, Tensor]) -> None:
    """Tensor by tensor without a copy, in the format of https://github.com/huggingface/safetensors.

    The library's own writer takes all tensors at once, and tells neither its progress nor what the system said.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        file.write(tensor.numpy().data.cast("B"))


class _CountedFile:
    """A file that reports what is written, and keeps the error that stopped it."""

    def __init__(self, file: BinaryIO, report: Progress) -> None:
        self._file = file
        self._report = report
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            count = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._report(len(data))
        return count

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def _new_file(path: Path, report: Progress) -> Iterator[_CountedFile]:
    """A temporary sibling that takes the name `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            with temporary.open("wb") as file:
                yield _CountedFile(file, report)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(path: Path) -> None:
    try:
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise StorageError(
            f"cannot make the folder {path}",
            got=error.strerror,
            expected="a folder, or a new path in a folder that can be written",
            hint="choose another --out.",
        ) from None


def _ignore(count: int) -> None:
    pass
