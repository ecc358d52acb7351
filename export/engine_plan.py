"""Which engines to build: for which machines, with which TensorRT, and which of them are there already.

Decided before anything is built, and without torch or onnx, so that a robot can do it with nothing but the bundle.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from bundle import engine_cache
from bundle.engine_cache import EngineRecord, EngineSettings
from bundle.errors import ConfigError, DeviceError, EngineError
from bundle.manifest import Graph, Manifest
from export.config import code_sha256
from export.console import human_bytes, plain_table
from export.engine_options import EngineOptions, find_device
from runtime.gpu import Device, open_cuda
from runtime.tensorrt_flavour import MODULES, PORTABLE, TensorRT, installed, open_flavour

# Sources whose change makes other engines out of the same graphs.
_BUILD_CODE = ("export/to_tensorrt.py", "runtime/tensorrt_flavour.py")
_MEGABYTE = 1 << 20
# Kernels of these sizes gain nothing from more scratch memory, and a Jetson has none to give away.
_WORKSPACE_MOST, _WORKSPACE_LEAST = 4096 * _MEGABYTE, 256 * _MEGABYTE


@dataclass(frozen=True)
class Machines:
    """Who builds, and for whom.

    Attributes:
        tensorrt: the flavour; None if no engines are built.
        device: the GPU of this machine, if any.
        targets: what TensorRT-RTX is told to build for; (None,) for TensorRT itself.
        reason: why this choice.
    """

    tensorrt: TensorRT | None
    device: Device | None
    targets: tuple[str | None, ...]
    reason: str

    def fingerprint(self, target: str | None) -> str:
        assert self.tensorrt is not None
        return self.tensorrt.fingerprint(self.device, target)

    def runs_here(self, fingerprint: str) -> bool:
        """This machine may load engines of that fingerprint."""
        if self.tensorrt is None or self.device is None:
            return False
        return fingerprint in self.tensorrt.usable_fingerprints(self.device)


@dataclass(frozen=True)
class EngineTask:
    """One engine that the bundle should have."""

    stage: str
    graph: Graph
    content: str
    key: str
    fingerprint: str
    target: str | None
    settings: EngineSettings
    cached: EngineRecord | None

    @property
    def label(self) -> str:
        return engine_cache.engine_label(self.stage, self.graph.sequence)


def choose_machines(options: EngineOptions) -> Machines:
    """Pick flavour and targets.

    Raises:
        ConfigError: a target that cannot be built here.
        EngineError: the flavour asked for is not installed, or has no GPU to build for.
    """
    if options.tensorrt == "off":
        if options.target:
            raise ConfigError(
                "a target is named, but engines are off", got="--tensorrt off", hint="leave --target or --tensorrt out."
            )
        return Machines(None, None, (), "off")
    device, why_no_gpu = find_device()
    reasons = []
    if options.tensorrt in ("auto", "trt") and not (options.target and options.tensorrt == "auto"):
        if options.tensorrt == "trt" or ("trt" in installed() and device is not None):
            try:
                return _with_tensorrt(options, device, why_no_gpu)
            except EngineError as error:
                if options.tensorrt == "trt":
                    raise
                reasons.append(f"TensorRT: {error.what} ({error.got}); {error.hint}")
        elif "trt" in installed():
            reasons.append(f"TensorRT needs a GPU ({why_no_gpu})")
        else:
            reasons.append("TensorRT is not installed")
    if options.tensorrt == "rtx" or "rtx" in installed():
        return _with_rtx(options, device, "; ".join(reasons))
    if options.target:
        raise ConfigError(
            "building for another GPU takes TensorRT-RTX",
            got="tensorrt_rtx is not installed",
            hint="pip install 'jetvla[trt-rtx]'; engines of a Jetson are built on it: build_engines.py --engines-only BUNDLE.",
        )
    reasons.append("TensorRT-RTX is not installed")
    return Machines(None, device, (), "; ".join(reasons))


def view_to_build(manifest: Manifest, options: EngineOptions) -> Manifest:
    """The bundle as its engines are to be: its INT8 view or itself.

    Raises:
        BundleError: INT8 is asked for, and the bundle has no such variant.
    """
    trusted = manifest.quantized is not None and manifest.quantized.trusted
    int8 = options.precision == "int8" or (options.precision == "auto" and trusted)
    return manifest.int8() if int8 else manifest


def make_tasks(bundle: Path, manifest: Manifest, options: EngineOptions, machines: Machines) -> list[EngineTask]:
    """All engines that the bundle should have for these machines, each with its record if it is there (not yet hashed).

    Args:
        manifest: the bundle's, or its INT8 view.
    """
    code = code_sha256(_BUILD_CODE)
    unknown = sorted(set(options.bucket) - set(manifest.prompt.buckets))
    if unknown:
        raise ConfigError(
            "the bundle has no graph of this length",
            got=", ".join(map(str, unknown)),
            expected=", ".join(map(str, manifest.prompt.buckets)),
            hint="leave --bucket out to build for all of them.",
        )
    tasks = []
    for target in machines.targets:
        fingerprint = machines.fingerprint(target)
        for stage, graph in engine_cache.graphs(manifest):
            if options.bucket and graph.sequence is not None and graph.sequence not in options.bucket:
                continue
            content = engine_cache.content_key(manifest, stage, graph)
            settings = EngineSettings(
                optimization_level=options.optimization_level,
                refit=options.refit,
                code=code,
                graph=manifest.files[graph.file].sha256,
            )
            key = engine_cache.engine_key(content, fingerprint, settings)
            cached = engine_cache.find(bundle, fingerprint, key, stage, graph.sequence)
            tasks.append(EngineTask(stage, graph, content, key, fingerprint, target, settings, cached))
    return tasks


def tasks_table(manifest: Manifest, tasks: list[EngineTask]) -> Table:
    """The plan, for people."""
    table = plain_table("engine", "for", "precision", "weights", "state")
    for task in tasks:
        entry = manifest.stages[task.stage]
        table.add_row(
            task.label,
            task.fingerprint,
            entry.precision,
            human_bytes(entry.weight_bytes),
            "cached" if task.cached is not None else "build",
        )
    return table


def workspace_bytes(options: EngineOptions, free: int | None, weight_bytes: int) -> int:
    """Scratch memory for a build: a quarter of what the weights (twice: as read and as built) leave free, within bounds.

    Args:
        free: GPU memory that is free; on a Jetson that is the machine's. None without a GPU.
    """
    if options.workspace_mb is not None:
        return options.workspace_mb * _MEGABYTE
    if free is None:
        return _WORKSPACE_MOST
    return max(_WORKSPACE_LEAST, min(_WORKSPACE_MOST, (free - 2 * weight_bytes) // 4))


def free_device_bytes() -> int | None:
    """GPU memory that is free now; None without a GPU.

    Where the GPU shares the host's memory, CUDA counts the page cache as taken, which the kernel gives back when asked: there it is what
    the kernel calls available.
    """
    try:
        cuda = open_cuda()
        if cuda.device().integrated:
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return cuda.free_bytes()
    except DeviceError:
        return None


def _with_tensorrt(options: EngineOptions, device: Device | None, why_no_gpu: str) -> Machines:
    tensorrt = open_flavour("trt")
    if device is None:
        raise EngineError(
            "TensorRT builds for the GPU that it runs on, and there is none",
            got=why_no_gpu,
            hint="run this on the robot, or use --tensorrt rtx --target sm86 for a desktop GPU.",
        )
    own = f"sm{device.sm}"
    if any(target != own for target in options.target):
        raise ConfigError(
            "TensorRT builds for the GPU that it runs on",
            got=f"--target {' '.join(options.target)}",
            expected=own,
            hint="copy the bundle to the other machine and run build_engines.py --engines-only BUNDLE there.",
        )
    return Machines(tensorrt, device, (None,), f"{MODULES['trt']} {tensorrt.version} for {device.name}")


def _with_rtx(options: EngineOptions, device: Device | None, reasons: str) -> Machines:
    tensorrt = open_flavour("rtx")
    known = (*tensorrt.targets(), PORTABLE)
    unknown = [target for target in options.target if target not in known]
    if unknown:
        raise ConfigError(
            "TensorRT-RTX does not build for this GPU",
            got=", ".join(unknown),
            expected=", ".join(known),
            hint="Jetson Orin (sm87) and Thor have TensorRT: copy the bundle there, run build_engines.py --engines-only BUNDLE."
            if "sm87" in unknown
            else f"{PORTABLE} covers sm80, sm86, sm89, sm120 and later.",
        )
    if options.refit and device is None:
        raise ConfigError(
            "TensorRT-RTX builds refittable engines only where there is a GPU",
            got="--refit without a GPU",
            hint="leave --refit out; a swap of adapters then builds the engines that it changes.",
        )
    own = f"sm{device.sm}" if device is not None else None
    targets = options.target or (own if own in known else PORTABLE,)
    where = f"{MODULES['rtx']} {tensorrt.version} for {', '.join(map(str, targets))}"
    return Machines(tensorrt, device, tuple(dict.fromkeys(targets)), f"{where} ({reasons})" if reasons else where)
