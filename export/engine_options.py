"""What a user may say about TensorRT engines, and whether a build makes any: known before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

from bundle.errors import ConfigError, DeviceError
from runtime.gpu import Device, open_cuda
from runtime.tensorrt_flavour import installed

EnginePrecision = Literal["auto", "float", "int8"]


@dataclass(frozen=True)
class EngineOptions:
    """TensorRT engines.

    Attributes:
        tensorrt: auto takes TensorRT if it is installed and there is a GPU, else TensorRT-RTX if installed, else builds no engines.
        target: GPU to build for without having it (TensorRT-RTX): sm80 to sm121, or portable (sm80 and later). Repeatable.
        optimization_level: 0 (fast build) to 5 (fast engine).
        workspace_mb: scratch memory that kernels may use; by default from what is free.
        refit: build engines whose weights can be replaced, and replace instead of building where that is possible.
        bucket: sequence length of the language stage to build for; by default all of the bundle's. Repeatable.
        precision: of which stages; auto is the INT8 variant if the bundle has one that may run without being named. `--precision` of
            `--engines-only` sets it; a build's own `--precision` is that of the export, which has no INT8 variant yet.
    """

    tensorrt: Literal["auto", "trt", "rtx", "off"] = "auto"
    target: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    optimization_level: int = 3
    workspace_mb: int | None = None
    refit: bool = False
    bucket: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    precision: tyro.conf.Suppress[EnginePrecision] = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", tuple(name.lower() for name in self.target))
        if self.precision not in get_args(EnginePrecision):
            raise ConfigError(
                "unknown precision of engines",
                got=repr(self.precision),
                expected=", ".join(get_args(EnginePrecision)),
                hint="float builds what the bundle was exported in.",
            )
        if not 0 <= self.optimization_level <= 5:
            raise ConfigError(
                "the optimization level is not one",
                got=self.optimization_level,
                expected="0 to 5",
                hint="3 is the default.",
            )
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise ConfigError(
                "the workspace is too small",
                got=f"{self.workspace_mb} MB",
                expected="at least 1 MB",
                hint="leave --workspace-mb out to take it from the free memory.",
            )


def will_build(options: EngineOptions) -> bool:
    """True if a build with these options makes engines: decided by what is installed, without importing it."""
    if options.tensorrt == "auto":
        return "rtx" in installed() or ("trt" in installed() and find_device()[0] is not None)
    return options.tensorrt != "off"


def find_device() -> tuple[Device | None, str]:
    """The GPU, or why there is none."""
    try:
        return open_cuda().device(), ""
    except DeviceError as error:
        return None, error.what
