"""The text around an instruction: filled exactly once, whoever brings it.

A policy knows one template, and its manifest states it. Labs store instructions with and without that text, so one that already
carries the whole of it is taken as it is, and one that carries a part of it, or of another, is refused: wrapped twice, it would still
drive, badly. A template without `{instruction}` belongs to a policy that was trained without words. Knows nothing about tokens.
"""

from __future__ import annotations

from bundle.errors import PromptError

PLACE = "{instruction}"
GROUNDING = "<grounding>"
UPSTREAM = "<grounding>An image of a robot {instruction}"
RAW = "{instruction}"
PREFIXED = "<grounding>{instruction}"
ACTION = "<grounding>Instruction: {instruction}. Action:"
# Those of public training code: RoboVLMs' own, and the three of the lab's NavDataset.
TEMPLATES = (UPSTREAM, RAW, PREFIXED, ACTION)


def is_template(text: str) -> bool:
    """Whether a text can be filled: `{instruction}` once or not at all, and no other braces."""
    rest = text.replace(PLACE, "", 1)
    return "{" not in rest and "}" not in rest


def takes_words(template: str) -> bool:
    """Whether an instruction has a place in it; without one the prompt is always the template."""
    return PLACE in template


def words_of(template: str, text: str) -> str:
    """What stands in the template's place: the text, or what is inside if it carries the whole template already.

    Raises:
        PromptError: it carries a part of the template, or another one's mark.
    """
    before, _, after = template.partition(PLACE)
    wrapped = text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)
    if wrapped:
        return text[len(before) : len(text) - len(after)]
    opening, closing = before.replace(GROUNDING, "").strip(), after.strip(" .")
    carried = (
        (before.strip() and GROUNDING in text)
        or (opening and text.startswith(opening))
        or (closing and text.rstrip(" .").endswith(closing))
    )
    if carried:
        raise PromptError(
            "the instruction already carries a part of a prompt",
            got=repr(text),
            expected=f"words alone, or the whole of {template!r}",
            hint="leave out what stands around the words: it would be put around them a second time.",
        )
    return text


def fill(template: str, instruction: str) -> str:
    """The prompt of an instruction, before tokenisation.

    Raises:
        PromptError: the instruction is empty where the template has a place for words, has words where it has none, or see `words_of`.
    """
    text = instruction.strip()
    if not takes_words(template):
        if text not in ("", template.strip()):
            raise PromptError(
                "this policy was trained without words, so an instruction cannot reach it",
                got=repr(text),
                expected="an empty instruction",
                hint="--instruction '' is what it was trained with.",
            )
        return template
    words = words_of(template, text)
    if not words.strip():
        raise PromptError(
            "the instruction is empty", hint="say what the robot should do, e.g. 'Navigate to the basket'."
        )
    return template.replace(PLACE, words, 1)


def told(template: str, stated: str | None, recorded: str | None) -> str | None:
    """What a policy is told on a recorded episode: what is stated, else what the episode says; nothing where it takes no words."""
    if stated is not None:
        return stated
    return recorded if takes_words(template) else ""
