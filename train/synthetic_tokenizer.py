"""A stand-in for Kosmos-2's tokenizer, made from nothing: the same algorithm and special tokens, another vocabulary.

The real one is an XLM-R Unigram model that cannot be shipped here. This one has its kind of normalizer and
pre-tokenizer, its template `<s> A </s>` and its Kosmos tags in their order, so the code around it sees what it will see
on a robot. Its pieces are the words of navigation and table-top instructions; everything else falls back to characters
and bytes, so any text can be tokenised.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
# Kosmos-2 appends these to XLM-R's pieces in this order; in the real vocabulary `<mask>` is 64001, `<grounding>` 64012.
_TAGS = (
    "<mask>",
    "</doc>",
    "<image>",
    "</image>",
    "</chunk>",
    "</line>",
    "<phrase>",
    "</phrase>",
    "<object>",
    "</object>",
    "</delimiter_of_multi_objects/>",
    "<grounding>",
)
_PATCH_INDICES = 1024

# `_` stands for the space mark that starts a word. Longer words come in two or three pieces, as they do in XLM-R.
_WORD_MARK = "\u2581"
_PIECES = """
_the _a _an _of _to _and _in _on _at _from _with _into _up _down _off _is _it _An _The
_image _robot _left _right _front _back _side _center _middle _top _bottom _near _far _next
_Navi gate _navi _go _drive _move _turn _stop _reach _around _toward s _past _through _between _behind
_ob stacle _bot tle _bever age _bas ket _box _cup _chair _table _door _wall _floor _person _ball _cone
_gray _grey _red _blue _green _yellow _black _white _brown _orange _pink _purple _small _large _big
_pick _place _push _pull _lift _open _close _put _grasp _rotate _slide _press _stack _turn
_block _drawer _button _light _bulb _switch _slider _handle _object _target _cabinet
ing ed er est ly ion tion al an ar as at en es in is it le li on or ou ra re ri ro se st te th ti to ur
"""


def make_tokenizer(vocab: int) -> Tokenizer:
    """A tokenizer with `vocab` ids: pieces, then Kosmos-2's twelve tags, then (given room) its 1024 patch indices.

    Raises:
        ValueError: `vocab` is too small for the pieces and tags.
    """
    patches = _PATCH_INDICES if vocab >= 2 * _PATCH_INDICES else 0
    room = vocab - len(_TAGS) - patches
    model = models.Unigram(_vocabulary(room), unk_id=_SPECIAL.index("<unk>"), byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.add_tokens([AddedToken(tag, lstrip=True, normalized=False) for tag in _TAGS])
    tokenizer.add_tokens([AddedToken(f"<patch_index_{index:04d}>", normalized=False) for index in range(patches)])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def _vocabulary(size: int) -> list[tuple[str, float]]:
    """`size` pieces with their log probabilities: a longer piece beats the shorter ones that spell it."""
    scores = dict.fromkeys(_SPECIAL, 0.0)
    for piece in _PIECES.split():
        text = piece.replace("_", _WORD_MARK)
        scores.setdefault(text, -6.0 - 0.1 * len(text))
    for character in [_WORD_MARK, *map(chr, range(0x21, 0x7F))]:
        scores.setdefault(character, -9.0)
    for byte in range(256):
        scores.setdefault(f"<0x{byte:02X}>", -12.0)
    if len(scores) > size:
        raise ValueError(f"a vocabulary of {size} pieces cannot hold the {len(scores)} that any text needs")
    # The rest are ids that no text leads to, as most of the real 65037 are in the instructions of one robot.
    for index in range(len(scores), size):
        scores[f"<reserved_{index:05d}>"] = -50.0
    return list(scores.items())
