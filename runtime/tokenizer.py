"""From instruction text to token ids: the manifest's pre-tokenised instructions first, then the bundle's tokenizer.json.

The `tokenizers` package is optional on a robot; without it every instruction given at build time still works.
"""

from __future__ import annotations

from pathlib import Path

from bundle.errors import PromptError
from bundle.manifest import Prompt

TOKENIZER_NAME = "tokenizer.json"


def token_ids_of(instruction: str, prompt: Prompt, tokenizer: Path) -> tuple[int, ...]:
    """Token ids with special tokens, before any padding; `tokenizer` is a tokenizer.json that may be missing.

    Raises:
        PromptError: the text is empty, or unknown and there is no tokenizer.
    """
    for known in prompt.instructions:
        if known.text == instruction.strip():
            return known.token_ids
    return tokenize(instruction, prompt.template, tokenizer, known=tuple(item.text for item in prompt.instructions))


def tokenize(instruction: str, template: str, tokenizer: Path, *, known: tuple[str, ...] = ()) -> tuple[int, ...]:
    """Token ids of `template` filled with the instruction; `known` texts are suggested where it cannot be done.

    Raises:
        PromptError: the text is empty, or there is no tokenizer.
    """
    text = instruction.strip()
    if not text:
        raise PromptError(
            "the instruction is empty", hint="say what the robot should do, e.g. 'Navigate to the basket'."
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        missing = "the package 'tokenizers' is not installed"
    else:
        if tokenizer.exists():
            try:
                loaded = Tokenizer.from_file(str(tokenizer))
            except Exception as error:  # the package raises bare Exception
                raise PromptError(
                    f"{tokenizer} cannot be read",
                    got=error,
                    expected="a tokenizer.json of Hugging Face",
                    hint="copy it from the base model's directory again.",
                ) from None
            # A tokenizer.json may carry padding and truncation of whoever saved it; the policy's prompt has neither.
            loaded.no_padding()
            loaded.no_truncation()
            return tuple(loaded.encode(template.format(instruction=text)).ids)
        missing = f"there is no {tokenizer}"
    raise PromptError(
        f"cannot tokenise {text!r}: {missing}",
        expected=" | ".join(map(repr, known)) or "a tokenizer, or token ids",
        hint="build with --base DIR or --tokenizer FILE and this --instruction, install 'jetvla[text]', or pass token ids.",
    )
