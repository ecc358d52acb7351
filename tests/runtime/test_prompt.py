"""The pruned layout sees exactly what the action token sees in the reference's row, at the positions that it has there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bundle.errors import PromptError
from bundle.manifest import Packing
from runtime.prompt import ABSENT, Layout, assemble, choose_bucket, layout, pad_tokens, sinusoid
from tests.oracle import CASES, oracle_case

PAD, VOCAB = 1, 50
packings = st.sampled_from(["upstream", "fork_overwrite"])
# Small numbers to have every case, and those of one and two real cameras.
image_counts = st.integers(1, 6) | st.sampled_from([64, 128])
latents = st.integers(1, 3)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[int] | None]:
    """Token ids, padded on the right or not, and a mask: none, the tokenizer's, or any."""
    text = draw(st.lists(st.integers(3, VOCAB - 1), max_size=12) | st.lists(st.integers(3, VOCAB - 1), min_size=60))
    ids = [0, *text, 2, *[PAD] * draw(st.integers(0, 8))]
    any_mask = st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids))
    return ids, draw(st.none() | st.just([int(token != PAD) for token in ids]) | any_mask)


# --- layout ---------------------------------------------------------------------------------------------------------------

Slot = tuple[str, int, int]


def reference_row(ids: list[int], mask: list[int], packing: str, images: int, latent: int) -> list[tuple[Slot, int]]:
    """Every slot of the reference's row - what it holds and where - with its mask: spec section 4 and appendix A.2."""
    length = len(ids)
    row: list[tuple[tuple[str, int], int]] = []
    if packing == "upstream":
        row.append((("text", ids[0]), mask[0]))
        row += [(("image", index), 1) for index in range(images)]
        row += [(("text", ids[column]), mask[column]) for column in range(1, length - 1)]
        row += [(("action", 0), 1)] * latent
        row.append((("text", ids[length - 1]), mask[length - 1]))
    else:
        for slot in range(max(length, images)):
            content = ("image", slot) if slot < images else ("text", ids[slot])
            row.append((content, mask[slot] if slot < length else 0))
        row += [(("action", 0), 1)] * latent
    return [((*content, slot), shown) for slot, (content, shown) in enumerate(row)]


def seen_by_the_action_token(row: list[tuple[Slot, int]]) -> list[Slot]:
    last = max(index for index, ((kind, _, _), _) in enumerate(row) if kind == "action")
    return [slot for slot, shown in row[: last + 1] if shown]


def as_slots(found: Layout) -> list[Slot]:
    slots: list[Slot] = []
    for index, (token, image, position) in enumerate(zip(found.token, found.image, found.position, strict=True)):
        assert token == ABSENT or image == ABSENT
        kind = "text" if token != ABSENT else "image" if image != ABSENT else "action"
        assert (kind == "action") == (index >= found.length - found.latent)
        slots.append((kind, int(max(token, image, 0)), int(position)))
    return slots


@given(prompts(), packings, image_counts, latents)
def test_layout_is_what_the_action_token_sees(
    prompt: tuple[list[int], list[int] | None], packing: Packing, images: int, latent: int
) -> None:
    ids, mask = prompt
    shown = [int(token != PAD) for token in ids] if mask is None else mask

    found = layout(ids, packing=packing, image_tokens=images, latent=latent, mask=mask, pad_id=PAD)

    assert as_slots(found) == seen_by_the_action_token(reference_row(ids, shown, packing, images, latent))
    assert found.latent == latent
    assert {found.token.dtype, found.image.dtype, found.position.dtype} == {np.dtype(np.int64)}


@given(prompts(), packings, image_counts, st.booleans())
def test_arrays_of_a_tokenizer_are_as_good_as_lists(
    prompt: tuple[list[int], list[int] | None], packing: Packing, images: int, batch: bool
) -> None:
    """Tokenizers give [1, L]."""
    ids, mask = prompt
    expected = layout(ids, packing=packing, image_tokens=images, latent=1, mask=mask)
    arrays = [None if row is None else np.array([row] if batch else row, np.int32) for row in (ids, mask)]
    assert arrays[0] is not None

    found = layout(arrays[0], packing=packing, image_tokens=images, latent=1, mask=arrays[1])

    assert as_slots(found) == as_slots(expected)


def test_upstream_by_hand() -> None:
    """<s> 2 images 7 8 ACT </s>; </s> cannot be seen."""
    found = layout([0, 7, 8, 2], packing="upstream", image_tokens=2, latent=1)
    assert found.token.tolist() == [0, -1, -1, 7, 8, -1]
    assert found.image.tolist() == [-1, 0, 1, -1, -1, -1]
    assert found.position.tolist() == [0, 1, 2, 3, 4, 5]


def test_upstream_padded_by_hand() -> None:
    """<s> 2 images 7 </s> PAD ACT PAD: now </s> comes before ACT and is seen, and ACT stands where the padding ends."""
    found = layout([0, 7, 2, 1, 1], packing="upstream", image_tokens=2, latent=1)
    assert found.token.tolist() == [0, -1, -1, 7, 2, -1]
    assert found.image.tolist() == [-1, 0, 1, -1, -1, -1]
    assert found.position.tolist() == [0, 1, 2, 3, 4, 6]


def test_fork_by_hand() -> None:
    """Four image tokens over three text slots: three are attended, the text is not there, ACT stands behind them."""
    found = layout([0, 7, 2], packing="fork_overwrite", image_tokens=4, latent=2)
    assert found.token.tolist() == [-1] * 5
    assert found.image.tolist() == [0, 1, 2, -1, -1]
    assert found.position.tolist() == [0, 1, 2, 4, 5]


def test_fork_with_a_long_prompt_by_hand() -> None:
    """Only what is longer than the image tokens is read, </s> included; padding is skipped but counted."""
    found = layout([0, 7, 8, 9, 2, 1, 1], packing="fork_overwrite", image_tokens=3, latent=1)
    assert found.token.tolist() == [-1, -1, -1, 9, 2, -1]
    assert found.image.tolist() == [0, 1, 2, -1, -1, -1]
    assert found.position.tolist() == [0, 1, 2, 3, 4, 7]


@given(st.permutations(range(3, 20)), st.integers(0, 12))
def test_the_fork_does_not_read_short_prompts(words: list[int], count: int) -> None:
    """A fact of those policies, and the reason that the packing must be known: only the length matters."""
    first, second = ([0, *order[:count], 2] for order in (words, sorted(words)))
    layouts = [layout(ids, packing="fork_overwrite", image_tokens=64, latent=1) for ids in (first, second)]
    assert as_slots(layouts[0]) == as_slots(layouts[1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prefix", ["win0", "win1", "pad"])
def test_positions_are_those_of_the_recorded_mask(name: str, prefix: str) -> None:
    case = oracle_case(name)
    if f"{prefix}.lm_attention_mask" not in case.expected:
        pytest.skip(f"{name} has no {prefix}")
    recorded = case.expected[f"{prefix}.lm_attention_mask"]
    ids, masks = case.inputs[f"{prefix}.input_ids"], case.inputs[f"{prefix}.attention_mask"]
    packing: Packing = "fork_overwrite" if name == "fork2dof_stock" else "upstream"
    for row, (tokens, mask) in enumerate(zip(ids, masks, strict=True)):
        # One row a frame, all frames of the first prompt first; with upstream's packing one slot stands behind ACT.
        expected = recorded[row * (len(recorded) // len(ids))]
        expected = expected[:-1] if packing == "upstream" else expected
        found = layout(tokens, packing=packing, image_tokens=64, latent=1, mask=mask)
        assert found.position.tolist() == np.flatnonzero(expected).tolist()


@pytest.mark.parametrize("ids", [[], [0]])
@pytest.mark.parametrize("packing", ["upstream", "fork_overwrite"])
def test_too_few_tokens(ids: list[int], packing: Packing) -> None:
    with pytest.raises(PromptError, match=rf"too few tokens\n  got:      {len(ids)}\n(?s:.*)hint: pass the ids with"):
        layout(ids, packing=packing, image_tokens=4, latent=1)


@pytest.mark.parametrize("mask", [[1, 1], [1, 1, 1, 1], []])
def test_a_mask_of_another_length(mask: list[int]) -> None:
    with pytest.raises(PromptError, match=rf"mask does not fit the tokens\n  got:      {len(mask)}\n  expected: 3\n"):
        layout([0, 5, 2], packing="upstream", image_tokens=4, latent=1, mask=mask)


@pytest.mark.parametrize("ids", [[[0, 5, 2], [0, 6, 2]], [[[0, 5, 2]]], 5])
def test_a_prompt_is_one_row(ids: object) -> None:
    with pytest.raises(PromptError, match=r"expected: \[L\]"):
        layout(np.array(ids), packing="upstream", image_tokens=4, latent=1)


# --- padding and buckets ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), max_size=9), st.integers(0, 9))
def test_padding(ids: list[int], extra: int) -> None:
    assert pad_tokens(ids, None, PAD) == tuple(ids)
    assert pad_tokens(ids, len(ids) + extra, PAD) == (*ids, *[PAD] * extra)


def test_longer_than_the_padding() -> None:
    with pytest.raises(PromptError, match=r"longer than the padding(?s:.*)got:      3 tokens\n  expected: at most 2\n"):
        pad_tokens([0, 5, 2], 2, PAD)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.integers(0, 200))
def test_the_smallest_bucket_that_holds_it(buckets: list[int], length: int) -> None:
    if length <= max(buckets):
        chosen = choose_bucket(length, buckets)
        assert chosen in buckets
        assert chosen >= length
        assert not any(length <= bucket < chosen for bucket in buckets)
    else:
        with pytest.raises(PromptError, match=rf"too long(?s:.*){length} slots\n  expected: at most {max(buckets)}\n"):
            choose_bucket(length, buckets)


# --- positions ------------------------------------------------------------------------------------------------------------


def reference_sinusoid(positions: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    """[sin(p f) | cos(p f)] for slot j at p = j + 2, f_k = exp(-k ln 10000 / (width / 2 - 1)), in float64."""
    rows = []
    for slot in positions:
        frequencies = [math.exp(-k * math.log(10000.0) / (width // 2 - 1)) for k in range(width // 2)]
        angles = [(int(slot) + 2) * frequency for frequency in frequencies]
        rows.append([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])
    return np.array(rows).reshape(len(rows), width)


@pytest.mark.parametrize("width", [4, 64, 2048])
def test_sinusoid(width: int) -> None:
    """A float32 angle of up to 300 radians is off by up to 1.7e-7 of itself: half an ulp of its own and of its frequency."""
    positions = np.arange(0, 298, 1 if width < 2048 else 11)
    rows = sinusoid(positions, width)
    assert (rows.dtype, rows.shape) == (np.float32, (len(positions), width))
    np.testing.assert_allclose(rows, reference_sinusoid(positions, width), atol=2.5e-5, rtol=0)


@given(st.lists(st.integers(0, 500), max_size=8))
def test_a_row_depends_on_its_own_position_only(positions: list[int]) -> None:
    rows = sinusoid(np.array(positions, np.int64), 16)
    assert rows.shape == (len(positions), 16)
    for row, position in zip(rows, positions, strict=True):
        np.testing.assert_array_equal(row, sinusoid(np.array([position]), 16)[0])


def hugging_faces_rows(count: int, width: int) -> NDArray[np.float32]:
    """Rows of the first slots from the very module that Kosmos-2 was trained with."""
    torch = pytest.importorskip("torch")
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextSinusoidalPositionalEmbedding

    table = Kosmos2TextSinusoidalPositionalEmbedding(num_positions=count, embedding_dim=width, padding_idx=1)
    rows: NDArray[np.float32] = table(torch.full((1, count), 5))[0].numpy()
    return rows


@pytest.mark.parametrize("width", [8, 64, 2048])
def test_sinusoid_is_near_hugging_faces(width: int) -> None:
    np.testing.assert_allclose(sinusoid(np.arange(300), width), hugging_faces_rows(300, width), atol=1e-4, rtol=0)


@pytest.mark.parametrize("width", [64, 2048])
def test_sinusoid_is_rounded_as_hugging_faces(width: int) -> None:
    """torch's exp is correctly rounded for 99 of 100 frequencies, and off by an ulp in the others."""
    error = np.abs(sinusoid(np.arange(300), width) - hugging_faces_rows(300, width))
    assert error.max() < 2e-5
    assert np.mean(error < 1e-6) > 0.98


# --- tensors ----------------------------------------------------------------------------------------------------------------


@given(
    prompts(),
    packings,
    image_counts,
    latents,
    st.integers(0, 20),
    st.sampled_from([np.float32, np.float16]),
    st.sampled_from([1.0, 2.5, 8.0]),
)
def test_tensors(
    prompt: tuple[list[int], list[int] | None],
    packing: Packing,
    images: int,
    latent: int,
    spare: int,
    dtype: type[np.floating],
    scale: float,
) -> None:
    width = 8
    embedding = np.random.default_rng(0).normal(size=(VOCAB + 1, width)).astype(dtype)
    slots = layout(prompt[0], packing=packing, image_tokens=images, latent=latent, mask=prompt[1], pad_id=PAD)
    used = slots.length

    tensors = assemble(slots, embedding, bucket=used + spare, embed_scale=scale, image_tokens=images)

    assert (tensors.prompt.dtype, tensors.prompt.shape) == (np.float32, (1, used + spare, width))
    assert (tensors.image_index.dtype, tensors.image_index.shape) == (np.int64, (used + spare,))
    assert (tensors.action_index.dtype, tensors.action_index.tolist()) == (np.int64, [*range(used - latent, used)])
    positions = reference_sinusoid(slots.position, width)
    for index, (kind, value, _) in enumerate(as_slots(slots)):
        row = np.zeros(width) if kind == "image" else embedding[value if kind == "text" else VOCAB]
        expected = row.astype(np.float64) * scale + positions[index]
        np.testing.assert_allclose(tensors.prompt[0, index], expected, atol=2e-5, rtol=1e-6)
        assert tensors.image_index[index] == (value if kind == "image" else images)
    assert not tensors.prompt[0, used:].any()  # padding is zero, and has no image
    assert (tensors.image_index[used:] == images).all()


def test_the_table_may_stay_on_the_disk(tmp_path) -> None:  # type: ignore[no-untyped-def]
    embedding = np.random.default_rng(0).normal(size=(VOCAB + 1, 8)).astype(np.float16)
    np.save(tmp_path / "table.npy", embedding)
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")
    slots = layout([0, 5, 49, 2], packing="upstream", image_tokens=2, latent=1)
    tensors = [assemble(slots, table, bucket=8, embed_scale=2.0, image_tokens=2) for table in (embedding, mapped)]
    np.testing.assert_array_equal(tensors[0].prompt, tensors[1].prompt)
    assert type(tensors[1].prompt) is np.ndarray


@pytest.mark.parametrize("token", [VOCAB, VOCAB + 1, 64_012])
def test_a_token_of_another_vocabulary(token: int) -> None:
    """The row behind the vocabulary is the action token's: it must not pass for a word."""
    embedding = np.zeros((VOCAB + 1, 8), np.float32)
    slots = layout([0, 5, token, 2], packing="upstream", image_tokens=2, latent=1)
    with pytest.raises(PromptError, match=rf"outside the vocabulary\n  got:      {token}\n  expected: below {VOCAB}\n"):
        assemble(slots, embedding, bucket=8, embed_scale=1.0, image_tokens=2)


@pytest.mark.parametrize("token", [-1, -2, -100])
def test_a_negative_token(token: int) -> None:
    """-100 is what training code puts where no loss is wanted."""
    embedding = np.zeros((VOCAB + 1, 8), np.float32)
    with pytest.raises(PromptError, match=rf"{token}"):
        assemble(
            layout([0, 5, token, 2], packing="upstream", image_tokens=2, latent=1),
            embedding,
            bucket=8,
            embed_scale=1.0,
            image_tokens=2,
        )
