"""The whole way - checkpoint, bundle, runtime - against what the reference implementation computed.

The bundles are built from the recorded checkpoints, so these tests need torch and the recorded cases.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.golden import cosine
from runtime.policy import ActionChunk, Policy
from tests.oracle import CASES, OracleCase, oracle_case
from tests.runtime.conftest import BuiltBundle

# fp32 on both sides: what is left is the order of summation, through 2 + 3 layers and four LSTMs.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Errors:
    """The worst of a stream: smallest cosine and largest absolute errors."""

    cosine: float
    feature: float
    action: float
    command: float


def load(bundle: Path) -> Policy:
    return Policy.load(bundle, "ort:cpu", threads=1)


def compare(
    chunks: Iterable[ActionChunk],
    features: NDArray[np.generic],
    actions: NDArray[np.generic],
    commands: NDArray[np.generic] | None = None,
) -> Errors:
    worst = Errors(1.0, 0.0, 0.0, 0.0)
    expected = zip(chunks, features, actions, [None] * len(features) if commands is None else commands, strict=True)
    for chunk, feature, action, command in expected:
        assert chunk.feature.shape == feature.ravel().shape
        assert chunk.normalized.shape == action.shape
        worst = Errors(
            min(worst.cosine, cosine(chunk.feature, feature)),
            max(worst.feature, float(np.abs(chunk.feature - feature.ravel()).max())),
            max(worst.action, float(np.abs(chunk.normalized - action).max())),
            worst.command if command is None else max(worst.command, float(np.abs(chunk.values[0] - command).max())),
        )
    return worst


def streamed(bundle: Path, case: OracleCase) -> Errors:
    """W + 4 frames, a reset, two frames; upstream's cases recorded the executed command, too."""
    policy = load(bundle)
    ids = case.inputs["win0.input_ids"][0]
    chunks = []
    for step, index in enumerate(case.inputs["stream.frame_index"]):
        if step == 0 or step in case.inputs["stream.reset_before"]:
            policy.reset(token_ids=ids)
        chunks.append(policy.step(case.inputs["frames_u8"][0, index]))
    return compare(
        chunks,
        case.expected["stream.action_hs"],
        case.chunks("stream", "arm_chunk", "gripper_logit_chunk"),
        case.expected.get("stream.final_action"),
    )


@pytest.mark.parametrize("name", CASES)
def test_the_stream_is_the_references(built_bundle: BuiltBundle, name: str) -> None:
    case = oracle_case(name)
    errors = streamed(built_bundle(name, "fp32", True), case)
    assert ("stream.final_action" in case.expected) == (not name.startswith("fork"))
    assert max(errors.feature, errors.action, errors.command) < TOLERANCE
    assert errors.cosine > 1 - 1e-9


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_streams_can_tell(name: str) -> None:
    """That the history and the frame matter in them; else the test above would prove nothing."""
    case = oracle_case(name)
    features, actions = case.expected["stream.action_hs"], case.expected["stream.arm_chunk"]
    (reset,) = case.inputs["stream.reset_before"]
    assert 8 < reset < len(features) - 1
    for offset in range(len(features) - reset):  # the same frames again give the same, after the reset and only then
        np.testing.assert_allclose(features[reset + offset], features[offset], atol=TOLERANCE)
        np.testing.assert_allclose(actions[reset + offset], actions[offset], atol=TOLERANCE)
    assert np.abs(actions[1:reset] - actions[:1]).max(axis=(1, 2)).min() > 10 * TOLERANCE
    assert np.abs(features[1:reset] - features[:1]).max(axis=(1, 2)).min() > 10 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("prefix", "clip"), [("win1", 1), ("fixedpad", 0)])
def test_windows_of_other_prompts(built_bundle: BuiltBundle, name: str, prefix: str, clip: int) -> None:
    """Another instruction, and one padded as some servers do: its action token stands behind the padding."""
    case = oracle_case(name)
    policy = load(built_bundle(name, "fp32", True))
    ids, mask = (case.inputs[f"{prefix}.{part}"][0] for part in ("input_ids", "attention_mask"))
    policy.reset(token_ids=ids, attention_mask=mask)

    chunks = [policy.step(frame) for frame in case.inputs["frames_u8"][clip, : policy.window]]

    errors = compare(chunks, case.expected[f"{prefix}.action_hs"][0], case.chunks(prefix)[0])
    assert max(errors.feature, errors.action) < TOLERANCE


@pytest.mark.parametrize("name", ["lora_7d", "fork2dof_patched"])
def test_padding_makes_a_difference(name: str) -> None:
    """Which is why a bundle says what its deployment did."""
    case = oracle_case(name)
    difference = np.abs(case.expected["fixedpad.action_hs"] - case.expected["win0.action_hs"]).max()
    assert difference > 100 * TOLERANCE


@pytest.mark.parametrize("index", [0, 1])
def test_the_bundles_tokenizer_is_the_references(built_bundle: BuiltBundle, index: int) -> None:
    pytest.importorskip("tokenizers")
    case = oracle_case("lora_7d")
    policy = load(built_bundle("lora_7d", "fp32", True))
    frame = case.inputs["frames_u8"][index, 0]
    policy.reset(str(case.inputs["instructions"][index]))

    chunk = policy.step(frame)

    expected = case.expected[f"win{index}.action_hs"][0, 0]
    np.testing.assert_allclose(chunk.feature, expected.ravel(), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["lora_7d", "fork2dof_stock"])
def test_the_decoders_input_is_the_references(built_bundle: BuiltBundle, name: str) -> None:
    """Slot by slot: scaled embeddings, image tokens and positions, without the slots that the action token cannot see."""
    case = oracle_case(name)
    policy = load(built_bundle(name, "fp32", True))
    policy.reset(token_ids=case.inputs["win0.input_ids"][0], attention_mask=case.inputs["win0.attention_mask"][0])
    policy.step(case.inputs["frames_u8"][0, 0])
    prompt = policy._chain._prompt
    assert prompt is not None
    tokens = np.concatenate([policy.run_vision(policy._frames)[0], np.zeros((1, 64))])
    used = int(prompt.action_index[-1]) + 1

    row = (prompt.prompt[0] + tokens[prompt.image_index])[:used]

    seen = np.flatnonzero(case.expected["win0.lm_attention_mask"][0])
    seen = seen[:-1] if name == "lora_7d" else seen  # </s> stands behind the action token
    np.testing.assert_allclose(row, case.expected["win0.lm_layer0_in"][0, seen], atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_fp16(built_bundle: BuiltBundle, name: str) -> None:
    """As robots get it: where fp16 shows in the actions and fp32 costs next to nothing, a stage is kept in fp32."""
    errors = streamed(built_bundle(name, "fp16", True), oracle_case(name))
    assert errors.cosine >= 0.9995
    assert errors.action <= 2e-3


@pytest.mark.parametrize("name", CASES)
def test_fp16_throughout(built_bundle: BuiltBundle, name: str) -> None:
    """Without promotion the limit is ten times as wide, and says more about these policies than about fp16: their untrained
    LSTM multiplies a constant feature error by 5 to 20 over a window (docs/decisions/0005-fp16.md). The features' limit is
    that of any fp16 bundle."""
    bundle = built_bundle(name, "fp16", False)
    assert (bundle / "vision.fp16.onnx").exists()
    assert list(bundle.glob("language.fp16.*.onnx"))
    errors = streamed(bundle, oracle_case(name))
    assert errors.cosine >= 0.9995
    assert errors.action <= 2e-2
    assert errors.action > 1e-5  # it really is another precision
