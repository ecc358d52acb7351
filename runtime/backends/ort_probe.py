"""A provider counts only after it gave right numbers: three nodes, two different inputs, compared with numpy; for INT8 one product more.

Being listed is no evidence, and neither is a session that was created: some pairs of onnxruntime and a plugin keep the first input for
ever, others fall back without a word. CPUs without VNNI add pairs of 8-bit products in 16 bits, which saturates: INT8 is then wrong where
numbers are large, which the golden step need not meet (ort.py has the way that is right there). Costs milliseconds, before gigabytes are
loaded. Whether the policy itself is right is the golden step's question.
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
    form="portable",
    sequence=None,
    nodes=3,
    inputs=(Tensor(name="x", dtype="float32", shape=(4, 8)),),
    outputs=(Tensor(name="y", dtype="float32", shape=(4, 8)),),
)
# One product of the largest numbers, [4, 64] by [8, 64], all scales 1: ONNX Runtime's QGemm on uint8 with zero point 128, and the Q/DQ
# pattern on fp32 that OpenVINO fuses. tests/runtime/test_ort_providers.py makes them anew.
_INT8_MODELS = {
    "ort:cpu": (
        "c-rIOu)4*{WzWS}!Nrtp0K|qsYy`x{Kx`t!SgFJs=$@LJtHsO3R#KFhSL`IgxPXz#iZ?kwS1&g+xhTIlKdnTFr6e=2Qj14`(FtgZ7YhSJgS{4~027dB=*8He)yu-c!Qmjl4C"
        "EVmHL%o=f)Ne0v^Y4xNyXSp0hCnmVJ#t`T2R6<@#0{Bf+%5NdKKd1;^ANt;^1Q9U;$!>B%oj=SdbAe$l=5!Am}8>g_>Fg7y(t%Dgg"
    ),
    "ort:openvino": (
        "c-rIOu-eGRCC|lJ!Nrtp0K|quOeF?Ne1WBjc_o=usXm!`sfk5gN?bruBo&5A0xqeAsA}|qaz;RG48$ftHAa|fw79ug5-T!`B^VYkGI1#Y4K)N}BO%60B^LM8+*~bQF1C`Q#J"
        "plB2}Ym_A(oQNyh<$|0Y)dF)m|(N3=Q^LoC3^1o}m{bgH|sK2M31(m~Z6Oz*0X7Ml{gU;@|)$6=N?2P*TB%wS<6bK?%pii-Q3QqJ)9jK!}fvhl5dwgNuoS1&AGzfP$51f*ej"
        "v0)hbJr8$T"
    ),
}
_INT8_LARGEST = {"ort:cpu": 255, "ort:openvino": 127}
# bf16 around an exact sum rounds to 8 bits; a sum that saturated is off by nearly all of itself.
_INT8_TOLERANCE = 0.01
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


def int8_model(name: str) -> bytes:
    """The ONNX file of the INT8 product as a backend runs it."""
    return zlib.decompress(base64.b85decode(_INT8_MODELS[name]))


def probe_int8(name: str, open_stage: Callable[[bytes, Graph], Stage]) -> None:
    """Run the INT8 product; for backends of CPUs, nothing on others.

    Raises:
        BackendError: the provider does not load it, or its sums saturate.
    """
    if name not in _INT8_MODELS:
        return
    dtype = "uint8" if name == "ort:cpu" else "float32"
    graph = Graph(
        file="the INT8 probe",
        form="portable",
        sequence=None,
        nodes=1,
        inputs=(Tensor(name="x", dtype=dtype, shape=(4, 64)),),
        outputs=(Tensor(name="y", dtype="float32", shape=(4, 8)),),
    )
    got = open_stage(int8_model(name), graph).run({"x": np.full((4, 64), _INT8_LARGEST[name], dtype)})["y"]
    right = 64 * 127 * 127
    error = float(np.abs(got.astype(np.float64) - right).max()) / right
    if not error <= _INT8_TOLERANCE:
        raise BackendError(
            "this CPU's 8-bit products saturate",
            got=f"a sum of 64 products that is off by {error:.1%}, on {name}",
            expected="an exact sum",
            hint="run in floating point: --precision float."
            if name == "ort:cpu"
            else "--backend ort:cpu computes INT8 exactly on such CPUs; or run in floating point: --precision float.",
        )
