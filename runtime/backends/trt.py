"""TensorRT: the backend of the robot, and of GPUs for which the bundle has engines.

Finds the engines of this machine: an engine is loaded only if its record fits this bundle and this machine and its hash is right. What runs
them is runtime/backends/trt_chain.py; which TensorRT, and which way to CUDA: runtime/tensorrt_flavour.py and runtime/gpu.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from bundle import engine_cache
from bundle.errors import EngineError, NoEnginesError
from bundle.manifest import Manifest
from runtime.backends.trt_chain import DeviceChain
from runtime.chain import Chain
from runtime.gpu import Cuda, open_cuda
from runtime.tensorrt_flavour import FlavourName, TensorRT, installed, open_flavour

log = logging.getLogger("jetvla")


class TrtBackend:
    """Runs a bundle's engines.

    Args:
        flavour: `trt` or `rtx`; by default the first for which the bundle has engines.
        verify: hash the engines before they are loaded (sizes and records are always checked).
        fingerprint: load the engines of this folder and no others that the machine could run.
        cuda, tensorrt: for tests; by default what is installed.

    Raises:
        DeviceError: there is no usable GPU.
        EngineError: TensorRT is not installed.
    """

    name = "trt"
    remark = ""

    def __init__(
        self,
        flavour: FlavourName | None = None,
        *,
        verify: bool = True,
        fingerprint: str | None = None,
        cuda: Cuda | None = None,
        tensorrt: TensorRT | None = None,
    ) -> None:
        names = (flavour,) if flavour is not None else tuple(installed())
        if tensorrt is None and not names:
            raise EngineError(
                "TensorRT is not installed",
                expected="tensorrt (JetPack), or tensorrt_rtx",
                hint="pip install 'jetvla[trt-rtx]' on a desktop; on a Jetson it comes with JetPack.",
                absent=True,
            )
        self._cuda = open_cuda() if cuda is None else cuda
        self._flavours = _open_flavours(names) if tensorrt is None else [tensorrt]
        self._verify = verify
        self._fingerprint = fingerprint

    def open(self, folder: Path, manifest: Manifest) -> Chain:
        """Load the engines of this machine.

        Raises:
            NoEnginesError: there are none of what the manifest says.
            EngineError: one is corrupt or refused.
            DeviceError: out of memory, or the GPU failed.
        """
        device = self._cuda.device()
        wanted = []
        for tensorrt in self._flavours:
            for fingerprint in tensorrt.usable_fingerprints(device):
                if self._fingerprint not in (None, fingerprint):
                    continue
                wanted.append(fingerprint)
                records = engine_cache.newest(folder, manifest, fingerprint)
                if {stage for stage, _ in records} == {"vision", "language", "action_head"}:
                    return DeviceChain(self._cuda, tensorrt, device, folder, records, verify=self._verify)
        present = sorted(path.name for path in (folder / engine_cache.ENGINES).glob("*") if path.is_dir())
        raise NoEnginesError(
            f"{folder} has no {'INT8 ' if manifest.precision == 'int8' else ''}engines for this machine",
            got=", ".join(present) or "no engines",
            expected=" or ".join(wanted),
            hint="python export/build_engines.py --engines-only BUNDLE builds them here, from the bundle alone.",
        )


def _open_flavours(names: Iterable[FlavourName]) -> list[TensorRT]:
    """Those that can be imported: a broken installation of one must not hide the other's engines.

    Raises:
        EngineError: none can be imported.
    """
    opened, failed = [], []
    for name in names:
        try:
            opened.append(open_flavour(name))
        except EngineError as error:
            failed.append(error)
    if failed and not opened:
        raise failed[0]
    for reason in failed:
        log.warning("%s (%s)", reason.what, reason.got)
    return opened
