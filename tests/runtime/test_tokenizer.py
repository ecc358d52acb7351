"""Instructions known at build time need no tokenizer; others need the bundle's, and say so where it is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bundle.errors import PromptError
from bundle.manifest import Instruction, Prompt
from runtime.tokenizer import token_ids_of

KNOWN = Instruction(text="go left", token_ids=(0, 64012, 9, 2))


def prompt(*instructions: Instruction, template: str = "<grounding>An image of a robot {instruction}") -> Prompt:
    return Prompt(
        packing="upstream",
        packing_source="stated",
        template=template,
        pad_id=1,
        eos_id=2,
        pad_to=None,
        embed_scale=8.0,
        buckets=(16,),
        instructions=instructions,
    )


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer.json of words, with <s> before and </s> behind."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<s>", "<pad>", "</s>", "<unk>", "An", "image", "of", "a", "robot", "go", "left", "right"]
    words += ["<", ">", "grounding", "{", "}", "instruction"]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def without_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # its import fails


@pytest.mark.usefixtures("without_tokenizers")
@pytest.mark.parametrize("text", ["go left", " go left\n"])
def test_a_known_instruction_needs_no_tokenizer(tmp_path: Path, text: str) -> None:
    assert token_ids_of(text, prompt(KNOWN), tmp_path / "absent.json") == (0, 64012, 9, 2)


def test_a_known_instruction_is_preferred(tokenizer: Path) -> None:
    """What was verified at build time is what the robot gets, whatever its tokenizers version says today."""
    assert token_ids_of("go left", prompt(KNOWN), tokenizer) == KNOWN.token_ids


@pytest.mark.parametrize("text", ["go right", "  go right\n"])
def test_the_template_goes_around_other_instructions(tokenizer: Path, text: str) -> None:
    words = [12, 14, 13, 4, 5, 6, 7, 8, 9, 11]
    assert token_ids_of(text, prompt(KNOWN), tokenizer) == (0, *words, 2)
    assert token_ids_of(text, prompt(KNOWN, template="{instruction}"), tokenizer) == (0, 9, 11, 2)


def test_braces_in_an_instruction_are_only_text(tokenizer: Path) -> None:
    ids = token_ids_of("go {instruction}", prompt(template="{instruction}"), tokenizer)
    assert ids == (0, 9, 15, 17, 16, 2)


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_an_empty_instruction(tokenizer: Path, text: str) -> None:
    with pytest.raises(PromptError, match=r"the instruction is empty\n\nhint: say what the robot should do"):
        token_ids_of(text, prompt(KNOWN), tokenizer)


def test_unknown_without_a_tokenizer_file(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(PromptError, match=r"cannot tokenise 'go right': there is no .*tokenizer\.json") as caught:
        token_ids_of("go right", prompt(KNOWN), tmp_path / "tokenizer.json")
    assert caught.value.expected == "'go left'"
    assert "this --instruction, install 'jetvla[text]', or pass token ids." in caught.value.hint


@pytest.mark.usefixtures("without_tokenizers")
def test_unknown_without_the_package(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    with pytest.raises(PromptError, match="the package 'tokenizers' is not installed") as caught:
        token_ids_of("go right", prompt(KNOWN, Instruction(text="stop", token_ids=(0, 2))), tokenizer)
    assert caught.value.expected == "'go left' | 'stop'"


@pytest.mark.usefixtures("without_tokenizers")
def test_unknown_where_nothing_is_known(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="expected: a tokenizer, or token ids"):
        token_ids_of("go right", prompt(), tmp_path / "tokenizer.json")


@pytest.mark.usefixtures("without_tokenizers")
def test_a_known_instruction_may_come_with_its_whole_text(tmp_path: Path) -> None:
    absent = tmp_path / "absent.json"
    assert token_ids_of("<grounding>An image of a robot go left", prompt(KNOWN), absent) == KNOWN.token_ids
    with pytest.raises(PromptError, match="already carries a part of a prompt"):
        token_ids_of("<grounding>go left", prompt(KNOWN), absent)


@pytest.mark.usefixtures("without_tokenizers")
def test_a_policy_without_words_is_told_nothing(tmp_path: Path) -> None:
    nothing = Instruction(text="", token_ids=(0, 64012, 2))
    silent = prompt(nothing, template="<grounding>")
    assert token_ids_of("  ", silent, tmp_path / "absent.json") == nothing.token_ids
    with pytest.raises(PromptError, match="trained without words"):
        token_ids_of("go left", silent, tmp_path / "absent.json")
