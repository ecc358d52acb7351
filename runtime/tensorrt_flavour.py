"""The one module that knows how TensorRT's versions differ: 10.0 and newer, 11, and TensorRT-RTX.

What can be asked of the module at hand is asked (`hasattr`), because version tables rot; tests/runtime/tensorrt_api holds what each version
answers. TensorRT 8.6 is refused: it calls every tensor FLOAT until an engine is built, so it cannot be told the types of the ONNX file.
The differences that matter:

* Strong typing is a flag, always on in 11 and deprecated there.
* Engines are written to a stream, which spares a copy of the weights, where it can be (10.13 can, 10.7 cannot).
* TensorRT-RTX builds for GPUs that are not there (compute capabilities), compiles the rest when an engine is loaded (runtime cache), has
  no timing cache, and lets an engine be captured in a CUDA graph if its scratch memory is ours.

Used by export/ to build and by runtime/ to run. Knows nothing about policies or bundles.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bundle.errors import EngineError
from bundle.manifest import Tensor
from runtime.gpu import Device
from runtime.tensorrt_callbacks import MessageLog, make_logger, make_monitor, make_writer

FlavourName = Literal["trt", "rtx"]
MODULES: dict[FlavourName, str] = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}
# TensorRT-RTX's default: compute capability 8.0, 8.6, 8.9, 12.0 and later (its support matrix).
PORTABLE = "portable"
_PORTABLE_SM = 80
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_OLDEST_MAJOR = 10


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine, as the engine has it."""

    tensor: Tensor
    is_input: bool


class TensorRT:
    """One installed TensorRT.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
        name: which of them.

    Raises:
        EngineError: it is older than 10.0.
    """

    def __init__(self, module: Any, name: FlavourName) -> None:
        self.module = module
        self.name = name
        self.version: str = module.__version__
        if name == "trt" and int(self.version.split(".")[0]) < _OLDEST_MAJOR:
            raise EngineError(
                "this TensorRT is too old for exact engines",
                got=f"TensorRT {self.version}",
                expected=f"{_OLDEST_MAJOR}.0 or newer",
                hint="on a Jetson JetPack 6.1 or newer brings it (by apt, without flashing: docs/jetson.md); until then --backend ort.",
            )
        self.log = MessageLog()
        self.logger = make_logger(module, self.log)

    # --- what it can do -------------------------------------------------------------------------------------------------------

    @property
    def builds_for_others(self) -> bool:
        """It can build for a GPU that is not in this machine."""
        return hasattr(self.module.IBuilderConfig, "set_compute_capability")

    @property
    def wants_scratch(self) -> bool:
        """Scratch memory of its engines is allocated by us: else it may allocate while it runs, which cannot be captured."""
        return hasattr(self.module.BuilderFlag, "REQUIRE_USER_ALLOCATION")

    def targets(self) -> tuple[str, ...]:
        """Names of the GPUs it can build for without having them, `sm86`."""
        if not self.builds_for_others:
            return ()
        names = [name.lower() for name in dir(self.module.ComputeCapability) if name.startswith("SM")]
        return tuple(sorted(names, key=lambda name: int(name[2:])))

    def fingerprint(self, device: Device | None, target: str | None = None) -> str:
        """The folder name of engines for a machine.

        TensorRT's engines belong to one GPU model, its number of multiprocessors (Orins of every size call themselves "Orin"),
        version and driver; TensorRT-RTX's to a compute capability and version, as the rest is compiled when they are loaded.

        Args:
            target: `sm86` or `portable` (TensorRT-RTX); by default the device's.
        """
        if self.name == "rtx":
            return f"{target or (f'sm{device.sm}' if device else PORTABLE)}-rtx{self.version}"
        if device is None:
            raise EngineError(
                "TensorRT builds for the GPU that it runs on",
                got="no GPU",
                hint="run this on the robot, or use --tensorrt rtx --target sm86 for a desktop GPU.",
            )
        return f"{device.slug}-sm{device.sm}x{device.multiprocessors}-trt{self.version}-cuda{device.driver // 1000}"

    def usable_fingerprints(self, device: Device) -> tuple[str, ...]:
        """Fingerprints whose engines this machine may load, the most specific first."""
        own = self.fingerprint(device)
        portable = self.name == "rtx" and device.sm >= _PORTABLE_SM
        return (own, self.fingerprint(device, PORTABLE)) if portable else (own,)

    # --- building -------------------------------------------------------------------------------------------------------------

    def builder(self) -> Any:
        """What engines are built with.

        Raises:
            EngineError: it does not start, as with a driver that is too old.
        """
        return self._start(self.module.Builder)

    def network(self, builder: Any) -> Any:
        """An empty network whose types are those of the ONNX."""
        flags = self.module.NetworkDefinitionCreationFlag
        typed = hasattr(flags, "STRONGLY_TYPED")  # without it, every network is
        return builder.create_network(1 << int(flags.STRONGLY_TYPED) if typed else 0)

    def set_flags(self, config: Any) -> None:
        """What every engine is built with."""
        flags = self.module.BuilderFlag
        config.profiling_verbosity = self.module.ProfilingVerbosity.DETAILED  # keeps layer names, for the inspector
        config.clear_flag(flags.TF32)  # on by default; it would round fp32 products to 10 bits
        if self.wants_scratch:
            config.set_flag(flags.REQUIRE_USER_ALLOCATION)

    def set_target(self, config: Any, target: str) -> None:
        """Build for `sm86`, or for every GPU that a portable engine covers."""
        if target == PORTABLE:
            return  # TensorRT-RTX's default
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(self.module.ComputeCapability, target.upper()), 0)

    def set_workspace(self, config: Any, limit: int) -> None:
        """Cap the scratch memory that kernels may ask for, in bytes."""
        config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, limit)

    def set_timing_cache(self, config: Any, content: bytes) -> bool:
        """Give the builder what earlier builds measured; content of another version or GPU is forgotten.

        Returns:
            False where there is no such thing (TensorRT-RTX measures nothing, and warns that the call is deprecated).
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for known in dict.fromkeys((content, b"")):
                cache = config.create_timing_cache(known)
                if cache is not None and config.set_timing_cache(cache, False):
                    return not any(issubclass(item.category, DeprecationWarning) for item in caught)
        return False

    def timing_cache(self, config: Any) -> bytes:
        """What is now known, to be kept."""
        return bytes(config.get_timing_cache().serialize())

    def set_progress(self, config: Any, report: Callable[[str, str | None, int, int], bool]) -> None:
        """Have `report(phase, parent, done, steps)` called as the build goes on; it returns False to stop the build."""
        config.progress_monitor = make_monitor(self.module, report)

    def build(self, builder: Any, network: Any, config: Any, path: Path) -> bool:
        """Build and write the engine; False if TensorRT gave none (see `log`).

        Raises:
            OSError: the disk is full.
        """
        if hasattr(builder, "build_serialized_network_to_stream"):
            # Spares a copy of all weights in memory.
            with path.open("wb") as file:
                writer = make_writer(self.module, file.write)
                done = bool(builder.build_serialized_network_to_stream(network, config, writer))
                if writer.error is not None:
                    raise writer.error
                return done
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            return False
        path.write_bytes(plan)
        return True

    # --- loading and running --------------------------------------------------------------------------------------------------

    def runtime(self) -> Any:
        """What engines are loaded with; it must outlive them.

        Raises:
            EngineError: it does not start, as with a driver that is too old.
        """
        return self._start(self.module.Runtime)

    def _start(self, kind: Any) -> Any:
        try:
            return kind(self.logger)
        except TypeError:  # pybind11's word for a constructor that gives nothing
            raise EngineError(
                f"TensorRT {self.version} does not start",
                got=self.log.errors(),
                hint="the NVIDIA driver is too old for it most likely: update the driver, or install an older TensorRT (on a Jetson: "
                "the one of its JetPack); --backend ort does without.",
            ) from None

    def deserialize(self, runtime: Any, content: Any, origin: str) -> Any:
        """An engine from its bytes (any buffer).

        Raises:
            EngineError: TensorRT does not take it; the message has its reason.
        """
        diagnosis = ""
        if hasattr(runtime, "get_engine_validity"):
            verdict, reasons = runtime.get_engine_validity(content)
            if verdict == self.module.EngineValidity.INVALID:
                diagnosis = f"{self._diagnosis(reasons)}; "
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EngineError(
                f"TensorRT {self.version} cannot load {origin}",
                got=diagnosis + self.log.errors(),
                expected="an engine built on this machine, by this version",
                hint="python export/build_engines.py --engines-only BUNDLE builds the engines for this machine.",
            )
        return engine

    def _diagnosis(self, reasons: int) -> str:
        """The names of a verdict's bits."""
        kinds = self.module.EngineInvalidityDiagnostics
        names = [name for name in dir(kinds) if name.isupper() and int(reasons) & int(getattr(kinds, name))]
        return ", ".join(names) or f"reason {int(reasons)}"

    def context(self, engine: Any, cache: bytes) -> tuple[Any, Any]:
        """An execution context, and the runtime cache that it fills (None but for TensorRT-RTX).

        Args:
            cache: what an earlier run's runtime cache held; compiled kernels, so that loading takes seconds less.
        """
        if not hasattr(self.module, "IRuntimeCache"):
            return engine.create_execution_context(), None
        config = engine.create_runtime_config()
        if self.wants_scratch:
            strategies = self.module.ExecutionContextAllocationStrategy
            config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
        compiled = config.create_runtime_cache()
        if cache:
            compiled.deserialize(cache)  # refused on any mismatch, and then simply empty
        config.set_runtime_cache(compiled)
        return engine.create_execution_context(config), compiled

    def scratch_bytes(self, engine: Any) -> int:
        """How much device memory a context of this engine has to be given; 0 where TensorRT allocates it."""
        return int(engine.device_memory_size_v2) if self.wants_scratch else 0

    def tensors(self, engine: Any) -> tuple[EngineTensor, ...]:
        """Inputs and outputs, in the engine's order."""
        found = []
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            dtype = self.dtype(engine.get_tensor_dtype(name))
            shape = tuple(int(size) for size in engine.get_tensor_shape(name))
            is_input = engine.get_tensor_mode(name) == self.module.TensorIOMode.INPUT
            found.append(EngineTensor(Tensor(name=name, dtype=dtype, shape=shape), is_input))
        return tuple(found)

    def dtype(self, value: Any) -> str:
        """numpy's name of a TensorRT data type."""
        for name, dtype in _DTYPES.items():
            if getattr(self.module.DataType, name, None) == value:
                return dtype
        return str(value)

    def bind(self, context: Any, pointers: Mapping[str, int]) -> Callable[[int], bool]:
        """Fix the addresses of all tensors; returns the function that enqueues one run on a stream's address.

        Raises:
            EngineError: TensorRT does not take an address.
        """
        for name, pointer in pointers.items():
            if not context.set_tensor_address(name, pointer):
                raise EngineError(
                    f"TensorRT does not take the buffer of {name}",
                    got=self.log.errors(),
                    hint="build the engines again: export/build_engines.py --engines-only BUNDLE --force",
                )
        return lambda stream: bool(context.execute_async_v3(stream))

    def capturable(self, context: Any, stream: int) -> bool:
        """False if running this context on the stream cannot be captured (TensorRT-RTX can tell)."""
        return bool(context.is_stream_capturable(stream)) if hasattr(context, "is_stream_capturable") else True

    def inspect(self, engine: Any) -> str:
        """The engine's layers after fusion, JSON."""
        inspector = engine.create_engine_inspector()
        return str(inspector.get_engine_information(self.module.LayerInformationFormat.JSON))

    def refit(self, engine: Any, graph: Path) -> bool:
        """Put a graph's weights into a refittable engine; False if TensorRT refuses (see `log`)."""
        refitter = self.module.Refitter(engine, self.logger)
        parser = self.module.OnnxParserRefitter(refitter, self.logger)
        if not parser.refit_from_file(str(graph)):
            return False
        return not refitter.get_missing_weights() and bool(refitter.refit_cuda_engine())


def installed() -> Iterator[FlavourName]:
    """The flavours whose packages can be found, without importing them: TensorRT itself first."""
    for name in get_args(FlavourName):
        if importlib.util.find_spec(MODULES[name]) is not None:
            yield name


def open_flavour(name: FlavourName) -> TensorRT:
    """Import a flavour.

    Raises:
        EngineError: it is not installed, is too old, or its libraries do not load.
    """
    try:
        module = importlib.import_module(MODULES[name])
    except (ImportError, OSError, RuntimeError) as error:
        library = re.search(r"lib\w+\.so[.\d]*", str(error))
        raise EngineError(
            f"{MODULES[name]} cannot be imported",
            got=f"{type(error).__name__}: {error}",
            hint=f"Python's half of TensorRT is here, {library[0]} is not: on a Jetson apt-get install tensorrt, in a container also "
            "docker run --runtime nvidia; on a PC install TensorRT whole; --backend ort does without."
            if library
            else "TensorRT comes with JetPack (in a virtual environment: --system-site-packages); "
            "TensorRT-RTX with pip install 'jetvla[trt-rtx]'.",
        ) from None
    return TensorRT(module, name)
