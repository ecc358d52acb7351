"""A TensorRT that builds nothing and runs graphs with ONNX Runtime on the fake GPU, so that the code around TensorRT is tested for real.

`fake_module("10.3.0")` has names of that version and no others: what came later, or was removed, is not there to be called. Its names,
arguments and enumerations are compared with NVIDIA's Python API (tests/runtime/test_tensorrt_api.py). An engine is a note of the graph that
it was made of. A fake proves order, lifetimes and error handling; it proves nothing about what TensorRT accepts or computes
(TensorRT-RTX's real parser and builder are tested apart, in tests/export). What runs is in runtime/backends/fake_engine.py.
"""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from runtime.backends import fake_engine
from runtime.backends.fake_engine import DataType, ICudaEngine, ITensor, Session, Severity, World, pack
from runtime.backends.fake_gpu import FakeCuda

VERSIONS = ("10.3.0", "10.16.1", "11.4.0", "rtx-1.7.1")
_LAYERS = 4
# What came after 10.3, and what only TensorRT-RTX has: a class, or a member of one.
_SINCE_10_16 = (
    "IStreamWriter",
    "Builder.build_serialized_network_to_stream",
    "IRuntimeConfig",
    "ICudaEngine.create_runtime_config",
)
_RTX_ONLY = (
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IRuntimeCache",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
    "EngineValidity",
    "EngineInvalidityDiagnostics",
    "Runtime.get_engine_validity",
    "IExecutionContext.is_stream_capturable",
)


class ILogger:
    Severity = Severity

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


class IStreamWriter:
    pass


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return self._content + b"timed;"


class IBuilderConfig:
    _world: World
    builder_optimization_level = 3
    progress_monitor: Any = None
    profiling_verbosity: Any = None
    num_compute_capabilities = 0

    def __init__(self) -> None:
        self._flags = {int(self._world.module.BuilderFlag.TF32)}
        self._workspace = 0
        self._cache: ITimingCache | None = None

    def __setattr__(self, name: str, value: object) -> None:
        if not (name.startswith("_") or hasattr(type(self), name)):
            raise AttributeError(f"this version's IBuilderConfig has no {name}")  # as pybind11's classes do
        super().__setattr__(name, value)

    def set_flag(self, flag: int) -> None:
        self._flags.add(int(flag))

    def clear_flag(self, flag: int) -> None:
        self._flags.discard(int(flag))

    def set_memory_pool_limit(self, pool: object, pool_size: int) -> None:
        self._workspace = pool_size

    def set_compute_capability(self, compute_capability: int, index: int) -> bool:
        return True

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class INetworkDefinition:
    num_layers = _LAYERS

    def __init__(self, flags: int) -> None:
        self._creation = flags
        self._graph = ""
        self._inputs: list[ITensor] = []
        self._outputs: list[ITensor] = []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class ParserError:
    _world: World

    def __init__(self, text: str) -> None:
        self._text = text

    def node(self) -> int:
        return 3

    def node_name(self) -> str:
        return "layers.0/qkv"

    def node_operator(self) -> str:
        return "Gemm"

    def desc(self) -> str:
        return self._text

    def code(self) -> Any:
        return self._world.module.ErrorCode(8)


class OldErrorCode:
    """As pybind11 made enumerations whose members hide `name`: until 10.13 it is a method, and prints as one."""

    def __init__(self, value: int) -> None:
        self.value = value

    def name(self) -> str:
        raise TypeError("name(): incompatible function arguments")

    def __str__(self) -> str:
        return "ErrorCode.UNSUPPORTED_NODE"


class NewErrorCode(enum.Enum):
    UNSUPPORTED_NODE = 8


class OnnxParser:
    _world: World

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._error = ""

    def parse_from_file(self, model: str) -> bool:
        try:
            session = Session(model)
        except Exception as error:  # whatever ONNX Runtime says of the file
            self._error = str(error)
            return False
        network = self._network
        network._graph, network._inputs, network._outputs = model, session.inputs, session.outputs
        return True

    @property
    def num_errors(self) -> int:
        return int(bool(self._error))

    def get_error(self, index: int) -> ParserError:
        return self._world.module.ParserError(self._error)  # type: ignore[no-any-return]


class Builder:
    _world: World
    _refuse = ""

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        self._world.module._last_network = network = self._world.module.INetworkDefinition(flags)
        return network  # type: ignore[no-any-return]

    def create_builder_config(self) -> IBuilderConfig:
        self._world.module._last_config = config = self._world.module.IBuilderConfig()
        return config  # type: ignore[no-any-return]

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        monitor, flags = config.progress_monitor, self._world.module.BuilderFlag
        if monitor is not None:
            monitor.phase_start("Building engine", None, 2)
            for step in range(2):
                if not monitor.step_complete("Building engine", step):
                    return None
            monitor.phase_finish("Building engine")
        if self._refuse:
            self._logger.log(Severity.ERROR, self._refuse)
            return None
        plan = {
            "fake": self._world.version,
            "graph": network._graph,
            "refit": int(flags.REFIT) in config._flags,
            "user_allocation": getattr(flags, "REQUIRE_USER_ALLOCATION", None) in config._flags,
        }
        return pack(plan)

    def build_serialized_network_to_stream(
        self, network: INetworkDefinition, config: IBuilderConfig, writer: Any
    ) -> bool:
        plan = self.build_serialized_network(network, config)
        return plan is not None and writer.write(plan) == len(plan)


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine = engine
        self._graph = ""

    def get_missing_weights(self) -> list[str]:
        return []

    def refit_cuda_engine(self) -> bool:
        self._engine._plan["graph"] = self._graph
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        self._refitter._graph = model
        return bool(self._refitter._engine._plan["refit"]) and Path(model).exists()


_CLASSES = (
    ILogger,
    IProgressMonitor,
    IStreamWriter,
    ITimingCache,
    IBuilderConfig,
    INetworkDefinition,
    ParserError,
    OnnxParser,
    Builder,
    Refitter,
    OnnxParserRefitter,
    fake_engine.EngineInspector,
    fake_engine.ICudaEngine,
    fake_engine.IExecutionContext,
    fake_engine.IRuntimeCache,
    fake_engine.IRuntimeConfig,
    fake_engine.Runtime,
)


def fake_module(
    version: str = "10.3.0", cuda: FakeCuda | None = None, *, refuse: str = "", out_of_memory: bool = False
) -> Any:
    """A module object with the API of one of VERSIONS.

    Args:
        cuda: the GPU that engines run on; without one they can be built only.
        refuse: the message with which the builder refuses; by default it builds.
        out_of_memory: the builder runs out of memory.

    What happens to engines and contexts is written down among the GPU's calls.
    """
    rtx = version.startswith("rtx-")
    number = version.removeprefix("rtx-")
    old, latest = version == "10.3.0", rtx or number.startswith("11")
    world = World(version, cuda)
    if out_of_memory:
        refuse = "Requested amount of GPU memory could not be allocated: out of memory"
    classes: dict[str, Any] = {kind.__name__: type(kind.__name__, (kind,), {"_world": world}) for kind in _CLASSES}
    classes["Builder"]._refuse = refuse
    flags = {"TF32": 6, "REFIT": 4, **({"REQUIRE_USER_ALLOCATION": 28} if rtx else {})}
    creation = {"STRONGLY_TYPED": 0} if latest else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    enumerations = {
        "BuilderFlag": flags if latest else {**flags, "FP16": 0},
        "NetworkDefinitionCreationFlag": creation,
        "MemoryPoolType": {"WORKSPACE": 0},
        "ProfilingVerbosity": {"DETAILED": 2},
        "TensorIOMode": {"INPUT": 1, "OUTPUT": 2},
        "LayerInformationFormat": {"JSON": 1},
        "ExecutionContextAllocationStrategy": {"STATIC": 0, "USER_MANAGED": 2},
        "ComputeCapability": {"SM75": 75, "SM80": 80, "SM86": 86, "SM89": 89, "SM120": 120},
        "EngineValidity": {"VALID": 0, "SUBOPTIMAL": 1, "INVALID": 2},
        "EngineInvalidityDiagnostics": {"VERSION_MISMATCH": 1, "MALFORMED_ENGINE": 32},
    }
    module = SimpleNamespace(
        __version__=number,
        DataType=DataType,
        ITensor=ITensor,
        ErrorCode=OldErrorCode if old else NewErrorCode,
        **classes,
        **{name: enum.IntEnum(name, members) for name, members in enumerations.items()},
    )
    for name in (*(_SINCE_10_16 if old else ()), *(() if rtx else _RTX_ONLY)):
        holder, _, member = name.partition(".")
        if member and hasattr(module, holder):
            setattr(getattr(module, holder), member, _Absent(name))
        elif not member:
            delattr(module, holder)
    world.module = module
    return module


class _Absent:
    """A member that this version lacks."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: object = None) -> Any:
        raise AttributeError(f"this version has no {self._name}")
