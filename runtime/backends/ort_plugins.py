"""ONNX Runtime's plugin providers: OpenVINO for x86 CPUs, TensorRT-RTX for desktop GPUs.

A plugin is a shared library in a package of its own, registered once a process with plain onnxruntime (1.23 or newer). Its devices then
appear in a list that names one library's provider several times, so a device is chosen by provider and kind. Pairs of versions matter:
some load and then fail in a way that onnxruntime answers with a silent retry on the CPU, others read inputs only when they are bound. So
sessions are made without fallback, and runtime/backends/ort_probe.py looks at numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from bundle.errors import BackendError


@dataclass(frozen=True)
class Plugin:
    """A plugin provider.

    Attributes:
        package: Python package that carries the library.
        extra: of jetvla, that installs it.
        device: (metadata key, value) that the wanted device has; None takes the first of the kind GPU.
        vendor: whose devices it lists, as seen here.
    """

    package: str
    extra: str
    device: tuple[str, str] | None
    vendor: str


PLUGINS = {
    "ort:tensorrt-rtx": Plugin("onnxruntime_ep_nv_tensorrt_rtx", "ort-trt-rtx", None, "the plugin lists NVIDIA's GPUs"),
    "ort:openvino": Plugin(
        "onnxruntime_ep_openvino", "openvino", ("ov_device", "CPU"), "the plugin lists Intel's CPUs, and none of AMD"
    ),
}


def plugin_installed(name: str) -> bool:
    """Its package can be found."""
    return importlib.util.find_spec(PLUGINS[name].package) is not None


def plugin_provider(name: str) -> str:
    """The provider's name, as onnxruntime reports it.

    Raises:
        BackendError: the package is not installed.
    """
    return str(_package(name).get_ep_name())


@cache  # registering twice is an error under one name, and doubles the devices under two
def plugin_device(name: str) -> Any:
    """The device to give to SessionOptions.add_provider_for_devices; registers the library at the first call.

    Raises:
        BackendError: not installed, does not load (no driver), or has no such device.
    """
    import onnxruntime

    plugin, package = PLUGINS[name], _package(name)
    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise BackendError(
            f"{name} needs a newer ONNX Runtime",
            got=onnxruntime.__version__,
            expected="1.23 or newer",
            hint=f"pip install -U 'jetvla[{plugin.extra}]'.",
            absent=True,
        )
    if not _devices(onnxruntime, plugin, package):
        try:
            onnxruntime.register_execution_provider_library(f"jetvla.{plugin.package}", package.get_library_path())
        except Exception as error:  # onnxruntime's own exception types share no public base
            raise BackendError(
                f"{name} does not load",
                got=str(error),
                hint="its libraries or the NVIDIA driver are missing; --backend ort:cpu works everywhere.",
                absent="libcuda" in str(error),
            ) from None
    found = _devices(onnxruntime, plugin, package)
    if not found:
        raise BackendError(
            f"{name} finds no device",
            got=", ".join(sorted({f"{item.device.vendor} {item.ep_name}" for item in onnxruntime.get_ep_devices()})),
            hint=f"{plugin.vendor}; --backend ort:cpu works everywhere.",
            absent=True,
        )
    return found[0]


def plugin_options(name: str, *, threads: int, exact: bool) -> dict[str, str]:
    """Provider options.

    Args:
        exact: OpenVINO computes in fp32; otherwise in bf16 where the CPU has it, which is fast and rounds to 8 bits.
    """
    if name != "ort:openvino":
        return {}
    settings = {
        "INFERENCE_PRECISION_HINT": "f32" if exact else "bf16",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
    }
    # By device: anything else than JSON nested so is refused, and the older flat options are ignored without a word.
    return {"load_config": json.dumps({"CPU": settings})}


def _devices(onnxruntime: Any, plugin: Plugin, package: Any) -> list[Any]:
    return [
        device
        for device in onnxruntime.get_ep_devices()
        if device.ep_name == package.get_ep_name()
        and (plugin.device is None or device.ep_metadata.get(plugin.device[0]) == plugin.device[1])
    ]


def _package(name: str) -> Any:
    plugin = PLUGINS[name]
    try:
        return importlib.import_module(plugin.package)
    except ImportError as error:
        raise BackendError(
            f"{name} is not installed", got=error, hint=f"pip install 'jetvla[{plugin.extra}]'.", absent=True
        ) from None
