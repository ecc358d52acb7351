"""A TensorRT that builds nothing and runs graphs with ONNX Runtime on the fake GPU, so that the code around TensorRT is tested for real.

`fake_module("8.6.2")` has the API of that version and no more: what 8.6 lacks, and what 11 removed, is not there to be called. An engine
is a note of the graph that it was made of. A fake proves order, lifetimes and error handling; it proves nothing about what TensorRT
accepts or computes (TensorRT-RTX's real parser and builder are tested apart, in tests/export).
"""

from __future__ import annotations

import enum
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from runtime.backends.fake_gpu import FakeCuda, MisuseError

VERSIONS = ("8.6.2", "10.3.0", "10.16.1", "11.4.0", "rtx-1.7.1")


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    INT64 = 8


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
class FakeTensor:
    name: str
    dtype: DataType
    shape: tuple[int, ...]


class FakeLayer:
    """A layer of the parsed network; `precision` and `types` are what the program set."""

    def __init__(self, kind: str, outputs: Sequence[DataType]) -> None:
        self.type = kind
        self.precision: DataType | None = None
        self.types: dict[int, DataType] = {}
        self._outputs = [FakeTensor(f"{kind}:{index}", dtype, ()) for index, dtype in enumerate(outputs)]
        self.num_outputs = len(self._outputs)

    def get_output(self, index: int) -> FakeTensor:
        return self._outputs[index]

    def set_output_type(self, index: int, dtype: DataType) -> None:
        self.types[index] = dtype


DEFAULT_LAYERS = (
    ("MATRIX_MULTIPLY", (DataType.HALF,)),
    ("NORMALIZATION", (DataType.FLOAT,)),
    ("GATHER", (DataType.INT32,)),
    ("CONSTANT", (DataType.HALF,)),
)


class _Session:
    """The graph behind an engine, in ONNX Runtime."""

    def __init__(self, graph: str, *, wide: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.inputs = [self._tensor(item, wide) for item in self.session.get_inputs()]
        self.outputs = [self._tensor(item, wide) for item in self.session.get_outputs()]

    @staticmethod
    def _tensor(item: Any, wide: bool) -> FakeTensor:
        dtype = _FROM_ORT[item.type]
        if dtype == DataType.INT64 and not wide:
            dtype = DataType.INT32
        return FakeTensor(item.name, dtype, tuple(item.shape))


def fake_module(
    version: str = "10.3.0",
    cuda: FakeCuda | None = None,
    *,
    layers: Sequence[tuple[str, Sequence[DataType]]] = DEFAULT_LAYERS,
    refuse: str = "",
    out_of_memory: bool = False,
) -> Any:
    """A module object with the API of one of VERSIONS.

    Args:
        cuda: the GPU that engines run on; without one they can be built only.
        layers: of every parsed network: (kind, output types).
        refuse: the message with which the builder refuses; by default it builds.
        out_of_memory: the builder runs out of memory.

    What happens to engines and contexts is written down among the GPU's calls.
    """
    rtx = version.startswith("rtx-")
    number = version.removeprefix("rtx-")
    major = 10 if rtx else int(number.split(".")[0])
    wide = rtx or major >= 10
    module: Any = SimpleNamespace(__version__=number, DataType=DataType, last_config=None, last_network=None)
    note = (cuda.calls if cuda is not None else []).append

    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3

    class ILogger:
        def log(self, severity: Severity, text: str) -> None:
            raise NotImplementedError

    module.ILogger = ILogger
    module.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    module.LayerInformationFormat = SimpleNamespace(JSON="json")
    module.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    module.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    module.LayerType = SimpleNamespace(CONSTANT="CONSTANT", SHAPE="SHAPE", IDENTITY="IDENTITY", CAST="CAST")
    module.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
    creation = {"EXPLICIT_BATCH": 0} if major < 11 else {}
    if 10 <= major < 11 or rtx:
        creation["STRONGLY_TYPED"] = 1
    module.NetworkDefinitionCreationFlag = SimpleNamespace(**creation)
    flags = {"TF32": 1, "REFIT": 2}
    if major < 11 and not rtx:
        flags |= {"FP16": 3, "OBEY_PRECISION_CONSTRAINTS": 4}
    module.BuilderFlag = SimpleNamespace(**flags)

    class IBuilderConfig:
        def __init__(self) -> None:
            self.flags = {flags["TF32"]}
            self.builder_optimization_level = 3
            self.progress_monitor: Any = None
            self.profiling_verbosity: Any = None
            self.workspace = 0
            self.cache: bytes | None = None

        def set_flag(self, flag: int) -> None:
            self.flags.add(flag)

        def clear_flag(self, flag: int) -> None:
            self.flags.discard(flag)

        def set_memory_pool_limit(self, pool: object, size: int) -> None:
            self.workspace = size

        def create_timing_cache(self, content: bytes) -> bytes:
            return content

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return True

        def get_timing_cache(self) -> SimpleNamespace:
            return SimpleNamespace(serialize=lambda: (self.cache or b"") + b"timed;")

    if rtx:
        module.ComputeCapability = SimpleNamespace(SM75=75, SM80=80, SM86=86, SM89=89, SM120=120)
        IBuilderConfig.set_compute_capability = lambda self, capability, index: True  # type: ignore[attr-defined]
    module.IBuilderConfig = IBuilderConfig

    class Network:
        def __init__(self, typing: int) -> None:
            self.creation = typing
            self.layers = [FakeLayer(kind, outputs) for kind, outputs in layers]
            self.num_layers = len(self.layers)
            self.graph = ""
            self._inputs: list[FakeTensor] = []
            self._outputs: list[FakeTensor] = []

        @property
        def num_inputs(self) -> int:
            return len(self._inputs)

        @property
        def num_outputs(self) -> int:
            return len(self._outputs)

        def get_input(self, index: int) -> FakeTensor:
            return self._inputs[index]

        def get_output(self, index: int) -> FakeTensor:
            return self._outputs[index]

        def get_layer(self, index: int) -> FakeLayer:
            return self.layers[index]

        def take(self, graph: str) -> None:
            session = _Session(graph, wide=wide)
            self.graph, self._inputs, self._outputs = graph, session.inputs, session.outputs

    class OnnxParser:
        def __init__(self, network: Network, logger: ILogger) -> None:
            self._network = network
            self._error = ""

        def parse_from_file(self, path: str) -> bool:
            try:
                self._network.take(path)
            except Exception as error:  # whatever ONNX Runtime says of the file
                self._error = str(error)
                return False
            return True

        @property
        def num_errors(self) -> int:
            return int(bool(self._error))

        def get_error(self, index: int) -> SimpleNamespace:
            said = SimpleNamespace(node=lambda: 3, desc=lambda: self._error)
            if wide:
                said.node_name, said.node_operator = (lambda: "layers.0/qkv"), (lambda: "Gemm")
            return said

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def create_network(self, typing: int) -> Network:
            network = module.last_network = Network(typing)
            return network

        def create_builder_config(self) -> IBuilderConfig:
            config = module.last_config = IBuilderConfig()
            return config

        def build_serialized_network(self, network: Network, config: IBuilderConfig) -> bytes | None:
            monitor = config.progress_monitor
            if monitor is not None:
                monitor.phase_start("Building engine", None, 2)
                for step in range(2):
                    if not monitor.step_complete("Building engine", step):
                        return None
                monitor.phase_finish("Building engine")
            if out_of_memory:
                self._logger.log(Severity.ERROR, "Requested amount of GPU memory could not be allocated: out of memory")
                return None
            if refuse:
                self._logger.log(Severity.ERROR, refuse)
                return None
            plan = {"fake": version, "graph": network.graph, "refit": flags["REFIT"] in config.flags}
            return b"FAKEPLAN" + json.dumps(plan).encode()

    class Context:
        def __init__(self, engine: Engine) -> None:
            self.engine = engine
            self._addresses: dict[str, int] = {}
            note("context made")

        def __del__(self) -> None:
            note("context destroyed")

        def run(self, addresses: dict[str, int], stream: int) -> bool:
            missing = [tensor.name for tensor in self.engine.tensors if tensor.name not in addresses]
            if missing or cuda is None:
                raise MisuseError(f"enqueued without an address for {missing}")
            session, gpu, alive = self.engine.session, cuda, weakref.ref(self)

            def work() -> None:
                if alive() is None:
                    raise MisuseError("a context was destroyed before its work, or before the graph that captured it")
                feeds = {}
                for tensor, wanted in zip(session.inputs, session.session.get_inputs(), strict=True):
                    dtype = np.dtype(_NUMPY[tensor.dtype])
                    content = gpu.memory(addresses[tensor.name], int(np.prod(tensor.shape)) * dtype.itemsize)
                    array = content.view(dtype).reshape(tensor.shape)
                    feeds[tensor.name] = array.astype(np.int64) if wanted.type == "tensor(int64)" else array.copy()
                for tensor, array in zip(session.outputs, session.session.run(None, feeds), strict=True):
                    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    gpu.memory(addresses[tensor.name], flat.nbytes)[:] = flat

            gpu.enqueue(stream, work)
            return True

    def set_tensor_address(self: Context, name: str, pointer: int) -> bool:
        known = any(tensor.name == name for tensor in self.engine.tensors)
        if known:
            self._addresses[name] = pointer
        return known

    Context.set_tensor_address = set_tensor_address  # type: ignore[attr-defined]
    Context.execute_async_v3 = lambda self, stream: self.run(self._addresses, stream)  # type: ignore[attr-defined]

    class Engine:
        def __init__(self, plan: dict[str, Any]) -> None:
            self.plan = plan
            self.session = _Session(plan["graph"], wide=wide)
            self.tensors = [*self.session.inputs, *self.session.outputs]
            self.num_io_tensors = len(self.tensors)
            note("engine made")

        def __del__(self) -> None:
            note("engine destroyed")

        def create_execution_context(self) -> Context:
            return Context(self)

        def get_tensor_name(self, index: int) -> str:
            return self.tensors[index].name

        def get_tensor_mode(self, name: str) -> Any:
            is_input = any(tensor.name == name for tensor in self.session.inputs)
            return module.TensorIOMode.INPUT if is_input else module.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> DataType:
            return next(tensor.dtype for tensor in self.tensors if tensor.name == name)

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return next(tensor.shape for tensor in self.tensors if tensor.name == name)

        def serialize(self) -> bytes:
            return b"FAKEPLAN" + json.dumps(self.plan).encode()

        def create_engine_inspector(self) -> SimpleNamespace:
            return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": ["fused"]}))

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, content: Any) -> Engine | None:
            data = bytes(content)
            try:
                plan = json.loads(data.removeprefix(b"FAKEPLAN"))
            except ValueError:
                self._logger.log(Severity.ERROR, "Serialization assertion magicTag == kPLAN_MAGIC_TAG failed")
                return None
            if plan["fake"] != version:
                self._logger.log(
                    Severity.ERROR,
                    f"The engine plan file is not compatible with this version of TensorRT, expecting {version} got {plan['fake']}",
                )
                return None
            return Engine(plan)

    module.OnnxParser, module.Builder, module.Runtime = OnnxParser, Builder, Runtime
    if rtx:
        _add_rtx(module, Engine, Runtime, Context, Builder)
    if wide:

        class Refitter:
            def __init__(self, engine: Engine, logger: ILogger) -> None:
                self.engine = engine
                self.graph = ""

            def get_missing_weights(self) -> list[str]:
                return []

            def refit_cuda_engine(self) -> bool:
                self.engine.plan["graph"] = self.graph
                return True

        class OnnxParserRefitter:
            def __init__(self, refitter: Refitter, logger: ILogger) -> None:
                self._refitter = refitter

            def refit_from_file(self, path: str) -> bool:
                self._refitter.graph = path
                return bool(self._refitter.engine.plan["refit"]) and Path(path).exists()

        module.Refitter, module.OnnxParserRefitter = Refitter, OnnxParserRefitter
    return module


def _add_rtx(module: Any, engine: Any, runtime: Any, context: Any, builder: Any) -> None:
    """What only TensorRT-RTX has: plans written to a stream, a verdict before loading, and a cache of what is compiled at loading."""

    class RuntimeCache:
        def __init__(self) -> None:
            self.content = b""

        def deserialize(self, content: bytes) -> bool:
            self.content = bytes(content) if content.startswith(b"compiled") else b""
            return bool(self.content)

        def serialize(self) -> bytes:
            return self.content or b"compiled"

    class RuntimeConfig:
        def __init__(self) -> None:
            self.cache: RuntimeCache | None = None

        def create_runtime_cache(self) -> RuntimeCache:
            return RuntimeCache()

        def set_runtime_cache(self, cache: RuntimeCache) -> bool:
            self.cache = cache
            return True

    def build_to_stream(self: Any, network: Any, config: Any, writer: Any) -> bool:
        plan = self.build_serialized_network(network, config)
        return plan is not None and writer.write(plan) == len(plan)

    module.IStreamWriter = type("IStreamWriter", (), {"__init__": lambda self: None})
    module.EngineValidity = SimpleNamespace(VALID="valid", INVALID="invalid")
    module.EngineInvalidityDiagnostics = SimpleNamespace(VERSION_MISMATCH=1, MALFORMED_ENGINE=32)
    runtime.get_engine_validity = lambda self, content: (
        ("valid", 0) if bytes(content).startswith(b"FAKEPLAN") else ("invalid", 32)
    )
    engine.create_runtime_config = lambda self: RuntimeConfig()
    engine.create_execution_context = lambda self, config=None: context(self)
    context.is_stream_capturable = lambda self, stream: True
    builder.build_serialized_network_to_stream = build_to_stream
