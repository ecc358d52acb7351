"""What travels between the policy service and its clients, as strict records: one definition for the server, the client and OpenAPI.

Numbers cross as JSON doubles, which hold every float32 exactly. Knows nothing about HTTP.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

KEY_HEADER = "X-API-Key"
# The lookahead refuses a newline at the end, which `$` alone lets through in Python.
SESSION_PATTERN = r"^[A-Za-z0-9._-]{1,64}$(?!\n)"

SessionName = Annotated[
    str,
    msgspec.Meta(
        pattern=SESSION_PATTERN, description="letters, digits, '.', '_' and '-', 64 at most", examples=["lab"]
    ),
]
Instruction = Annotated[
    str, msgspec.Meta(min_length=1, max_length=2000, examples=["Navigate to the gray basket on the left"])
]
Step = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every record: immutable, no unknown fields, fields by name."""


class PredictFields(_Strict, frozen=True):
    """What a step needs besides its picture.

    Attributes:
        session: whose history this frame continues.
        instruction: needed for a new session; another one than the session's resets it. Left out: the session's own.
        expect_step: the number that this step must get; anything else is refused with 409, so that lost history is noticed.
        bundle: manifest_sha256 of the bundle that must be served; refused with 409 if it is another.
    """

    session: SessionName
    instruction: Instruction | None = None
    expect_step: Step | None = None
    bundle: Sha256 | None = None


class PredictRequest(PredictFields, frozen=True, kw_only=True):
    """The JSON form of a step. `image` is a JPEG or PNG file in base64, with or without `data:image/...;base64,` in front."""

    image: Annotated[str, msgspec.Meta(min_length=1, extra_json_schema={"contentEncoding": "base64"})]


class ResetRequest(_Strict, frozen=True):
    """Start an episode: set the instruction and forget the session's history."""

    session: SessionName
    instruction: Instruction
    bundle: Sha256 | None = None


class Prediction(_Strict, frozen=True):
    """The answer to a step.

    Attributes:
        values: [n][A], commands in `units`; row 0 is for now.
        normalized: [n][A] as the head gives it.
        action_names, units: of the columns of `values`.
        session, instruction: whose step it was, and what the policy was told.
        step: counts the frames of the session since its reset, from 0.
        reset: the history was empty before this frame.
        bundle: manifest_sha256 of the bundle.
        timing: milliseconds: receive, decode, queue, replay, preprocess, vision, language, action_head, policy (the last four), total.
        engine_ms: inside the engines alone; null where it cannot be told.
    """

    values: list[list[float]]
    normalized: list[list[float]]
    action_names: list[str]
    units: list[str]
    session: str
    instruction: str
    step: int
    reset: bool
    bundle: str
    timing: dict[str, float]
    engine_ms: float | None


class ResetAnswer(_Strict, frozen=True):
    """The session begins anew; its next step is number `step`."""

    session: str
    instruction: str
    step: int
    bundle: str


class Health(_Strict, frozen=True):
    """Whether the service can drive. `bundle` is its manifest_sha256; `status` is failed when only a restart helps."""

    status: str
    loaded: bool
    backend: str
    precision: str
    bundle: str
    uptime_s: float


class ErrorAnswer(_Strict, frozen=True):
    """Every refusal: what happened, what was got and expected, and how to mend it.

    Attributes:
        error: kind of error.
        reason: one word, as it is counted in /metrics.
        step: with 409: the number that the session's next step would get; null where there is no such session.
    """

    error: str
    reason: str
    what: str
    hint: str
    got: str | None = None
    expected: str | None = None
    step: int | None = None
