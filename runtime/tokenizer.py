"""From instruction text to token ids: the manifest's pre-tokenised instructions first, then the bundle's tokenizer.json.

The `tokenizers` package is optional on a robot; without it every instruction given at build time still works.
"""

from __future__ import annotations

from pathlib import Path

from bundle.manifest import Prompt
from bundle.prompt_template import fill
from bundle.tokenization import tokenize

__all__ = ["TOKENIZER_NAME", "token_ids_of", "tokenize"]

TOKENIZER_NAME = "tokenizer.json"


def token_ids_of(instruction: str, prompt: Prompt, tokenizer: Path) -> tuple[int, ...]:
    """Token ids with special tokens, before any padding; `tokenizer` is a tokenizer.json that may be missing.

    Raises:
        PromptError: the text does not go into the policy's template, or it is unknown and there is no tokenizer.
    """
    wanted = fill(prompt.template, instruction)
    for known in prompt.instructions:
        if fill(prompt.template, known.text) == wanted:
            return known.token_ids
    return tokenize(instruction, prompt.template, tokenizer, known=tuple(item.text for item in prompt.instructions))
