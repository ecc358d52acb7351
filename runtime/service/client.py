"""The policy on another computer, with the surface that the control loop uses of runtime.policy.Policy.

The frame is resized here, by the policy's own preprocessing, and sent as a small PNG: resizing a picture that has the right size already
changes nothing, so the answers are to the bit those of a policy in this process, for a tenth of the bandwidth. A step is over before its
deadline, by an answer or by a ServiceError; the control loop counts that as a miss and stops the robot if it goes on.

An answer that is lost leaves open whether the service took the frame into its history. Steps are numbered: each says which number it must
get, and the service refuses any other and says its own. If that can be explained by lost answers, the client goes on from there, since the
history is whole; otherwise history is lost (a service that was started again, a session that expired) and the session begins anew, with a
note. Needs the extra `remote`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundle.errors import (
    BundleError,
    ConfigError,
    FrameError,
    JetvlaError,
    NotFiniteError,
    PromptError,
    ServiceError,
)
from bundle.manifest import Manifest
from bundle.prompt_template import takes_words
from runtime.chain import no_prompt
from runtime.events import Note
from runtime.policy import ActionChunk
from runtime.preprocess import resize
from runtime.service.http_exchange import HttpExchange
from runtime.service.pictures import Encoding, encode
from runtime.service.wire import KEY_HEADER, ErrorAnswer, Health, Prediction, ResetAnswer, ResetRequest

log = logging.getLogger("jetvla")

# What is left for noticing that an answer did not come.
_MARGIN = 0.95
_SECTIONS = ("vision", "language", "action_head")
_MOST_MS = 3_600_000.0  # that a server can have taken for anything
_Record = TypeVar("_Record", bound=msgspec.Struct)


class RemotePolicy:
    """A policy service as a policy. Used by one thread.

    Args:
        url: http://host:port of the service.
        key: the service's, if it has one.
        timeout_s: a step is over after at most so long.
        reset_timeout_s: the same for `reset`, which may have to load the language graph of a longer prompt.
        load_timeout_s: the same for the questions at the start.
        encoding: `png` gives a local policy's answers exactly; `jpeg` is smaller and does not.
        jpeg_quality: for `jpeg`.
        on_note: told when history was lost or answers were; by default the log is.

    Raises:
        ConfigError: httpx is not installed, or the URL is none.
        ServiceError: the service does not answer, refuses, or is not ready.
        BundleError: it serves a bundle that this version does not know.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 1.0,
        reset_timeout_s: float = 5.0,
        load_timeout_s: float = 10.0,
        encoding: Encoding = "png",
        jpeg_quality: int = 95,
        on_note: Callable[[Note], None] | None = None,
    ) -> None:
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError(
                "the key is not one", expected="printable ASCII", hint="take the one that the service was started with."
            )
        if min(timeout_s, reset_timeout_s, load_timeout_s) <= 0:
            raise ConfigError(
                "a timeout must be positive", got=min(timeout_s, reset_timeout_s, load_timeout_s), hint="give seconds."
            )
        self.failed_backends: tuple[str, ...] = ()
        self.passed_over: tuple[str, ...] = ()
        self._timeout_s, self._reset_timeout_s = timeout_s, reset_timeout_s
        self._encoding, self._quality, self._on_note = encoding, jpeg_quality, on_note
        self._session = f"robot-{uuid.uuid4().hex[:12]}"
        self._instruction: str | None = None
        self._begun = False
        """The service knows the instruction, as far as is known here."""
        self._step, self._unanswered = 0, 0
        self._http = HttpExchange(url, {} if key is None else {KEY_HEADER: key})
        try:
            self.manifest, self.backend = self._load(time.monotonic() + load_timeout_s)
        except BaseException:
            self._http.close()
            raise

    @property
    def window(self) -> int:
        """Frames of history that an action depends on."""
        return self.manifest.dimensions.window

    def reset(self, instruction: str) -> None:
        """Start an episode: set the instruction and forget all history.

        Raises:
            PromptError: the instruction is empty, cannot be tokenised, or is too long; the next `step` needs another `reset`.
            ServiceError: no answer in time, a refusal, or another bundle than at the start; the next `step` tries again.
        """
        self._instruction, self._begun = None, False
        if not instruction.strip() and takes_words(self.manifest.prompt.template):
            raise PromptError("the instruction is empty", hint="say what the robot shall do.")
        self._instruction = instruction
        self._begin(time.monotonic() + self._reset_timeout_s * _MARGIN)

    def step(self, frame: NDArray[np.uint8], *, hand: NDArray[np.uint8] | None = None) -> ActionChunk:
        """Decide on one new observation. The chunk's `feature` is empty: it stays with the service.

        Args:
            frame: uint8 [H, W, 3] RGB, any size.
            hand: nothing: a service has policies of one camera.

        Raises:
            PromptError: no `reset` yet, or the last one had an instruction that cannot be used.
            FrameError: wrong dtype or shape, or a hand frame.
            ServiceError: no answer in time, a refusal, an answer that is none, or another bundle than at the start.
        """
        start = time.monotonic()
        deadline_s = start + self._timeout_s * _MARGIN
        if hand is not None:
            raise FrameError(
                "the policy has no hand camera", got="a hand frame", hint="run such policies on the robot."
            )
        if self._instruction is None:
            raise no_prompt()
        picture = encode(
            resize(frame, self.manifest.preprocessing, self.manifest.dimensions.image_size),
            self._encoding,
            self._quality,
        )
        sent = time.monotonic()
        if not self._begun:
            self._begin(deadline_s)
        answer = self._predict(picture, deadline_s)
        return self._chunk(answer, preprocess_ms=(sent - start) * 1e3, start=start)

    def clear(self) -> None:
        """Forget instruction and history; the next `step` needs a `reset`."""
        self._instruction, self._begun = None, False

    def close(self) -> None:
        """Close the connection; the session at the service expires by itself. Safe to call twice."""
        self._http.close()

    def _load(self, deadline_s: float) -> tuple[Manifest, str]:
        _, body = self._http.ask("GET", "/health", deadline_s)
        health = self._read(200, body, Health)
        if not health.loaded:
            raise ServiceError(
                f"the policy service at {self._http.url} cannot run its policy",
                got=f"status {health.status}",
                expected="ok",
                hint="start it again; its log says why it failed.",
            )
        status, body = self._http.ask("GET", "/policy", deadline_s)
        if status != 200:
            raise self._refused(status, body)
        try:
            manifest = Manifest.decode(body, origin=f"{self._http.url}/policy")
        except BundleError as error:
            hint = "run the same version of jetvla on both computers."
            raise type(error)(error.what, got=error.got, expected=error.expected, hint=hint) from None
        if manifest.manifest_sha256 != health.bundle:
            raise self._other_bundle(manifest.manifest_sha256, health.bundle)
        if manifest.preprocessing.cameras != ("static",):
            raise ServiceError(
                "the policy has cameras that the service does not take",
                got=", ".join(manifest.preprocessing.cameras),
                expected="static",
                hint="run it on the robot.",
            )
        return manifest.int8() if health.precision == "int8" else manifest, health.backend

    def _begin(self, deadline_s: float) -> None:
        assert self._instruction is not None
        asked = ResetRequest(session=self._session, instruction=self._instruction, bundle=self.manifest.manifest_sha256)
        exchanged = self._http.ask(
            "POST",
            "/reset",
            deadline_s,
            content=msgspec.json.encode(asked),
            headers={"content-type": "application/json"},
        )
        try:
            answer = self._read(*exchanged, ResetAnswer)
        except PromptError:
            self._instruction = None
            raise
        if answer.bundle != self.manifest.manifest_sha256:
            raise self._other_bundle(answer.bundle, self.manifest.manifest_sha256)
        self._begun, self._step, self._unanswered = True, 0, 0

    def _predict(self, picture: bytes, deadline_s: float) -> Prediction:
        """Ask; if the service counts otherwise, agree with it and ask again, once."""
        status, body = self._ask_step(picture, deadline_s)
        if status == 409 and (refusal := _error(body)) is not None and refusal.reason == "history":
            behind = -1 if refusal.step is None else refusal.step - self._step
            if 0 < behind <= self._unanswered:
                self._note("answer lost", f"the service decided on {behind} frames whose commands did not arrive")
                self._step, self._unanswered = self._step + behind, 0
            else:
                self._note("history lost", f"{refusal.what}: {refusal.got}; the session begins anew")
                self._begin(deadline_s)
            status, body = self._ask_step(picture, deadline_s)
        answer = self._read(status, body, Prediction)
        if answer.bundle != self.manifest.manifest_sha256:
            raise self._other_bundle(answer.bundle, self.manifest.manifest_sha256)
        if (answer.session, answer.step, answer.instruction) != (self._session, self._step, self._instruction):
            raise self._senseless(f"the answer to step {answer.step} of session {answer.session}")
        self._step, self._unanswered = self._step + 1, 0
        return answer

    def _ask_step(self, picture: bytes, deadline_s: float) -> tuple[int, bytes]:
        fields = {
            "session": self._session,
            "instruction": self._instruction,
            "expect_step": str(self._step),
            "bundle": self.manifest.manifest_sha256,
        }
        files = {"image": (f"frame.{self._encoding}", picture, f"image/{self._encoding}")}
        self._unanswered += 1
        status, body = self._http.ask("POST", "/predict", deadline_s, data=fields, files=files)
        if status != 200:
            self._unanswered -= 1  # a refused frame is in no history
        return status, body

    def _chunk(self, answer: Prediction, *, preprocess_ms: float, start: float) -> ActionChunk:
        shape = (self.manifest.dimensions.chunk, len(self.manifest.action.names))
        try:
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
                values = np.array(answer.values, np.float32)
                normalized = np.array(answer.normalized, np.float32)
        except (ValueError, OverflowError) as error:
            raise self._senseless(error) from None
        if values.shape != shape or normalized.ndim != 2 or len(normalized) != shape[0]:
            raise self._senseless(f"values {list(values.shape)}, normalized {list(normalized.shape)}")
        if not (np.isfinite(values).all() and np.isfinite(normalized).all()):
            raise NotFiniteError(
                f"{self._http.url} answered an action that is not finite", hint="look at the service's own log."
            )
        if (
            tuple(answer.action_names) != self.manifest.action.names
            or tuple(answer.units) != self.manifest.action.units
        ):
            raise self._senseless(f"{answer.action_names} in {answer.units}")
        times = [*answer.timing.values(), *([] if answer.engine_ms is None else [answer.engine_ms])]
        if not all(0 <= milliseconds <= _MOST_MS for milliseconds in times):
            raise self._senseless(f"times of {min(times):g} to {max(times):g} ms")
        total = (time.monotonic() - start) * 1e3
        served = answer.timing.get("total", 0.0)
        sections = {name: answer.timing[name] for name in _SECTIONS if name in answer.timing}
        timing = {
            "preprocess": preprocess_ms,
            **sections,
            "service": served - sum(sections.values()),
            "network": total - preprocess_ms - served,
            "total": total,
        }
        engine_ms = float("nan") if answer.engine_ms is None else answer.engine_ms
        return ActionChunk(values, normalized, np.zeros(0, np.float32), timing, engine_ms)

    def _read(self, status: int, body: bytes, record: type[_Record]) -> _Record:
        if status != 200:
            raise self._refused(status, body)
        try:
            return msgspec.json.decode(body, type=record)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._senseless(error) from None

    def _refused(self, status: int, body: bytes) -> JetvlaError:
        """The service's own words, as the error that a local policy would have raised."""
        refusal = _error(body)
        if refusal is None:
            return self._senseless(f"status {status}, {body[:60]!r}")
        kinds: dict[str, type[JetvlaError]] = {
            "PromptError": PromptError,
            "FrameError": FrameError,
            "NotFiniteError": NotFiniteError,
        }
        kind = kinds.get(refusal.error)
        what, facts = refusal.what, {"got": refusal.got, "expected": refusal.expected}
        if kind is not None:
            return kind(what, **facts, hint=refusal.hint)
        return ServiceError(f"the policy service refused ({status}): {what}", **facts, hint=refusal.hint)

    def _other_bundle(self, got: str, expected: str) -> ServiceError:
        return ServiceError(
            f"the policy service at {self._http.url} serves another bundle now",
            got=got,
            expected=expected,
            hint="start this program again if that is meant to be: limits and units come from the bundle.",
        )

    def _senseless(self, got: object) -> ServiceError:
        return ServiceError(
            f"{self._http.url} answers, but not as a policy service does",
            got=got,
            expected="an answer as in docs/policy-service.md",
            hint="check the address, and that both computers run the same version of jetvla.",
        )

    def _note(self, kind: str, text: str) -> None:
        if self._on_note is None:
            log.warning("%s: %s", kind, text)
        else:
            self._on_note(Note(time.monotonic(), kind, text))


def _error(body: bytes) -> ErrorAnswer | None:
    try:
        return msgspec.json.decode(body, type=ErrorAnswer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
