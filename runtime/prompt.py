"""From an instruction's token ids to the language stage's inputs, computed once per reset.

The reference lays out, per frame, text, image tokens and the learned action token, masks some of the slots, and runs a causal
decoder over all of them. Only what the action token can see matters: slots after it and masked slots are dropped here, while those
that stay keep the position they had. What remains is padded behind the action token to a bucket, where causality keeps the
padding from being seen. `layout` is that rule; `assemble` turns it into arrays. Text embeddings are scaled and positioned here, so
the table stays out of the engines and any instruction works at run time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bundle.errors import PromptError
from bundle.manifest import Packing

ABSENT = -1
# Slot j has position j + 2: row padding_idx (1) of the sinusoid is reserved, positions start behind it.
FIRST_POSITION = 2


@dataclass(frozen=True)
class Layout:
    """The visible slots of one decoder row, in order; the action token's slots are the last ones.

    Attributes:
        token: int64 [N], token id of a text slot, else ABSENT.
        image: int64 [N], index of the image token in the slot, else ABSENT.
        position: int64 [N], the slot's index in the reference's unpruned sequence.
        latent: how many action slots end the row.
    """

    token: NDArray[np.int64]
    image: NDArray[np.int64]
    position: NDArray[np.int64]
    latent: int

    @property
    def length(self) -> int:
        return len(self.token)


@dataclass(frozen=True)
class PromptTensors:
    """Inputs of the language stage that are constant for an instruction.

    Attributes:
        prompt: float32 [1, S, D]; scaled embeddings plus positions; image slots hold their position only.
        image_index: int64 [S]; which image token is added to a slot; the number of image tokens means none.
        action_index: int64 [latent]; slots whose last hidden state is the action feature. For heads that are told the instruction, one
            more: the slot behind them, which causality hides, and which holds the mean of the prompt's embeddings.
    """

    prompt: NDArray[np.float32]
    image_index: NDArray[np.int64]
    action_index: NDArray[np.int64]

    @property
    def bucket(self) -> int:
        """S, the length that the row was padded to."""
        return int(self.prompt.shape[1])


def layout(
    token_ids: Sequence[int] | NDArray[np.int64],
    *,
    packing: Packing,
    image_tokens: int,
    latent: int,
    mask: Sequence[int] | NDArray[np.int64] | None = None,
    pad_id: int = 1,
) -> Layout:
    """The slots that the action token sees.

    Args:
        token_ids: [L] as the tokenizer gives them, `<s>` first, `</s>` last unless padded.
        packing: `upstream` inserts the image after `<s>` and the action token before the last column; `fork_overwrite` lays the image
            tokens over the first slots and appends the action token behind max(L, image_tokens).
        image_tokens: of all cameras together.
        latent: number of action slots.
        mask: [L], 1 for real tokens; by default everything but `pad_id`.

    Raises:
        PromptError: fewer than two tokens, or a mask of another length.
    """
    ids = np.asarray(token_ids)
    if ids.shape[:-1] == (1,):  # a tokenizer's batch of one
        ids = ids[0]
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)) or (ids < 0).any():
        raise PromptError(
            "token ids are not one prompt",
            got=f"{ids.dtype}{list(ids.shape)}, smallest {ids.min() if ids.size else None}",
            expected="[L] whole numbers, not negative",
            hint="pass the ids of one instruction, as the tokenizer gives them.",
        )
    ids = ids.astype(np.int64)
    length = len(ids)
    if length < 2:
        raise PromptError(
            "an instruction has too few tokens",
            got=f"{length}",
            expected="at least <s> and </s>",
            hint="pass the ids with the tokenizer's special tokens.",
        )
    visible = (ids != pad_id) if mask is None else np.asarray(mask).reshape(-1).astype(bool)
    if len(visible) != length:
        raise PromptError(
            "the attention mask does not fit the tokens",
            got=len(visible),
            expected=length,
            hint="pass one mask value a token.",
        )
    images = np.arange(image_tokens, dtype=np.int64)
    action = np.full(latent, ABSENT, dtype=np.int64)
    if packing == "upstream":
        token = np.concatenate([ids[:1], np.full(image_tokens, ABSENT), ids[1:-1], action])
        image = np.concatenate([[ABSENT], images, np.full(length - 2, ABSENT), action])
        keep = np.concatenate([visible[:1], np.ones(image_tokens, bool), visible[1:-1], np.ones(latent, bool)])
        position = np.arange(len(token), dtype=np.int64)
    else:  # fork_overwrite
        behind = max(length, image_tokens)
        token = np.concatenate([np.full(image_tokens, ABSENT), ids[image_tokens:], action])
        image = np.concatenate([images, np.full(behind - image_tokens, ABSENT), action])
        keep = np.concatenate([visible, np.zeros(behind - length, bool), np.ones(latent, bool)])
        position = np.arange(behind + latent, dtype=np.int64)
    return Layout(token[keep].astype(np.int64), image[keep].astype(np.int64), position[keep], latent)


def pad_tokens(token_ids: Sequence[int], pad_to: int | None, pad_id: int) -> tuple[int, ...]:
    """Right-pad the ids to `pad_to`, for deployments that do (null: natural length).

    Raises:
        PromptError: the prompt is longer than `pad_to`.
    """
    if pad_to is None:
        return tuple(token_ids)
    if len(token_ids) > pad_to:
        raise PromptError(
            "an instruction is longer than the padding of this bundle",
            got=f"{len(token_ids)} tokens",
            expected=f"at most {pad_to}",
            hint="shorten it, or rebuild with a larger --pad-prompt-to.",
        )
    return tuple(token_ids) + (pad_id,) * (pad_to - len(token_ids))


def choose_bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length` slots.

    Raises:
        PromptError: none does.
    """
    for bucket in sorted(buckets):
        if length <= bucket:
            return bucket
    raise PromptError(
        "the instruction is too long for this bundle",
        got=f"{length} slots",
        expected=f"at most {max(buckets)}",
        hint="shorten it, or rebuild with --instruction '...' or a larger --max-prompt-tokens.",
    )


def sinusoid(positions: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    """Position rows float32 [N, width]: sin and cos of p * exp(-k ln 10000 / (width/2 - 1)), for slots `positions`.

    Source: tensor2tensor's sinusoid, as Kosmos-2 uses it. Frequencies and angles are rounded to float32 like the reference's (numpy's own
    float32 exp is not rounded correctly, hence the detour): at late positions that shows in the fifth digit, and the reference's
    rounding is the one that the weights were trained with.
    """
    half = width // 2
    exponent = np.arange(half, dtype=np.float32) * np.float32(-(math.log(10000.0) / (half - 1)))
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = (positions + FIRST_POSITION).astype(np.float32)[:, None] * frequency[None, :]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def assemble(
    slots: Layout,
    embedding: NDArray[np.floating],
    *,
    bucket: int,
    embed_scale: float,
    image_tokens: int,
    told: NDArray[np.int64] | None = None,
) -> PromptTensors:
    """Arrays for the language stage.

    Args:
        slots: from `layout`; at most `bucket` long, one less with `told`.
        embedding: [vocab + 1, D], float16 or float32, may be memory-mapped; the last row is the action token.
        bucket: S, the static length of the graph.
        embed_scale: sqrt(D) for Kosmos-2; multiplies embeddings, not positions.
        told: ids of the whole prompt, padding included, for heads that hear their mean.

    Raises:
        PromptError: a token id outside the vocabulary.
    """
    vocab, width = embedding.shape[0] - 1, embedding.shape[1]
    used = slots.length
    text = slots.token >= 0
    largest = max(int(ids.max(initial=ABSENT)) for ids in (slots.token, slots.token if told is None else told))
    if largest >= vocab:
        raise PromptError(
            "a token id is outside the vocabulary",
            got=largest,
            expected=f"below {vocab}",
            hint="the ids come from another tokenizer than the bundle's.",
        )
    rows = np.zeros((used, width), np.float32)
    rows[text] = embedding[slots.token[text]].astype(np.float32)
    rows[used - slots.latent :] = embedding[vocab].astype(np.float32)
    prompt = np.zeros((1, bucket, width), np.float32)
    prompt[0, :used] = rows * np.float32(embed_scale) + sinusoid(slots.position, width)
    image_index = np.full(bucket, image_tokens, np.int64)
    image_index[:used][slots.image >= 0] = slots.image[slots.image >= 0]
    if told is not None:
        prompt[0, used] = embedding[told].astype(np.float64).mean(axis=0)
        used += 1
    return PromptTensors(prompt, image_index, np.arange(slots.length - slots.latent, used, dtype=np.int64))
