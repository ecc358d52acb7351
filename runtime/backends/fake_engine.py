"""The half of the fake TensorRT that runs: runtime, engine, context. Graphs are computed by ONNX Runtime on the fake GPU.

Names and arguments are those of NVIDIA's Python API and no others (tests/runtime/test_tensorrt_api.py compares); what is ours begins with
an underscore. Made by runtime/backends/fake_tensorrt.py, which knows which version has what.
"""

from __future__ import annotations

import enum
import json
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.backends.fake_gpu import FakeCuda, MisuseError

_MAGIC = b"FAKEPLAN"
_SCRATCH_BYTES = 4096


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    INT64 = 8


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


_NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT32: np.int32,
    DataType.INT64: np.int64,
    DataType.UINT8: np.uint8,
}
_FROM_ORT = {
    "tensor(float)": DataType.FLOAT,
    "tensor(float16)": DataType.HALF,
    "tensor(int64)": DataType.INT64,
    "tensor(uint8)": DataType.UINT8,
}


@dataclass
class ITensor:
    name: str
    dtype: DataType
    shape: tuple[int, ...]


@dataclass
class World:
    """What the classes of one fake module share: which version it is, its GPU, and the module itself."""

    version: str
    cuda: FakeCuda | None
    module: Any = None
    logger: Any = None

    def note(self, what: str) -> None:
        if self.cuda is not None:
            self.cuda.calls.append(what)


class Session:
    """The graph behind an engine, in ONNX Runtime."""

    def __init__(self, graph: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.inputs = [
            ITensor(item.name, _FROM_ORT[item.type], tuple(item.shape)) for item in self.session.get_inputs()
        ]
        self.outputs = [
            ITensor(item.name, _FROM_ORT[item.type], tuple(item.shape)) for item in self.session.get_outputs()
        ]

    def work(self, gpu: FakeCuda, addresses: dict[str, int]) -> None:
        """Compute, from and into the GPU's memory."""
        feeds = {}
        for tensor in self.inputs:
            dtype = np.dtype(_NUMPY[tensor.dtype])
            content = gpu.memory(addresses[tensor.name], int(np.prod(tensor.shape)) * dtype.itemsize)
            feeds[tensor.name] = content.view(dtype).reshape(tensor.shape).copy()
        for tensor, array in zip(self.outputs, self.session.run(None, feeds), strict=True):
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            gpu.memory(addresses[tensor.name], flat.nbytes)[:] = flat


def pack(plan: dict[str, Any]) -> bytes:
    """An engine's bytes."""
    return _MAGIC + json.dumps(plan).encode()


class IExecutionContext:
    _world: World

    def __init__(self, engine: ICudaEngine, *, own_memory: bool = True) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._own_memory = own_memory
        self._scratch: tuple[int, int] | None = None
        self._world.note("context made")

    def __del__(self) -> None:
        self._world.note("context destroyed")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        known = any(tensor.name == name for tensor in self._engine._tensors)
        if known:
            self._addresses[name] = memory
        return known

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu, missing = (
            self._world.cuda,
            [tensor.name for tensor in self._engine._tensors if tensor.name not in self._addresses],
        )
        if missing or gpu is None:
            raise MisuseError(f"enqueued without an address for {missing}")
        if not self._own_memory and self._scratch is None:
            raise MisuseError("enqueued without the scratch memory that the engine has to be given")
        session, addresses, scratch, alive = self._engine._session, self._addresses, self._scratch, weakref.ref(self)

        def work() -> None:
            if alive() is None:
                raise MisuseError("a context was destroyed before its work, or before the graph that captured it")
            if scratch is not None:
                gpu.memory(*scratch)[:] = 0xEE  # it is TensorRT's while a stage runs
            session.work(gpu, addresses)

        gpu.enqueue(stream_handle, work)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= _SCRATCH_BYTES
        self._scratch = (memory, size)

    def is_stream_capturable(self, stream: int) -> bool:
        return True


class EngineInspector:
    def get_engine_information(self, format: Any) -> str:
        return json.dumps({"Layers": ["fused"]})


class IRuntimeCache:
    def __init__(self) -> None:
        self._content = b""

    def deserialize(self, blob: bytes) -> bool:
        self._content = bytes(blob) if blob.startswith(b"compiled") else b""
        return bool(self._content)

    def serialize(self) -> bytes:
        return self._content or b"compiled"


class IRuntimeConfig:
    _world: World

    def __init__(self) -> None:
        self._own_memory = True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._own_memory = strategy != self._world.module.ExecutionContextAllocationStrategy.USER_MANAGED

    def create_runtime_cache(self) -> IRuntimeCache:
        return self._world.module.IRuntimeCache()  # type: ignore[no-any-return]

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        return True


class ICudaEngine:
    _world: World

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._session = Session(plan["graph"])
        self._tensors = [*self._session.inputs, *self._session.outputs]
        self._world.note("engine made")

    def __del__(self) -> None:
        self._world.note("engine destroyed")

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def device_memory_size_v2(self) -> int:
        return _SCRATCH_BYTES

    def create_execution_context(self, runtime_config: Any = None) -> IExecutionContext | None:
        own_memory = runtime_config is None or runtime_config._own_memory
        if own_memory and self._plan["user_allocation"]:
            self._world.logger.log(
                Severity.ERROR,
                "this engine wants the allocation strategy USER_MANAGED",
            )
            return None
        return self._world.module.IExecutionContext(self, own_memory=own_memory)  # type: ignore[no-any-return]

    def create_runtime_config(self) -> IRuntimeConfig:
        return self._world.module.IRuntimeConfig()  # type: ignore[no-any-return]

    def get_tensor_name(self, index: int) -> str:
        return self._tensors[index].name

    def get_tensor_mode(self, name: str) -> Any:
        is_input = any(tensor.name == name for tensor in self._session.inputs)
        mode = self._world.module.TensorIOMode
        return mode.INPUT if is_input else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return next(tensor.dtype for tensor in self._tensors if tensor.name == name)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return next(tensor.shape for tensor in self._tensors if tensor.name == name)

    def serialize(self) -> bytes:
        return pack(self._plan)

    def create_engine_inspector(self) -> EngineInspector:
        return self._world.module.EngineInspector()  # type: ignore[no-any-return]


class Runtime:
    _world: World

    def __init__(self, logger: Any) -> None:
        self._logger = self._world.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        version = self._world.version
        try:
            plan = json.loads(bytes(serialized_engine).removeprefix(_MAGIC))
        except ValueError:
            self._logger.log(Severity.ERROR, "Serialization assertion magicTag == kPLAN_MAGIC_TAG failed")
            return None
        if plan["fake"] != version:
            self._logger.log(
                Severity.ERROR,
                f"The engine plan file is not compatible with this version of TensorRT, expecting {version} got {plan['fake']}",
            )
            return None
        return self._world.module.ICudaEngine(plan)  # type: ignore[no-any-return]

    def get_engine_validity(self, blob: Any) -> tuple[str, int]:
        kinds = self._world.module
        if bytes(blob).startswith(_MAGIC):
            return kinds.EngineValidity.VALID, 0
        return kinds.EngineValidity.INVALID, kinds.EngineInvalidityDiagnostics.MALFORMED_ENGINE
