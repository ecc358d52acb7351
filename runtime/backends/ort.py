"""ONNX Runtime: the backend of desktops, and of plain CPUs.

A provider that is listed may still be unusable (missing libraries, wrong CUDA) or fall back silently, so nothing here trusts the
list: a session is asked which providers it really runs on, and the policy replays the bundle's golden step before it drives.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import BackendError
from bundle.manifest import Graph, Manifest
from runtime.backends.base import Feeds, Outputs, checked_feed
from runtime.chain import Chain, HostChain

PROVIDERS = {
    "ort:tensorrt": "TensorrtExecutionProvider",
    "ort:cuda": "CUDAExecutionProvider",
    "ort:openvino": "OpenVINOExecutionProvider",
    "ort:cpu": "CPUExecutionProvider",
}
_DTYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "uint8": np.uint8}


class OrtBackend:
    """One execution provider of ONNX Runtime.

    Args:
        name: a key of PROVIDERS.
        threads: intra-op threads; 0 takes the CPUs that this process may use.

    Raises:
        BackendError: onnxruntime or the provider is not installed.
    """

    def __init__(self, name: str = "ort:cpu", *, threads: int = 0) -> None:
        if threads < 0:
            raise BackendError(
                "the number of threads is negative", got=threads, expected="0 or more", hint="0 takes all."
            )
        self.name = name
        self._runtime = _import_onnxruntime()
        self._provider = PROVIDERS[name]
        self._threads = threads or len(os.sched_getaffinity(0))
        available = self._runtime.get_available_providers()
        if self._provider not in available:
            raise BackendError(
                f"ONNX Runtime has no {self._provider}",
                got=", ".join(available),
                expected=self._provider,
                hint="install the matching package (onnxruntime-gpu, onnxruntime-openvino), or use --backend ort:cpu.",
            )

    def open(self, folder: Path, manifest: Manifest) -> Chain:
        return HostChain(self, folder, manifest)

    def load(self, folder: Path, graph: Graph) -> OrtStage:
        """Create a session for one graph; its external weights are memory-mapped by ONNX Runtime."""
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        try:
            session = self._runtime.InferenceSession(str(folder / graph.file), options, providers=[self._provider])
        except Exception as error:  # onnxruntime raises its own exception types, which share no public base
            raise BackendError(
                f"{self.name} cannot load {graph.file}",
                got=f"{type(error).__name__}: {error}",
                hint="update onnxruntime, or choose another --backend.",
            ) from error
        used = session.get_providers()[0]
        if used != self._provider:
            raise BackendError(
                f"{self.name} fell back silently for {graph.file}",
                got=used,
                expected=self._provider,
                hint="the provider's libraries are missing or do not fit the driver; --backend ort:cpu works everywhere.",
            )
        return OrtStage(self._runtime, session, graph)


class OrtStage:
    """A session with its input and output buffers bound once; `run` copies in, executes, returns the bound outputs."""

    def __init__(self, runtime: Any, session: Any, graph: Graph) -> None:
        self._session = session
        self._file = graph.file
        self._binding = session.io_binding()
        self._inputs: dict[str, NDArray[np.generic]] = {}
        self._outputs: Outputs = {}
        # The values must outlive the binding: it keeps pointers, not references.
        self._values: list[Any] = []
        for tensors, arrays, bind in (
            (graph.inputs, self._inputs, self._binding.bind_ortvalue_input),
            (graph.outputs, self._outputs, self._binding.bind_ortvalue_output),
        ):
            for tensor in tensors:
                array = np.zeros(tensor.shape, _DTYPES[tensor.dtype])
                value = runtime.OrtValue.ortvalue_from_numpy(array)
                arrays[tensor.name] = array
                self._values.append(value)
                bind(tensor.name, value)

    def run(self, feeds: Feeds) -> Outputs:
        """Execute once; see `Stage.run`."""
        for name, array in self._inputs.items():
            np.copyto(array, checked_feed(self._file, name, feeds[name], array.shape, array.dtype))
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # as in load
            raise BackendError(
                f"{self._file} failed while running",
                got=f"{type(error).__name__}: {error}",
                hint="replay the golden step with runtime/run_robot.py BUNDLE --check; if it fails too, rebuild the bundle.",
            ) from error
        return self._outputs


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed",
            got=error,
            hint="pip install 'jetvla[ort]' (desktop GPU: 'jetvla[ort-gpu]').",
        ) from None
    return onnxruntime
