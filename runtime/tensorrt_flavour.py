"""The one module that knows how TensorRT's versions differ: 8.6, 10.3, 10.16, 11 and TensorRT-RTX.

What can be asked of the module at hand is asked (`hasattr`), because version tables rot. The differences that matter here:

* Strong typing. A flag from 10 on; the only way in 11; unknown to 8.6, where each layer gets the precision that the ONNX types say.
* TensorRT-RTX builds for GPUs that are not there (compute capabilities), compiles the rest when an engine is loaded (runtime cache) and
  has no timing cache.
* 8.6 has no 64-bit integers: its engines take int32 where the graph says int64, so types are read from the engine.
* Executing by tensor name (`execute_async_v3`) came with 8.5; before, by position.

Used by export/ to build and by runtime/ to run. Knows nothing about policies or bundles.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bundle.errors import EngineError
from bundle.manifest import Tensor
from runtime.gpu import Device

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
_ERROR, _WARNING, _INFO = 1, 2, 3
_KEPT_MESSAGES = 200


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine, as the engine has it."""

    tensor: Tensor
    is_input: bool


class MessageLog:
    """What TensorRT said; `errors` also tells why a call returned nothing."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, str]] = []

    def add(self, severity: int, text: str) -> None:
        if severity <= _INFO:
            self.messages.append((severity, text))
            del self.messages[:-_KEPT_MESSAGES]

    def errors(self) -> str:
        """The errors since the log was made, on one line; the cause comes first."""
        found = [text.strip() for severity, text in self.messages if severity <= _ERROR]
        return "; ".join(dict.fromkeys(found)) or "TensorRT gave no reason"


class TensorRT:
    """One installed TensorRT.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
        name: which of them.
    """

    def __init__(self, module: Any, name: FlavourName) -> None:
        self.module = module
        self.name = name
        self.version: str = module.__version__
        self.log = MessageLog()
        self.logger = _make_logger(module, self.log)

    # --- what it can do -------------------------------------------------------------------------------------------------------

    @property
    def typing(self) -> Literal["flag", "always", "per layer"]:
        """How a network becomes strongly typed."""
        if hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
            return "flag"
        return "per layer" if hasattr(self.module.BuilderFlag, "FP16") else "always"

    @property
    def builds_for_others(self) -> bool:
        """It can build for a GPU that is not in this machine."""
        return hasattr(self.module.IBuilderConfig, "set_compute_capability")

    @property
    def refits_from_onnx(self) -> bool:
        """It can put the weights of an ONNX file into an existing engine."""
        return hasattr(self.module, "OnnxParserRefitter") and hasattr(self.module.BuilderFlag, "REFIT")

    def targets(self) -> tuple[str, ...]:
        """Names of the GPUs it can build for without having them, `sm86`."""
        if not self.builds_for_others:
            return ()
        names = [name.lower() for name in dir(self.module.ComputeCapability) if name.startswith("SM")]
        return tuple(sorted(names, key=lambda name: int(name[2:])))

    def fingerprint(self, device: Device | None, target: str | None = None) -> str:
        """The folder name of engines for a machine.

        TensorRT's engines belong to one GPU model, version and driver; TensorRT-RTX's to a compute capability and version, as the
        rest is compiled when they are loaded.

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
        return f"{device.slug}-sm{device.sm}-trt{self.version}-cuda{device.driver // 1000}"

    def usable_fingerprints(self, device: Device) -> tuple[str, ...]:
        """Fingerprints whose engines this machine may load, the most specific first."""
        own = self.fingerprint(device)
        portable = self.name == "rtx" and device.sm >= _PORTABLE_SM
        return (own, self.fingerprint(device, PORTABLE)) if portable else (own,)

    # --- building -------------------------------------------------------------------------------------------------------------

    def network(self, builder: Any) -> Any:
        """An empty network whose types are those of the ONNX."""
        flags = self.module.NetworkDefinitionCreationFlag
        value = 0
        if self.typing == "flag":
            value |= 1 << int(flags.STRONGLY_TYPED)
        elif self.typing == "per layer":
            value |= 1 << int(flags.EXPLICIT_BATCH)
        return builder.create_network(value)

    def set_types(self, config: Any, network: Any) -> int:
        """Make the builder keep the ONNX types; returns how many layers had to be told (8.6 only)."""
        flags = self.module.BuilderFlag
        if hasattr(flags, "TF32"):
            config.clear_flag(flags.TF32)  # on by default; it would round fp32 products to 10 bits
        if self.typing != "per layer":
            return 0
        config.set_flag(flags.FP16)
        config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
        floats = (self.module.DataType.FLOAT, self.module.DataType.HALF)
        untyped = {
            getattr(self.module.LayerType, name)
            for name in ("CONSTANT", "SHAPE", "CAST", "IDENTITY")
            if hasattr(self.module.LayerType, name)
        }
        told = 0
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            dtypes = [layer.get_output(number).dtype for number in range(layer.num_outputs)]
            if not dtypes or any(dtype not in floats for dtype in dtypes):
                continue  # integers and booleans have one precision
            if layer.type not in untyped:
                layer.precision = dtypes[0]
            for number, dtype in enumerate(dtypes):
                layer.set_output_type(number, dtype)
            told += 1
        return told

    def set_target(self, config: Any, target: str) -> None:
        """Build for `sm86`, or for every GPU that a portable engine covers."""
        if target == PORTABLE:
            return  # TensorRT-RTX's default
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(self.module.ComputeCapability, target.upper()), 0)

    def set_workspace(self, config: Any, limit: int) -> None:
        """Cap the scratch memory that kernels may ask for, in bytes."""
        if hasattr(config, "set_memory_pool_limit"):
            config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, limit)
        else:
            config.max_workspace_size = limit

    def set_optimization_level(self, config: Any, level: int) -> None:
        if hasattr(config, "builder_optimization_level"):
            config.builder_optimization_level = level

    def set_details(self, config: Any) -> None:
        """Keep layer names in the engine, for the inspector."""
        if hasattr(self.module, "ProfilingVerbosity"):
            config.profiling_verbosity = self.module.ProfilingVerbosity.DETAILED

    def set_refit(self, config: Any) -> None:
        config.set_flag(self.module.BuilderFlag.REFIT)

    def set_timing_cache(self, config: Any, content: bytes) -> bool:
        """Give the builder what earlier builds measured; False where there is no such thing (TensorRT-RTX measures nothing)."""
        if not hasattr(config, "create_timing_cache"):
            return False
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = config.create_timing_cache(content)
            if cache is None:  # of another version or GPU: start anew
                cache = config.create_timing_cache(b"")
            taken = bool(config.set_timing_cache(cache, False))
        return taken and not any(issubclass(item.category, DeprecationWarning) for item in caught)

    def timing_cache(self, config: Any) -> bytes:
        """What is now known, to be kept."""
        return bytes(config.get_timing_cache().serialize())

    def set_progress(self, config: Any, report: Callable[[str, str | None, int, int], bool]) -> None:
        """Have `report(phase, parent, done, steps)` called as the build goes on; it returns False to stop the build."""
        if hasattr(self.module, "IProgressMonitor"):
            config.progress_monitor = _make_monitor(self.module, report)

    def build(self, builder: Any, network: Any, config: Any, path: Path) -> bool:
        """Build and write the engine; False if TensorRT gave none (see `log`).

        Raises:
            OSError: the disk is full.
        """
        if hasattr(builder, "build_serialized_network_to_stream") and hasattr(self.module, "IStreamWriter"):
            # Spares a copy of all weights in memory.
            with path.open("wb") as file:
                writer = _make_writer(self.module, file.write)
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
        try:
            return self.module.Runtime(self.logger)
        except TypeError:  # pybind11's word for a constructor that gives nothing
            raise EngineError(
                f"TensorRT {self.version} does not start",
                got=self.log.errors(),
                hint="the NVIDIA driver is too old for it most likely: update the driver, or install an older TensorRT.",
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
        if not hasattr(engine, "create_runtime_config"):
            return engine.create_execution_context(), None
        config = engine.create_runtime_config()
        if not hasattr(config, "create_runtime_cache"):
            return engine.create_execution_context(), None
        compiled = config.create_runtime_cache()
        if cache:
            compiled.deserialize(cache)  # refused on any mismatch, and then simply empty
        config.set_runtime_cache(compiled)
        return engine.create_execution_context(config), compiled

    def tensors(self, engine: Any) -> tuple[EngineTensor, ...]:
        """Inputs and outputs, in the engine's order."""
        if hasattr(engine, "num_io_tensors"):
            found = []
            for index in range(engine.num_io_tensors):
                name = engine.get_tensor_name(index)
                is_input = engine.get_tensor_mode(name) == self.module.TensorIOMode.INPUT
                found.append((name, engine.get_tensor_dtype(name), engine.get_tensor_shape(name), is_input))
        else:
            found = [
                (
                    engine.get_binding_name(index),
                    engine.get_binding_dtype(index),
                    engine.get_binding_shape(index),
                    engine.binding_is_input(index),
                )
                for index in range(engine.num_bindings)
            ]
        return tuple(
            EngineTensor(Tensor(name=name, dtype=self.dtype(dtype), shape=tuple(int(size) for size in shape)), is_input)
            for name, dtype, shape, is_input in found
        )

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
        if hasattr(context, "execute_async_v3"):
            for name, pointer in pointers.items():
                if not context.set_tensor_address(name, pointer):
                    raise EngineError(
                        f"TensorRT does not take the buffer of {name}",
                        got=self.log.errors(),
                        hint="build the engines again: export/build_engines.py --engines-only BUNDLE --force",
                    )
            return lambda stream: bool(context.execute_async_v3(stream))
        engine = context.engine
        bindings = [pointers[engine.get_binding_name(index)] for index in range(engine.num_bindings)]
        return lambda stream: bool(context.execute_async_v2(bindings=bindings, stream_handle=stream))

    def capturable(self, context: Any, stream: int) -> bool:
        """False if running this context on the stream cannot be captured (TensorRT-RTX can tell)."""
        return bool(context.is_stream_capturable(stream)) if hasattr(context, "is_stream_capturable") else True

    def inspect(self, engine: Any) -> str:
        """The engine's layers after fusion, JSON; empty where there is no inspector."""
        if not hasattr(engine, "create_engine_inspector"):
            return ""
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
        EngineError: it is not installed, or its libraries do not load.
    """
    try:
        module = importlib.import_module(MODULES[name])
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(
            f"{MODULES[name]} cannot be imported",
            got=f"{type(error).__name__}: {error}",
            hint="TensorRT comes with JetPack (in a virtual environment: --system-site-packages); "
            "TensorRT-RTX with pip install 'jetvla[trt-rtx]'.",
        ) from None
    return TensorRT(module, name)


def parser_errors(parser: Any) -> Iterator[str]:
    """The ONNX parser's complaints: node, operator, reason."""
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        name = error.node_name() if hasattr(error, "node_name") else ""
        operator = error.node_operator() if hasattr(error, "node_operator") else ""
        where = f"node {error.node()}"
        if name or operator:
            where += f" {name!r} ({operator})"
        # Of some operators the description is no more than "false".
        kind = f"{error.code().name}: " if hasattr(error, "code") else ""
        yield f"{where}: {kind}{error.desc()}"


def _make_logger(module: Any, log: MessageLog) -> Any:
    """TensorRT wants a subclass of its own ILogger; which one is known only now."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            log.add(int(severity), text)

    return Logger()


def _make_monitor(module: Any, report: Callable[[str, str | None, int, int], bool]) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[str | None, int]] = {}
            self._go_on = True

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._phases[phase] = (parent, steps)
            self._go_on &= report(phase, parent, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            parent, steps = self._phases.get(phase, (None, 0))
            self._go_on &= report(phase, parent, step + 1, steps)
            return self._go_on

        def phase_finish(self, phase: str) -> None:
            parent, steps = self._phases.pop(phase, (None, 0))
            self._go_on &= report(phase, parent, steps, steps)

    return Monitor()


def _make_writer(module: Any, write: Callable[[Any], int]) -> Any:
    class Writer(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            # TensorRT swallows exceptions and short writes alike, and calls the truncated engine a success.
            try:
                return write(data) if self.error is None else 0
            except OSError as error:
                self.error = error
                return 0

    return Writer()
