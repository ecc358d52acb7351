"""One engine, loaded: its record checked, its bytes mapped, its context ready to enqueue. Knows nothing about what the engine computes."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bundle import engine_cache
from bundle.atomic import write_bytes
from bundle.engine_cache import EngineRecord
from bundle.errors import DeviceError, EngineError, StorageError
from runtime.gpu import Cuda
from runtime.tensorrt_flavour import TensorRT


class LoadedEngine:
    """An engine with its context. The runtime must outlive the engine, the engine the context, and scratch memory too."""

    def __init__(self, cuda: Cuda, tensorrt: TensorRT, folder: Path, record: EngineRecord, *, verify: bool) -> None:
        self.record = record
        self._cuda, self._scratch = cuda, 0
        path = folder / record.file
        if verify:
            engine_cache.verify(folder, record)
        self._jit_path = path.with_suffix(".jit")
        self._jit = b""
        with suppress(OSError):
            self._jit = self._jit_path.read_bytes()
        self.runtime = tensorrt.runtime()
        try:
            # Mapped, so that the file's pages can be given back at once: on a Jetson they share memory with the engine.
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                self.engine = tensorrt.deserialize(self.runtime, content, record.file)
        except (OSError, ValueError) as error:  # a policy may want another length's engine long after the first look
            raise EngineError(
                f"{path} cannot be read",
                got=f"{type(error).__name__}: {error}",
                expected="the engine that was here when the policy was loaded",
                hint="python export/build_engines.py --engines-only BUNDLE builds the engines for this machine.",
            ) from None
        self.context, self._compiled = tensorrt.context(self.engine, self._jit)
        if self.context is None:
            raise EngineError(
                f"TensorRT cannot make a context for {record.file}",
                got=tensorrt.log.errors(),
                hint="out of GPU memory most likely: close other programs, or use an fp16 bundle.",
            )
        self.tensors = {item.tensor.name: item.tensor for item in tensorrt.tensors(self.engine)}
        self.enqueue: Callable[[int], bool] = lambda stream: False
        if size := tensorrt.scratch_bytes(self.engine):
            self._scratch = cuda.allocate(size)
            try:
                self.context.set_device_memory(self._scratch, size)
            except BaseException:
                self.close()
                raise

    def keep_compiled(self) -> None:
        """Write down what TensorRT-RTX compiled for this GPU, so that the next start need not; a read-only bundle is no reason to fail."""
        if self._compiled is None:
            return
        with suppress(OSError, StorageError):
            compiled = self._compiled.serialize()
            content = b"" if compiled is None else bytes(compiled)
            if content and content != self._jit:
                write_bytes(self._jit_path, content)
                self._jit = content

    def close(self) -> None:
        self.enqueue = lambda stream: False
        self._compiled = None  # it came from the engine, and may keep it alive
        del self.context, self.engine, self.runtime  # in this order
        if self._scratch:
            with suppress(DeviceError):  # as after a lost GPU
                self._cuda.release(self._scratch)
            self._scratch = 0
