"""The baseline that the runtime is compared with: Hugging Face's whole Kosmos-2, eager or compiled, as a lab would run it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Kosmos2Config
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ForConditionalGeneration

from bundle.manifest import Packing
from export.plan import merged_weights
from runtime.golden import Golden
from train.checkpoint import LoadedPolicy, load, materialize_tables
from train.policy import normalize_frames


def eager_step(
    checkpoint: Path,
    packing: Packing | Literal["auto"],
    golden: Golden,
    *,
    device: str = "cpu",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    compiled: bool = False,
) -> Callable[[], object]:
    """A function that runs one frame and the golden prompt through the model: adapters merged, LM head included, all slots.

    It returns when the result is there. `compiled` goes through torch.compile, whose first calls take minutes.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    loaded = load(checkpoint, packing=packing)
    model = merged_model(loaded).to(device=device, dtype=getattr(torch, dtype))
    call = torch.compile(model, mode="reduce-overhead") if compiled else model
    ids = torch.from_numpy(golden.token_ids)[None]
    images = loaded.base.kosmos.latent_query_num
    # <s>, image, text, one slot for the action token (any embedding: only its cost matters), </s>
    row = torch.cat(
        [ids[:, :1], torch.zeros(1, images, dtype=ids.dtype), ids[:, 1:-1], ids[:, -1:], ids[:, -1:]], dim=1
    )
    shown = torch.zeros_like(row)
    shown[:, 1 : images + 1] = 1
    pixels = normalize_frames(golden.frames).to(device=device, dtype=getattr(torch, dtype))
    row, shown = row.to(device), shown.to(device)

    @torch.inference_mode()
    def run() -> object:
        output = call(pixel_values=pixels, input_ids=row, image_embeds_position_mask=shown, use_cache=False)
        if device != "cpu":
            torch.cuda.synchronize()
        return output

    return run


def merged_model(loaded: LoadedPolicy) -> Any:
    """Hugging Face's model with the adapters merged, in eval mode."""
    weights = merged_weights(loaded)
    with torch.device("meta"):
        model = Kosmos2ForConditionalGeneration._from_config(loaded.base.kosmos, attn_implementation="eager")
    state = {}
    for name in model.state_dict():
        module, _, kind = f"backbone.{name}".rpartition(".")
        if name == "text_model.lm_head.weight":
            module = "backbone.text_model.model.embed_tokens"
        state[name] = weights.weight(module) if kind == "weight" else weights.tensor(f"{module}.{kind}")
    model.load_state_dict(state, assign=True)
    materialize_tables(model)
    return model.eval()


def random_model(config: Kosmos2Config, dtype: torch.dtype) -> Any:
    """The same with random weights of a trained model's size: normal numbers, as denormal ones would be slow."""
    with torch.device("meta"):
        model = Kosmos2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    model = model.to(dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    materialize_tables(model)
    return model.eval()
