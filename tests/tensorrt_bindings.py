"""NVIDIA's Python bindings of TensorRT without TensorRT: wheels from PyPI over stubs in C, and a description of what they offer.

A wheel of bindings is Python and one compiled module, which wants a handful of C functions of TensorRT's libraries. Stubs that return
nothing let it be imported, subclassed and asked; a Builder or Runtime then gives nothing, as it does on a machine whose driver is too
old. Descriptions (tests/runtime/tensorrt_api/*.json, written by scripts/record_tensorrt_api) hold names and numbers of arguments.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "tests" / "runtime" / "tensorrt_api"
WHEELS_VARIABLE = "JETVLA_TENSORRT_WHEELS"
# The oldest that is taken; JetPack 6.1 and 6.2; two between; JetPack 7.2; the newest. The first is what JetPack 6.0 has, and is refused.
REFUSED = "tensorrt-bindings==8.6.1"
RELEASES = (
    "tensorrt-cu12-bindings==10.0.1",
    "tensorrt-cu12-bindings==10.3.0",
    "tensorrt-cu12-bindings==10.7.0",
    "tensorrt-cu12-bindings==10.13.3.9",
    "tensorrt-cu12-bindings==10.16.1.11",
    "tensorrt-cu13-bindings==11.4.0.106",
)
# What jetvla touches, or a fake offers.
CLASSES = (
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "DataType",
    "EngineInspector",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "ErrorCode",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "ILogger",
    "ILogger.Severity",
    "INetworkDefinition",
    "IProgressMonitor",
    "IRuntimeCache",
    "IRuntimeConfig",
    "IStreamWriter",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "ProfilingVerbosity",
    "Refitter",
    "Runtime",
    "TensorIOMode",
)
TOOLS = ("cc", "nm", "readelf")

Api = dict[str, Any]
"""{"module", "version", "classes": {name: {"methods": {name: [[least, most arguments], ...]}, "attributes": [...], "values": {...}}}}"""


def find_wheel(folder: Path, requirement: str) -> Path | None:
    """The wheel of a release in a folder, for Linux and any of the interpreters that it holds."""
    stem = requirement.replace("-", "_").replace("==", "-")
    return next(iter(sorted(folder.glob(f"{stem}-*linux*_x86_64.whl"))), None)


def make_importable(wheel: Path, folder: Path) -> dict[str, str]:
    """Unpack a wheel as JetPack lays it out (`tensorrt/`), make its stubs, and return the environment in which it can be imported."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (folder / "tensorrt_bindings").rename(folder / "tensorrt")
    compiled = str(next((folder / "tensorrt").glob("tensorrt*.so")))
    dynamic = subprocess.run(["readelf", "-d", compiled], capture_output=True, text=True, check=True).stdout
    undefined = subprocess.run(["nm", "-D", "--undefined-only", compiled], capture_output=True, text=True, check=True)
    here = ctypes.CDLL(None)  # what C's own library and the interpreter have
    wanted = [
        name
        for name in re.findall(r" U (\w+)$", undefined.stdout, re.MULTILINE)
        if not hasattr(here, name) and not name.startswith(("Py", "_Py"))
    ]
    stubs = folder / "stubs"
    stubs.mkdir()
    source = stubs / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in wanted), encoding="utf-8")
    for library in re.findall(r"\[(libnv\w+\.so\.\d+)\]", dynamic):
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(stubs / library), str(source)], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


def missing_tool() -> str | None:
    """The first of the tools that making stubs takes and that this machine lacks."""
    return next((tool for tool in TOOLS if shutil.which(tool) is None), None)


def describe(module: Any) -> Api:
    """What a TensorRT module offers, of CLASSES: names and numbers of arguments, without `self`."""
    classes = {}
    for name in CLASSES:
        kind = module
        for part in name.split("."):
            kind = getattr(kind, part, None)
        if kind is not None:
            classes[name] = _describe_class(kind)
    return {"module": module.__name__, "version": module.__version__, "classes": classes}


def _describe_class(kind: Any) -> Api:
    values = {name: int(value) for name, value in getattr(kind, "__members__", {}).items()}
    methods, attributes = {}, []
    for name in dir(kind):
        # Networks come from the parser, so none of the 70 methods that add a layer is called.
        if name in values or name.startswith("add_") or (name.startswith("_") and (name != "__init__" or values)):
            continue
        member = getattr(kind, name)
        if isinstance(member, type):
            continue
        if callable(member):
            methods[name] = _arguments(name, member.__doc__ or "")
        else:
            attributes.append(name)
    found = {"methods": methods, "attributes": attributes, "values": values}
    return {part: content for part, content in found.items() if content}


def _arguments(name: str, text: str) -> list[list[int]]:
    """[least, most] arguments of each overload, read from the signatures that pybind11 writes: `f(self: T, a: int, b: int = 0) -> R`."""
    counts = []
    for match in re.finditer(rf"^(?:\d+\. )?{name}\(self: ", text, re.MULTILINE):
        parameters, depth = [""], 1
        for letter in text[text.index("(", match.start()) + 1 :]:
            depth += (letter in "([<{") - (letter in ")]>}")
            if depth == 0:
                break
            if letter == "," and depth == 1:
                parameters.append("")
            else:
                parameters[-1] += letter
        own = [item for item in parameters[1:] if item.strip() not in ("/", "*")]
        counts.append([sum(" = " not in item for item in own), len(own)])
    return counts


def write_record(api: Api) -> Path:
    """Save a description, a class a line."""
    path = RECORDS / f"{api['module']}-{api['version']}.json"
    lines = [
        f'"{name}":{json.dumps(api["classes"][name], sort_keys=True, separators=(",", ":"))}'
        for name in sorted(api["classes"])
    ]
    head = f'{{"module":"{api["module"]}","version":"{api["version"]}","classes":{{\n'
    RECORDS.mkdir(exist_ok=True)
    path.write_text(head + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    return path


def records() -> dict[str, Api]:
    """All descriptions, by file name: `tensorrt-10.3.0`."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*.json"))}
