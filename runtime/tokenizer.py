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
    text = instruction.strip()
    if not text:
        raise PromptError(
            "the instruction is empty", hint="say what the robot should do, e.g. --instruction 'Navigate to ...'"
        )
    for known in prompt.instructions:
        if known.text == text:
            return known.token_ids
    try:
        from tokenizers import Tokenizer
    except ImportError:
        missing = "the package 'tokenizers' is not installed"
    else:
        if tokenizer.exists():
            ids: list[int] = Tokenizer.from_file(str(tokenizer)).encode(prompt.template.format(instruction=text)).ids
            return tuple(ids)
        missing = f"the bundle has no {TOKENIZER_NAME}"
    raise PromptError(
        f"cannot tokenise {text!r}: {missing}",
        expected=" | ".join(repr(known.text) for known in prompt.instructions)
        or "a tokenizer, or reset(token_ids=[...])",
        hint="build with this --instruction, install 'jetvla[text]', or pass token ids.",
    )
