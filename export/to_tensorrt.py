"""One graph to one engine: parse, keep the types, build, write.

Runs in a process of its own (export/engine_process.py), because a build may take gigabytes that are not given back, and may be killed
for them. Needs neither torch nor onnx: it also runs on the robot. Everything that depends on TensorRT's version is in
runtime/tensorrt_flavour.py.
"""

from __future__ import annotations

import mmap
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from bundle.errors import DeviceError, EngineBuildError, EngineError
from bundle.manifest import Tensor
from runtime.gpu import open_cuda
from runtime.tensorrt_flavour import FlavourName, TensorRT

Report = Callable[[str, str | None, int, int], bool]
"""(phase, parent phase, steps done, steps) -> go on?"""

_MEMORY = re.compile(
    r"out of memory|outofmemory|insufficient (?:gpu )?memory|bad_alloc|cudaErrorMemoryAllocation", re.IGNORECASE
)


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to build. Paths are absolute strings, so that a request can travel to another process.

    `target` is set for TensorRT-RTX only. `refit_from` is a refittable engine whose weights are to be replaced instead of building.
    """

    flavour: FlavourName
    label: str
    graph: str
    output: str
    layers_output: str
    target: str | None
    optimization_level: int
    workspace_bytes: int
    refit: bool
    timing_cache: str | None
    refit_from: str | None = None


class EngineBuilt(msgspec.Struct, frozen=True, kw_only=True):
    """What came out; `layers` counts the parsed network's."""

    layers: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    seconds: float
    peak_rss_mb: int
    timing_cache: bool
    refitted: bool


def build_engine(tensorrt: TensorRT, request: EngineRequest, report: Report) -> EngineBuilt:
    """Build (or refit) request.output.

    Raises:
        EngineBuildError: the parser or the builder refuses, memory runs out, or `report` said stop.
        EngineError: TensorRT does not start.
    """
    start = time.monotonic()
    stopped = False

    def watch(phase: str, parent: str | None, done: int, steps: int) -> bool:
        nonlocal stopped
        stopped = stopped or not report(phase, parent, done, steps)
        return not stopped

    builder = tensorrt.builder()
    network = tensorrt.network(builder)
    parser = tensorrt.module.OnnxParser(network, tensorrt.logger)
    if not parser.parse_from_file(request.graph):
        complaints = list(parser_errors(parser))
        raise EngineBuildError(
            f"TensorRT {tensorrt.version} does not take the graph of {request.label}",
            got="; ".join(complaints) or tensorrt.log.errors(),
            expected="operators of ONNX opset 17 that TensorRT knows",
            hint="this is a bug in jetvla: please report the node, with TensorRT's version.",
        )
    tensors = [
        tuple(
            Tensor(
                name=tensor.name, dtype=tensorrt.dtype(tensor.dtype), shape=tuple(int(size) for size in tensor.shape)
            )
            for tensor in (get(index) for index in range(count))
        )
        for get, count in ((network.get_input, network.num_inputs), (network.get_output, network.num_outputs))
    ]
    layers, cached, refitted = int(network.num_layers), False, False
    if request.refit_from is not None:
        refitted = _refit(tensorrt, request)
    if not refitted:
        config = builder.create_builder_config()
        tensorrt.set_flags(config)
        if request.target is not None:
            tensorrt.set_target(config, request.target)
        tensorrt.set_workspace(config, request.workspace_bytes)
        config.builder_optimization_level = request.optimization_level
        tensorrt.set_progress(config, watch)
        if request.refit:
            config.set_flag(tensorrt.module.BuilderFlag.REFIT)
        cache = Path(request.timing_cache) if request.timing_cache is not None else None
        cached = cache is not None and tensorrt.set_timing_cache(config, cache.read_bytes() if cache.exists() else b"")
        try:
            done = tensorrt.build(builder, network, config, Path(request.output))
        except MemoryError:
            raise _failure(tensorrt, request, no_memory=True) from None
        if stopped:
            raise EngineBuildError(
                f"the build of {request.label} was stopped",
                hint="run the same command again; finished engines are kept.",
            )
        if not done:
            raise _failure(tensorrt, request)
        if cached:
            assert cache is not None
            cache.write_bytes(tensorrt.timing_cache(config))
        del config
    # The builder holds the weights; loading the engine needs room for them again.
    del parser, network, builder
    _inspect(tensorrt, request)
    return EngineBuilt(
        layers=layers,
        inputs=tensors[0],
        outputs=tensors[1],
        seconds=round(time.monotonic() - start, 2),
        peak_rss_mb=_peak_rss_mb(),
        timing_cache=cached,
        refitted=refitted,
    )


def parser_errors(parser: Any) -> Iterator[str]:
    """The ONNX parser's complaints: node, operator, reason."""
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        # Of some operators the description is no more than "false". The code's `name` is a method in some versions; its text is one in all.
        kind = str(error.code()).rpartition(".")[2]
        yield f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): {kind}: {error.desc()}"


def _refit(tensorrt: TensorRT, request: EngineRequest) -> bool:
    """Replace the weights of an engine; False if that cannot be done here, and a build is needed."""
    assert request.refit_from is not None
    try:
        _runtime, engine = _load(tensorrt, Path(request.refit_from))
    except (DeviceError, EngineError):
        return False
    if not tensorrt.refit(engine, Path(request.graph)):
        return False
    Path(request.output).write_bytes(engine.serialize())
    return True


def _inspect(tensorrt: TensorRT, request: EngineRequest) -> None:
    """Save the layers after fusion. It takes a GPU to load an engine: without one there is nothing to save, and nothing is lost."""
    try:
        _runtime, engine = _load(tensorrt, Path(request.output))
        text = tensorrt.inspect(engine)
    except (DeviceError, EngineError):
        return
    if text:
        Path(request.layers_output).write_text(text, encoding="utf-8")


def _load(tensorrt: TensorRT, path: Path) -> tuple[Any, Any]:
    """A runtime, which must outlive its engine, and the engine; its file is mapped and not read: a Jetson has no room for it twice."""
    open_cuda()
    runtime = tensorrt.runtime()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return runtime, tensorrt.deserialize(runtime, content, path.name)


def _peak_rss_mb() -> int:
    """Of this program; what getrusage says includes the process that started it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


def _failure(tensorrt: TensorRT, request: EngineRequest, *, no_memory: bool = False) -> EngineBuildError:
    reason = tensorrt.log.errors()
    if no_memory or _MEMORY.search(reason):
        return EngineBuildError(
            f"TensorRT {tensorrt.version} ran out of memory while it built {request.label}",
            got=reason,
            hint="close other programs, add swap (a Jetson needs 8 GB or more for a full-size language stage), lower --workspace-mb, "
            "or --optimization-level 1.",
        )
    turing = "FP32 GEMM is not supported" in reason
    return EngineBuildError(
        f"TensorRT {tensorrt.version} could not build an engine for {request.label}",
        got=reason,
        hint="TensorRT-RTX multiplies in fp16 only on Turing (sm75), and the action head is fp32; use --backend ort:cuda there."
        if turing
        else "the message names the layer; a lower --optimization-level, e.g. 2, avoids some of TensorRT's bugs.",
    )
