"""ONNX Runtime: the backend of desktops, and of plain CPUs.

A provider that is listed may still be unusable (missing libraries, wrong CUDA) or fall back silently, so nothing here trusts the list:
sessions are made without fallback, are asked what they really run on, and compute a probe before the bundle is touched; the policy then
replays the bundle's golden step before it drives.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import BackendError
from bundle.manifest import Graph, Manifest
from runtime.backends import mapped_weights
from runtime.backends.base import Feeds, Outputs, checked_feed
from runtime.backends.ort_device import OrtDeviceChain
from runtime.backends.ort_plugins import PLUGINS, plugin_device, plugin_installed, plugin_options, plugin_provider
from runtime.backends.ort_probe import probe, probe_int8
from runtime.chain import Chain, HostChain

PROVIDERS = {
    "ort:tensorrt": "TensorrtExecutionProvider",
    "ort:tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "ort:cuda": "CUDAExecutionProvider",
    "ort:openvino": "OpenVINOExecutionProvider",
    "ort:cpu": "CPUExecutionProvider",
}
# Providers whose buffers can stay on the GPU from stage to stage.
_ON_DEVICE = ("ort:cuda",)
# Providers that pack a copy of the weights and leave the file mapped.
_PACKING = ("ort:openvino",)
UNSIGNED = "INT8 weights run as unsigned integers, because products of signed ones saturate on this CPU (no VNNI): the same sums, slower"
_DTYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "uint8": np.uint8}


class OrtBackend:
    """One execution provider of ONNX Runtime.

    Args:
        name: a key of PROVIDERS.
        threads: CPU threads; 0 takes the CPUs that this process may use.

    Raises:
        BackendError: onnxruntime or the provider is not installed, or the probe failed.
    """

    def __init__(self, name: str = "ort:cpu", *, threads: int = 0) -> None:
        if threads < 0:
            raise BackendError(
                "the number of threads is negative", got=threads, expected="0 or more", hint="0 takes all."
            )
        self.name = name
        self.remark = ""
        self._unsigned = False
        self._runtime = _import_onnxruntime()
        self._provider = PROVIDERS[name]
        self._threads = threads or len(os.sched_getaffinity(0))
        self._exact = True
        self._weights: dict[str, str] = {}
        available = self._runtime.get_available_providers()
        # A plugin's provider is listed once it is registered, so the list does not tell it from a built-in one.
        self._plugin = name in PLUGINS and (plugin_installed(name) or self._provider not in available)
        if self._plugin:
            self._provider = plugin_provider(name)
            plugin_device(name)
        elif self._provider not in available:
            raise BackendError(
                f"ONNX Runtime has no {self._provider}",
                got=", ".join(available),
                expected=self._provider,
                hint="install the matching package (onnxruntime-gpu), or use --backend ort:cpu.",
                absent=True,
            )
        if name != "ort:cpu":
            probe(name, self._stage)

    def open(self, folder: Path, manifest: Manifest) -> Chain:
        """See Backend.open.

        Raises:
            BackendError: a graph is refused, or INT8 is asked for and this CPU's integer products are wrong.
        """
        # INT8 has rounded far more than bf16 does to what is left in floating point.
        self._exact = manifest.precision == "fp32"
        self._unsigned, self.remark = False, ""
        if manifest.precision == "int8":
            self.find_exact_products()
        self._weights = {graph.file: entry.weights for entry in manifest.stages.values() for graph in entry.graphs}
        if self.name in _ON_DEVICE:
            return OrtDeviceChain(
                self._runtime, lambda graph: self._session(str(folder / graph.file), graph), manifest, "cuda"
            )
        return HostChain(self, folder, manifest)

    def find_exact_products(self) -> None:
        """Take the INT8 products whose sums are right on this CPU.

        x86 CPUs without VNNI multiply uint8 by int8 and add pairs of products in 16 bits, which saturates. For them ONNX Runtime can make
        the int8 weights `w` of a graph uint8, `w + 128` with the zero point 128, when it loads it: the same integers from the same files,
        and for uint8 by uint8 it widens to 16 bits first. Elsewhere that would take up to twice the time (docs/performance.md).

        Raises:
            BackendError: they are wrong in both ways.
        """
        try:
            probe_int8(self.name, self._stage)
        except BackendError:
            if self.name != "ort:cpu":
                raise
            self._unsigned = True
            try:
                probe_int8(self.name, self._stage)
            except BackendError:
                self._unsigned = False
                raise
            self.remark = UNSIGNED

    def load(self, folder: Path, graph: Graph) -> OrtStage:
        """Create a session for one graph; its external weights are memory-mapped by ONNX Runtime."""
        session = self._session(str(folder / graph.file), graph)
        weights = folder / self._weights[graph.file] if self.name in _PACKING and graph.file in self._weights else None
        return OrtStage(self._runtime, session, graph, self._plugin, weights)

    def _stage(self, model: bytes, graph: Graph) -> OrtStage:
        return OrtStage(self._runtime, self._session(model, graph), graph, self._plugin)

    def _of_links(self, model: str | bytes, graph: Graph) -> str:
        """What to do where the graph or its weights are links, as caches keep files: ONNX Runtime reads weights beside the graph only."""
        if isinstance(model, bytes):
            return ""
        folder = Path(model).parent
        links = [name for name in (graph.file, self._weights.get(graph.file)) if name and (folder / name).is_symlink()]
        return f"{' and '.join(links)} may not be a link: cp -rL {folder} COPY, and use the copy." if links else ""

    def _session(self, model: str | bytes, graph: Graph) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        # Between its runs a session's threads would spin on CPUs that other stages, and the control loop, need.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._unsigned:
            options.add_session_config_entry("session.x64quantprecision", "1")
        arguments: dict[str, Any] = {}
        try:
            if self._plugin:
                # OpenVINO has threads of its own; onnxruntime's would fight them for the CPUs.
                options.intra_op_num_threads = 1
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
                options.add_provider_for_devices(
                    [plugin_device(self.name)], plugin_options(self.name, threads=self._threads, exact=self._exact)
                )
            else:
                arguments["providers"] = [(self._provider, _provider_options(self.name))]
            session = self._runtime.InferenceSession(model, options, enable_fallback=0, **arguments)
        except BackendError:
            raise
        except Exception as error:  # onnxruntime raises its own exception types, which share no public base
            raise BackendError(
                f"{self.name} cannot load {graph.file}",
                got=f"{type(error).__name__}: {str(error).strip()}",
                hint=self._of_links(model, graph) or "update onnxruntime, or choose another --backend.",
            ) from error
        used = session.get_providers()[0]
        if used != self._provider:
            raise BackendError(
                f"{self.name} fell back silently for {graph.file}",
                got=used,
                expected=self._provider,
                hint="the provider's libraries are missing or do not fit the driver; --backend ort:cpu works everywhere.",
            )
        return session


class OrtStage:
    """A session with its input and output buffers bound once; `run` copies in, executes, returns the bound outputs.

    Args:
        rebind: bind the inputs again before every run. Some plugin providers take an input's content when it is bound.
        packed: the weight file, if the provider has made a copy: its pages are given back now, and after the first run, which may read it.
    """

    def __init__(
        self, runtime: Any, session: Any, graph: Graph, rebind: bool = False, packed: Path | None = None
    ) -> None:
        self._session = session
        self._file = graph.file
        self._rebind = rebind
        self._packed = packed
        if packed is not None:
            mapped_weights.release(packed)
        self._binding = session.io_binding()
        self._inputs: dict[str, NDArray[np.generic]] = {}
        self._outputs: Outputs = {}
        # The values must outlive the binding: it keeps pointers, not references.
        self._values: dict[str, Any] = {}
        for tensors, arrays, bind in (
            (graph.inputs, self._inputs, self._binding.bind_ortvalue_input),
            (graph.outputs, self._outputs, self._binding.bind_ortvalue_output),
        ):
            for tensor in tensors:
                array = np.zeros(tensor.shape, _DTYPES[tensor.dtype])
                value = runtime.OrtValue.ortvalue_from_numpy(array)
                arrays[tensor.name] = array
                self._values[tensor.name] = value
                bind(tensor.name, value)

    def run(self, feeds: Feeds) -> Outputs:
        """Execute once; see `Stage.run`."""
        for name, array in self._inputs.items():
            np.copyto(array, checked_feed(self._file, name, feeds[name], array.shape, array.dtype))
        try:
            if self._rebind:
                for name in self._inputs:
                    self._binding.bind_ortvalue_input(name, self._values[name])
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # as in _session
            raise BackendError(
                f"{self._file} failed while running",
                got=f"{type(error).__name__}: {error}",
                hint="replay the golden step with runtime/run_robot.py BUNDLE --check; if it fails too, rebuild the bundle.",
            ) from error
        if self._packed is not None:
            mapped_weights.release(self._packed)
            self._packed = None
        return self._outputs


def _provider_options(name: str) -> dict[str, str]:
    """Of built-in providers. CUDA: all addresses are fixed, so it may replay its launches as a graph. TensorRT: compiling takes minutes, so
    what it compiled is kept, in the user's own cache and not in the bundle, whose engines have records.
    """
    if name == "ort:cuda":
        return {"enable_cuda_graph": "1", "use_tf32": "0"}
    if name == "ort:tensorrt":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jetvla" / "ort-tensorrt"
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        return {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache), "trt_timing_cache_enable": "1"}
    return {}


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed",
            got=error,
            hint="pip install 'jetvla[ort]' (desktop GPU: 'jetvla[ort-gpu]').",
            absent=True,
        ) from None
    onnxruntime.disable_telemetry_events()  # what a robot does is nobody else's business
    return onnxruntime
