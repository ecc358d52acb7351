"""From what the policy is told to the tensors of the language stage: tokenizer, layout, bucket and embeddings in one step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.errors import BundleError, PromptError
from bundle.manifest import Manifest
from runtime.prompt import PromptTensors, assemble, choose_bucket, layout, pad_tokens
from runtime.tokenizer import TOKENIZER_NAME, token_ids_of

EMBEDDING_NAME = "token_embedding.npy"


def load_embedding(folder: Path) -> NDArray[np.floating]:
    """The bundle's embedding table [vocab + 1, D], memory-mapped; its last row is the action token.

    Raises:
        BundleError: not a numpy array.
    """
    path = folder / EMBEDDING_NAME
    try:
        table: NDArray[np.floating] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BundleError(f"{path} is damaged", got=error, hint="copy the bundle again, or rebuild it.") from None
    return table


def prompt_tensors(
    folder: Path,
    manifest: Manifest,
    embedding: NDArray[np.floating],
    buckets: Sequence[int],
    *,
    instruction: str | None = None,
    token_ids: Sequence[int] | None = None,
    attention_mask: Sequence[int] | None = None,
) -> PromptTensors:
    """Inputs of the language stage for an instruction, given as text or as tokens; see Policy.reset.

    Args:
        buckets: sequence lengths that can be run, ascending.

    Raises:
        PromptError: neither or both given, cannot be tokenised, or longer than the buckets.
    """
    spec = manifest.prompt
    if (instruction is None) == (token_ids is None):
        raise PromptError("reset needs an instruction or token_ids", hint="pass exactly one of them.")
    if instruction is not None:
        token_ids = token_ids_of(instruction, spec, folder / TOKENIZER_NAME)
    assert token_ids is not None
    if attention_mask is None and np.ndim(token_ids) == 1:
        token_ids = pad_tokens(token_ids, spec.pad_to, spec.pad_id)
    image_tokens = manifest.dimensions.image_tokens * len(manifest.preprocessing.cameras)
    slots = layout(
        token_ids,
        packing=spec.packing,
        image_tokens=image_tokens,
        latent=manifest.dimensions.latent,
        mask=attention_mask,
        pad_id=spec.pad_id,
    )
    return assemble(
        slots,
        embedding,
        bucket=choose_bucket(slots.length + spec.told, buckets),
        embed_scale=spec.embed_scale,
        image_tokens=image_tokens,
        told=np.reshape(token_ids, -1) if spec.told else None,
    )
