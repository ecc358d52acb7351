"""Facts about this machine and what is installed on it, for a bug report: no names of people or hosts, nothing that is secret."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path

from bundle.errors import BackendError
from runtime.backends.select import NAMES, open_backend
from runtime.processor import processor_name

# By the names of distributions; some have several, of which one is installed at most.
LIBRARIES = (
    "jetvla",
    "numpy",
    "msgspec",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-openvino",
    "onnxruntime-ep-nv-tensorrt-rtx",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "pycuda",
    "opencv-python-headless",
    "opencv-python",
    "cyclonedds",
    "mcap",
    "h5py",
    "tokenizers",
    "fastapi",
    "httpx",
)
# What JetPack and ROS install without telling pip: the module, and the distributions that would have told.
_MODULES = {"cv2": ("opencv-python-headless", "opencv-python"), "rclpy": ("rclpy",), "tensorrt": ("tensorrt",)}


def machine_lines(root: Path = Path("/")) -> list[str]:
    """System, processor, memory; on a Jetson also which one, and its release."""
    system = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(root / "etc/os-release"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    lines = [
        f"{system[1] if system else platform.system()}, kernel {platform.release()}, {platform.machine()}",
        f"{processor_name(root) or 'processor unknown'}, {len(os.sched_getaffinity(0))} CPUs for this process, "
        + (f"{int(memory[1]) / 2**20:.1f} GiB" if memory else "memory unknown"),
    ]
    model = _read(root / "proc/device-tree/model").strip("\0\n ")
    release = _read(root / "etc/nv_tegra_release").partition("\n")[0].strip("# ")
    return [*lines, *(line for line in (model, release) if line)]


def library_line() -> str:
    """Python and the libraries that are there, with their versions."""
    found = {"Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for module, distributions in _MODULES.items():
        if not found.keys() & set(distributions) and importlib.util.find_spec(module) is not None:
            found[module] = _version(module)
    return ", ".join(f"{name} {version}" for name, version in found.items())


def backend_lines() -> list[str]:
    """Each backend, and whether its library, its device and its probe work; no policy is loaded."""
    lines = []
    for name in NAMES:
        if name in ("auto", "ort", "fake"):
            continue
        try:
            open_backend(name)
        except BackendError as error:
            lines.append(f"{name}: no, {error.what}")
        else:
            lines.append(f"{name}: yes")
    return lines


def without_home(text: str, home: str | None = None) -> str:
    """The text with the home folder as ~, which says as much and names nobody."""
    folder = (os.environ.get("HOME", "") if home is None else home).rstrip("/")
    return re.sub(rf"{re.escape(folder)}(?![\w.-])", "~", text) if folder else text


def _version(module: str) -> str:
    try:
        return str(getattr(importlib.import_module(module), "__version__", "of unknown version"))
    except Exception as error:  # a broken installation may raise anything, and is just what a bug report should tell
        return f"does not import ({type(error).__name__}: {error})"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
