"""Every error says what happened and how to mend it, and every kind can be caught as one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle import errors
from bundle.errors import BundleError, BundleLockedError, BundleVersionError, JetvlaError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not JetvlaError
]


def test_the_message_in_full() -> None:
    error = JetvlaError("the file is short", got="3 bytes", expected=7, hint="copy it again.")

    assert str(error) == "the file is short\n  got:      3 bytes\n  expected: 7\n\nhint: copy it again."
    assert (error.what, error.got, error.expected, error.hint) == (
        "the file is short",
        "3 bytes",
        7,
        "copy it again.",
    )


@given(got=st.none() | st.integers() | st.just(""), expected=st.none() | st.integers() | st.just(""))
def test_only_what_is_known_is_said(got: object, expected: object) -> None:
    text = str(JetvlaError("what", got=got, expected=expected, hint="how"))

    assert text.startswith("what\n")
    assert text.endswith("\n\nhint: how")
    assert ("\n  got:      " in text) == (got is not None)  # zero and "" were got, too
    assert ("\n  expected: " in text) == (expected is not None)


def test_a_hint_is_not_optional() -> None:
    with pytest.raises(TypeError, match="hint"):
        JetvlaError("what")  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", KINDS)
def test_one_except_catches_them_all(kind: type[JetvlaError]) -> None:
    with pytest.raises(JetvlaError, match="hint: how"):
        raise kind("what", hint="how")


def test_whoever_refuses_broken_bundles_refuses_all_of_them() -> None:
    assert issubclass(BundleVersionError, BundleError)
    assert issubclass(BundleLockedError, BundleError)


@given(st.text())
def test_what_strangers_wrote_is_shown_and_not_obeyed(text: str) -> None:
    shown = str(JetvlaError("what", got=text, hint="how"))
    assert all(each.isprintable() or each == "\n" for each in shown)
    assert shown.encode("utf-8")  # no half of a surrogate pair
    if text.isprintable():
        assert f"got:      {text}\n" in shown


def test_a_message_is_no_flood() -> None:
    shown = str(JetvlaError("what", got="x" * 1_000_000, hint="how"))
    assert len(shown) < 5000
    assert "... (1000000 characters)" in shown
