"""Bundles against Hugging Face's own Kosmos-2, from pixels to the action token's hidden state.

Nothing of the reference policy takes part: the row is put together here from the model's own embedding, the picture goes
through Hugging Face's image path, and adapters are merged by peft itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

from runtime.policy import Policy
from tests.checkpoints import read
from tests.export.conftest import Built, MakeSynthetic
from train.synthetic import SyntheticFiles, SyntheticOptions

# peft 0.21 reads an attribute that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOLERANCE = 1e-4
# What the agreement must be told apart from.
SEEN = 1e-3
IMAGE_TOKENS, IMAGE_ID = 64, 99
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IDS = [0, 1199, 21, 23, 7, 5, 24, 300, 42, 2]


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.inference_mode():
        yield


def model_with_these_weights(files: SyntheticFiles, *, lora: bool) -> tuple[Kosmos2ForConditionalGeneration, Tensor]:
    """Hugging Face's model as peft wraps, fills and merges it; and the action token.

    The checkpoint's keys are peft's own, so its state dict is loaded as it stands, strictly but for the tied head.
    """
    content = read(files.checkpoint)
    state: dict[str, Tensor] = content["state_dict"]
    config = Kosmos2Config.from_pretrained(files.base)
    with torch.inference_mode(False):
        model = Kosmos2ForConditionalGeneration._from_config(config, attn_implementation="eager")
        prefix = "model.backbone."
        if lora:
            setup = content["hyper_parameters"]["configs"]["train_setup"]
            leaves = {
                name.rsplit(".", 1)[-1]
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear) and name != "text_model.lm_head"
            }
            adapters = LoraConfig(r=setup["lora_r"], lora_alpha=setup["lora_alpha"], target_modules=sorted(leaves))
            wrapped = get_peft_model(model, adapters)
            prefix = "model.model."
        else:
            wrapped = model
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        wrapped.load_state_dict(own, strict=True)
        merged = wrapped.merge_and_unload() if lora else wrapped
    assert isinstance(merged, Kosmos2ForConditionalGeneration)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    return merged.eval(), state["model.action_token"]


def forward(model: Kosmos2ForConditionalGeneration, frame: NDArray[np.uint8], slots: Tensor) -> Any:
    """The model's public forward on an already resized picture; IMAGE_ID marks the slots that the picture fills."""
    pixels = (torch.from_numpy(frame).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return model(
        pixel_values=pixels.permute(2, 0, 1)[None],
        input_ids=slots,
        attention_mask=torch.ones_like(slots),
        image_embeds_position_mask=(slots == IMAGE_ID).long(),
        output_hidden_states=True,
    )


def image_embeds(model: Kosmos2ForConditionalGeneration, frame: NDArray[np.uint8]) -> Tensor:
    """[1, 64, D] of an already resized picture."""
    embeds: Tensor = forward(model, frame, torch.tensor([[0, *[IMAGE_ID] * IMAGE_TOKENS, 2]])).image_embeds
    return embeds


def action_feature(model: Kosmos2ForConditionalGeneration, token: Tensor, images: Tensor, ids: list[int]) -> Tensor:
    """The last hidden state at the action token of `<s>`, image, text, action token, `</s>`."""
    embed = model.get_input_embeddings()
    text = embed(torch.tensor([ids]))
    row = torch.cat([text[:, :1], images, text[:, 1:-1], token.expand(1, 1, -1), text[:, -1:]], dim=1)
    mask = torch.ones(row.shape[:2], dtype=torch.int64)
    decoder = model.text_model.model
    hidden = decoder(inputs_embeds=row, attention_mask=mask, use_cache=False).last_hidden_state
    feature: Tensor = hidden[0, -2]
    return feature


def frames(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), np.uint8)


@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "merged by peft"])
def test_features_are_hugging_faces(built: Built, synthetic: MakeSynthetic, lora: bool) -> None:
    options = SyntheticOptions(lora=lora)
    model, token = model_with_these_weights(synthetic(options), lora=lora)
    policy = Policy.load(built(options), "ort:cpu", threads=1)
    policy.reset(token_ids=IDS)
    scale = policy.manifest.prompt.embed_scale
    assert scale == pytest.approx(model.config.text_config.embed_dim**0.5)
    seen = []
    for frame in frames(3):
        images = image_embeds(model, frame)
        feature = action_feature(model, token, images, IDS).numpy()
        tokens = policy.run_vision(frame[None]) / scale
        np.testing.assert_allclose(tokens, images.numpy(), atol=TOLERANCE, rtol=0)
        # A picture of the final size passes any resize unchanged.
        np.testing.assert_allclose(policy.step(frame).feature, feature, atol=TOLERANCE, rtol=0)
        seen.append(feature)
    assert np.ptp(seen, axis=0).max() > SEEN


def test_what_is_compared_depends_on_adapters_words_and_order(built: Built, synthetic: MakeSynthetic) -> None:
    """Without the adapters, with one other word, or with two words swapped, the agreement would be gone."""
    options = SyntheticOptions()
    files = synthetic(options)
    model, token = model_with_these_weights(files, lora=True)
    policy = Policy.load(built(options), "ort:cpu", threads=1)
    policy.reset(token_ids=IDS)
    (frame,) = frames(1)
    feature = policy.step(frame).feature
    images = image_embeds(model, frame)
    for other in ([*IDS[:4], 8, *IDS[5:]], [*IDS[:3], IDS[4], IDS[3], *IDS[5:]], IDS[:-2] + IDS[-1:]):
        assert np.abs(action_feature(model, token, images, other).numpy() - feature).max() > SEEN
    assert np.abs(action_feature(model, 0 * token, images, IDS).numpy() - feature).max() > SEEN
    frozen, token = model_with_these_weights(synthetic(SyntheticOptions(lora=False)), lora=False)
    assert np.abs(image_embeds(frozen, frame).numpy() - images.numpy()).max() > SEEN
    assert np.abs(action_feature(frozen, token, images, IDS).numpy() - feature).max() > SEEN


def test_the_whole_model_with_its_own_mask_of_image_slots_agrees(built: Built, synthetic: MakeSynthetic) -> None:
    """The same through the model's public forward: token ids, and a mask that says where the picture goes."""
    options = SyntheticOptions(lora=False)
    model, token = model_with_these_weights(synthetic(options), lora=False)
    action_id = 1100  # no prompt here uses this token
    model.get_input_embeddings().weight[action_id] = token
    slots = torch.tensor([[IDS[0], *[IMAGE_ID] * IMAGE_TOKENS, *IDS[1:-1], action_id, IDS[-1]]])
    (frame,) = frames(1)
    output = forward(model, frame, slots)
    policy = Policy.load(built(options), "ort:cpu", threads=1)
    policy.reset(token_ids=IDS)
    expected = output.hidden_states[-1][0, -2]
    np.testing.assert_allclose(policy.step(frame).feature, expected, atol=TOLERANCE, rtol=0)
