"""An instruction is wrapped once, whoever brings it, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.errors import PromptError
from bundle.prompt_template import (
    ACTION,
    PREFIXED,
    RAW,
    TEMPLATES,
    UPSTREAM,
    fill,
    is_template,
    takes_words,
    told,
    words_of,
)

WORDS = st.text(alphabet="abcdefghij 왼쪽.{}", min_size=1).filter(lambda text: text.strip() and "ction" not in text)


@given(template=st.sampled_from(TEMPLATES), words=WORDS)
def test_filling_twice_is_filling_once(template: str, words: str) -> None:
    once = fill(template, words)
    assert fill(template, once) == once
    assert words_of(template, once) in (words.strip(), once)
    assert once.count("<grounding>") == template.count("<grounding>")


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (UPSTREAM, "<grounding>An image of a robot Go left"),
        (RAW, "Go left"),
        (PREFIXED, "<grounding>Go left"),
        (ACTION, "<grounding>Instruction: Go left. Action:"),
    ],
)
def test_the_templates_of_public_code(template: str, prompt: str) -> None:
    assert fill(template, "  Go left ") == prompt


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (UPSTREAM, "<grounding>Go left"),
        (UPSTREAM, "An image of a robot Go left"),
        (UPSTREAM, "<grounding>Instruction: Go left. Action:"),
        (ACTION, "<grounding>Go left"),
        (ACTION, "<grounding>An image of a robot Go left"),
        (ACTION, "Instruction: Go left"),
        (ACTION, "Go left. Action:"),
    ],
)
def test_a_part_of_a_prompt_is_refused(template: str, text: str) -> None:
    with pytest.raises(PromptError, match="already carries a part of a prompt") as caught:
        fill(template, text)
    assert repr(template) in str(caught.value)
    assert "a second time" in str(caught.value)


def test_what_a_loader_takes_as_it_is_stays() -> None:
    assert fill(RAW, "<grounding>Go left") == "<grounding>Go left"
    assert fill(PREFIXED, "<grounding>An image of a robot Go left") == "<grounding>An image of a robot Go left"


def test_an_empty_instruction_is_for_policies_without_words() -> None:
    for template in TEMPLATES:
        with pytest.raises(PromptError, match="the instruction is empty"):
            fill(template, "  ")
    with pytest.raises(PromptError, match="the instruction is empty"):
        fill(PREFIXED, "<grounding>")
    assert fill("<grounding>An image of a robot", "") == "<grounding>An image of a robot"
    with pytest.raises(PromptError, match="trained without words") as caught:
        fill("<grounding>", "Go left")
    assert "--instruction ''" in str(caught.value)


def test_what_is_told_on_an_episode() -> None:
    assert told(UPSTREAM, None, "Go left") == "Go left"
    assert told(UPSTREAM, "Go right", "Go left") == "Go right"
    assert told(UPSTREAM, None, None) is None
    assert told("<grounding>", None, "Go left") == ""


@pytest.mark.parametrize(
    ("text", "usable"),
    [("", True), ("<grounding>", True), (UPSTREAM, True), ("{instruction}{instruction}", False), ("{other}", False)],
)
def test_templates_have_one_place_at_most(text: str, usable: bool) -> None:
    assert is_template(text) == usable
    assert takes_words(text) == ("{instruction}" in text)
