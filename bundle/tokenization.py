"""From instruction text to token ids, the same for training, export and the robot.

The `tokenizers` package is optional on a robot, so it is imported when a text comes. Knows nothing about rows or packing.
"""

from __future__ import annotations

from pathlib import Path

from bundle.errors import PromptError
from bundle.prompt_template import fill


def tokenize(instruction: str, template: str, tokenizer: Path, *, known: tuple[str, ...] = ()) -> tuple[int, ...]:
    """Token ids of `template` filled with the instruction; `known` texts are suggested where it cannot be done.

    Raises:
        PromptError: the text does not go into the template (see `fill`), or there is no tokenizer.
    """
    text, prompt = instruction.strip(), fill(template, instruction)
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
            return tuple(loaded.encode(prompt).ids)
        missing = f"there is no {tokenizer}"
    raise PromptError(
        f"cannot tokenise {text!r}: {missing}",
        expected=" | ".join(map(repr, known)) or "a tokenizer, or token ids",
        hint="build with --base DIR or --tokenizer FILE and this --instruction, install 'jetvla[text]', or pass token ids.",
    )
