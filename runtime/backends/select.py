"""Which backend runs a bundle, and in which precision: what was asked for, or the first that proves itself.

Being listed is no evidence. `candidates` only orders them; the policy loads each in turn and keeps the first whose golden step has the
right numbers. Floating point runs on OpenVINO only when it is named: its speed is bf16's, and so are its errors
(docs/decisions/0008-execution-providers.md). INT8 runs by default on the CPU backends on which the bundle says that it was measured, and
was not slower there than floating point.
"""

from __future__ import annotations

from typing import Literal, get_args

from bundle.errors import BackendError, ConfigError
from bundle.manifest import Form, Manifest, Quantized
from runtime.backends.base import Backend
from runtime.backends.fake import FakeBackend
from runtime.backends.ort import PROVIDERS, OrtBackend
from runtime.backends.trt import TrtBackend

Kind = Literal["int8", "float"]
Candidate = tuple[str, Kind]
PrecisionChoice = Literal["auto", "int8", "float"]
PRECISION_CHOICES: tuple[PrecisionChoice, ...] = get_args(PrecisionChoice)

ORT_ORDER = ("ort:tensorrt", "ort:tensorrt-rtx", "ort:cuda", "ort:cpu")
AUTO_ORDER = ("trt", *ORT_ORDER)
NAMES = ("auto", "trt", "ort", *PROVIDERS, "fake")
# What a measurement on a CPU may propose; ort:openvino in floating point is nobody's default.
_FLOAT: Candidate = ("ort:cpu", "float")
_ON_CPU: tuple[Candidate, ...] = (("ort:openvino", "int8"), ("ort:cpu", "int8"), _FLOAT)
# Besides engines, only these gain from INT8; on other providers of GPUs its graphs run, but not faster.
FORMS: dict[str, Form] = {"ort:cpu": "ort-cpu", "ort:openvino": "openvino"}


def candidates(
    name: str, precision: PrecisionChoice = "auto", quantized: Quantized | None = None
) -> tuple[Candidate, ...]:
    """What to try, in order: (backend, int8 or float).

    Args:
        name: what the user asked for: `auto`, `ort`, or one backend.
        precision: `auto` tries INT8 first where it is fast - with engines, and on CPU backends that the bundle measured so -, if the
            bundle's variant may be run without being named.
        quantized: the bundle's variant, if it has one.

    Raises:
        BackendError: the name is unknown.
        ConfigError: the precision is unknown.
    """
    if name not in NAMES:
        raise BackendError(
            f"unknown backend {name!r}", expected=", ".join(NAMES), hint="--backend auto picks one that works."
        )
    if precision not in PRECISION_CHOICES:
        raise ConfigError(
            f"unknown precision {precision!r}",
            expected=", ".join(PRECISION_CHOICES),
            hint="auto runs INT8 where the bundle has it and it is fast.",
        )
    trusted = precision == "auto" and quantized is not None and quantized.trusted
    if precision == "float" or (precision == "auto" and not trusted):
        names = {"auto": AUTO_ORDER, "ort": ORT_ORDER}.get(name, (name,))
        return tuple((each, "float") for each in names)
    if name not in ("auto", "ort"):
        if precision == "int8":
            return ((name, "int8"),)
        gains = name == "trt" or (name in FORMS and faster_in_int8(name, quantized))
        return ((name, "int8"), (name, "float")) if gains else ((name, "float"),)
    if precision == "auto":
        return (*_engines(name), *dict.fromkeys((*_measured_on_cpu(quantized), _FLOAT)))
    order = (*_engines(name), *_measured_on_cpu(quantized), ("ort:cpu", "int8"))
    return tuple(dict.fromkeys(each for each in order if each[1] == "int8"))


def faster_in_int8(name: str, quantized: Quantized | None) -> bool | None:
    """Whether a backend was measured to be at least as fast in INT8 as in floating point; None if INT8 was not measured there.

    INT8 alone is enough: where floating point was not worth a measurement, it is nobody's default.
    """
    times: dict[Kind, float] = {}
    for each in quantized.measured if quantized is not None else ():
        if each.backend == name:
            kind: Kind = "int8" if each.precision == "int8" else "float"
            times[kind] = min(each.step_ms, times.get(kind, each.step_ms))
    if "int8" not in times:
        return None
    return times["int8"] <= times.get("float", times["int8"])


def _engines(name: str) -> tuple[Candidate, ...]:
    """GPUs: engines of INT8, then floating point."""
    providers: tuple[Candidate, ...] = tuple((each, "float") for each in ORT_ORDER if each != "ort:cpu")
    return (("trt", "int8"), ("trt", "float"), *providers) if name == "auto" else providers


def _measured_on_cpu(quantized: Quantized | None) -> tuple[Candidate, ...]:
    """CPUs: what the bundle measured, the fastest first. What was not measured was not judged either."""
    measured: list[Candidate] = [
        (each.backend, "int8" if each.precision == "int8" else "float")
        for each in (quantized.measured if quantized is not None else ())
    ]
    return tuple(each for each in measured if each in _ON_CPU)


def view_of(manifest: Manifest, name: str, kind: Kind) -> Manifest:
    """The manifest as one candidate runs it.

    Raises:
        BundleError: INT8, and the bundle has no such variant.
    """
    if kind == "float":
        return manifest
    return manifest.int8(form_of(name))


def form_of(name: str) -> Form:
    """The form of INT8 graphs that a backend runs best."""
    return FORMS.get(name, "portable")


def open_backend(name: str, *, threads: int = 0, verify: bool = True) -> Backend:
    """Construct one backend by its exact name.

    Args:
        verify: hash engines before they are loaded.

    Raises:
        BackendError: its library is not installed, there is no device for it, or its probe failed.
    """
    if name == "fake":
        return FakeBackend()
    return TrtBackend(verify=verify) if name == "trt" else OrtBackend(name, threads=threads)
