"""A provider counts only after it gave right numbers: three nodes, two different inputs, compared with numpy.

Being listed is no evidence, and neither is a session that was created: some pairs of onnxruntime and a plugin keep the first input for
ever, others fall back without a word. Costs milliseconds, before gigabytes are loaded. Whether the policy itself is right is the golden
step's question.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from bundle.errors import BackendError
from bundle.manifest import Graph, Tensor
from runtime.backends.base import Stage

# MatMul, Add, Relu on fp32 [4, 8], opset 17, as one compressed ONNX file; tests/runtime/test_ort_providers.py makes it anew.
_MODEL = (
    "c-rIOu$sfnCCJ5C!NpiE#F(qZ=9^gJTbjeg$Hkb-#h4_-SggeCn3BT9!^K!E#8|1s5|o-#D#Th)l%JHU)x*RA1OkjsjOAVpObiST`xzJ*fVg2F0~j>e0SSAcxcx|w"
    ")6#^5MUs~SP-=hPZL|H`b8qic^%MeOJ0RN*C<av8U>_w63~?boE*=g>Ar3Ak4i+HhNCFC0q6<2)a4`r70svnyN=*"
)
PROBE = Graph(
    file="the probe",
    sequence=None,
    nodes=3,
    inputs=(Tensor(name="x", dtype="float32", shape=(4, 8)),),
    outputs=(Tensor(name="y", dtype="float32", shape=(4, 8)),),
)
# bf16 and TF32 round products to 8 and 10 bits; a wrong number is off by its own size.
_TOLERANCE = 0.05


class Opener(Protocol):
    """Makes a stage of an ONNX file in memory."""

    def __call__(self, model: bytes, graph: Graph) -> Stage: ...


def probe_model() -> bytes:
    """The ONNX file."""
    return zlib.decompress(base64.b85decode(_MODEL))


def expected(x: np.ndarray) -> np.ndarray:
    """What the probe computes, in numpy."""
    weight = (np.arange(64, dtype=np.float32).reshape(8, 8) % 7 - 3) / 4
    result: np.ndarray = np.maximum(x @ weight + np.linspace(-1, 1, 8, dtype=np.float32), 0)
    return result


def probe(name: str, open_stage: Callable[[bytes, Graph], Stage]) -> None:
    """Run the probe through the very code that will run the policy.

    Raises:
        BackendError: the provider does not load, falls back, or computes something else.
    """
    stage = open_stage(probe_model(), PROBE)
    rng = np.random.default_rng(0)
    for turn in range(2):
        x = rng.normal(size=(4, 8)).astype(np.float32)
        got, right = stage.run({"x": x})["y"], expected(x)
        error = float(np.abs(got - right).max()) if np.isfinite(got).all() else float("inf")
        if error > _TOLERANCE * float(np.abs(right).max()):
            raise BackendError(
                f"{name} computes wrong numbers on this machine",
                got=f"error {error:.3g} in a model of three nodes, input {turn + 1} of 2",
                expected=f"at most {_TOLERANCE} of the largest number",
                hint="its version does not fit this onnxruntime or driver; --backend ort:cpu works everywhere.",
            )
