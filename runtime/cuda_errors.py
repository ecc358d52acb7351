"""What CUDA's error codes mean for the user: no GPU, an old driver, too little memory, or a process that has lost its GPU.

Knows nothing about how CUDA is called: the codes are the driver's, whichever package hands them on.
"""

from __future__ import annotations

from bundle.errors import DeviceError

# CUresult values (CUDA driver API, error codes). After a sticky one every later call of the process fails.
_STICKY = {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999}
_NO_MEMORY = {2}
_DRIVER_TOO_OLD = {34, 35, 36, 222, 803, 804}
_NO_DEVICE = {100, 101}


def cuda_error(action: str, code: int, name: str, text: str) -> DeviceError:
    """The typed error of a CUDA error code."""
    got = f"{name} ({code}): {text}"
    if code in _DRIVER_TOO_OLD:
        return DeviceError(
            "there is no NVIDIA driver, or it is too old for this CUDA",
            got=got,
            hint="update the driver, or install an older cuda-bindings (12 for JetPack 6); --backend ort:cpu needs no GPU.",
        )
    if code in _NO_DEVICE:
        return DeviceError(
            "there is no NVIDIA GPU",
            got=got,
            hint="check nvidia-smi and CUDA_VISIBLE_DEVICES, in a container --gpus all or --runtime nvidia; "
            "--backend ort:cpu needs no GPU.",
            absent=True,
        )
    if code in _NO_MEMORY:
        return DeviceError(
            f"out of GPU memory: {action}",
            got=got,
            hint="close other programs on the GPU (on a Jetson also those in main memory), or use an fp16 bundle.",
        )
    if code in _STICKY:
        return DeviceError(
            f"the GPU failed: {action}",
            got=got,
            hint="this process cannot use the GPU any more: stop the robot and start the program again; "
            "if it happens again, run compute-sanitizer and check dmesg for Xid errors.",
            sticky=True,
        )
    return DeviceError(f"CUDA failed: {action}", got=got, hint="run with --backend ort:cpu to go on without the GPU.")
