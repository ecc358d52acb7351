"""Many sessions on one loaded policy, exactly.

A policy holds the state of one episode, and loading another one costs gigabytes. What an action depends on besides its own frame is the
features of the `window - 1` frames before it, a few kilobytes: each session keeps those. When another session ran in between, the policy is
reset and the features are run through the action head again, the same recurrences in the same order, so the answers are those of a policy
of one's own to the last bit, for window - 1 runs of the smallest stage. A session that runs alone never replays. Knows nothing about HTTP;
used by one thread at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import Manifest
from runtime.policy import ActionChunk
from runtime.service.refusal import Refusal

# A session idle for so long drives nothing, and may make room for a new one before it expires.
SPARE_AFTER_S = 30.0


class SteppingPolicy(Protocol):
    """The part of runtime.policy.Policy that sessions need."""

    manifest: Manifest
    backend: str

    @property
    def window(self) -> int: ...

    def reset(self, instruction: str) -> None: ...

    def step(self, frame: NDArray[np.uint8]) -> ActionChunk: ...

    def run_action_head(self, feature: NDArray[np.float32]) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class Session:
    """One client's episode.

    Attributes:
        instruction: what the policy is told.
        features: float32 [latent * D] each, of the last `window - 1` frames since the reset, the oldest first.
        step: frames since the reset; the number that the next one gets.
        used_s: when it was last used.
    """

    instruction: str
    features: deque[NDArray[np.float32]]
    step: int
    used_s: float


@dataclass(frozen=True, eq=False)
class Stepped:
    """A step's outcome.

    Attributes:
        chunk: of the policy.
        instruction: that it followed.
        step: the frame's number since the reset.
        reset: the history was empty.
        replayed: features that were run again because another session came in between.
        replay_ms: what that took.
    """

    chunk: ActionChunk
    instruction: str
    step: int
    reset: bool
    replayed: int
    replay_ms: float


class Sessions:
    """All sessions of one policy.

    Args:
        policy: that all of them use; nobody else may.
        max_sessions: at the same time.
        expiry_s: unused for so long, a session is forgotten.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        policy: SteppingPolicy,
        *,
        max_sessions: int = 16,
        expiry_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._max_sessions = max_sessions
        self._expiry_s = expiry_s
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._held: Session | None = None
        """The session whose state the policy holds right now."""

    def __len__(self) -> int:
        return len(self._sessions)

    def reset(self, name: str, instruction: str) -> None:
        """Start an episode in a session that may be new.

        Raises:
            Refusal: too many sessions.
            JetvlaError: see Policy.reset; the session is what it was.
        """
        self._forget_expired()
        if name not in self._sessions:
            self._make_room()
        self._hold(self._begin(instruction), name)

    def predict(
        self, name: str, frame: NDArray[np.uint8], *, instruction: str | None = None, expect_step: int | None = None
    ) -> Stepped:
        """Decide on a frame in a session; another instruction than the session's, or a new session, is a reset.

        Args:
            name: of the session.
            frame: see Policy.step.
            instruction: by default the session's.
            expect_step: the number that this frame must get.

        Raises:
            Refusal: 404 for an unknown session without an instruction, 409 for a frame that would get another number, 503 for too many
                sessions.
            JetvlaError: see Policy.step and Policy.reset; the session is what it was.
        """
        self._forget_expired()
        known = self._sessions.get(name)
        same = known is not None and instruction in (None, known.instruction)
        step = known.step if known is not None and same else 0
        if expect_step is not None and expect_step != step:
            raise Refusal(
                409,
                "history",
                f"session {name} is not where the client takes it to be",
                got=f"step {step} comes next" if known is not None else "no such session: expired, or never there",
                expected=f"step {expect_step}",
                hint="history was lost, or an answer was: POST /reset, then go on with expect_step 0.",
                step=None if known is None else step,
            )
        replay_ms, replayed = 0.0, 0
        if known is not None and same:
            session = known
            if session is not self._held:
                start = time.perf_counter()
                replayed = self._replay(session)
                replay_ms = (time.perf_counter() - start) * 1e3
        else:
            if instruction is None:
                raise Refusal(
                    404,
                    "session",
                    f"there is no session {name}",
                    expected="a session in use, or an instruction to begin one with",
                    hint="give `instruction`; the session may have expired, and then its history is lost.",
                )
            if known is None:
                self._make_room()
            session = self._begin(instruction)
        try:
            chunk = self._policy.step(frame)
        except BaseException:
            # What the policy holds now is not worth a thought: the next step starts from the features.
            self._held = None
            raise
        if session is not known:
            self._hold(session, name)
        step = session.step
        session.features.append(chunk.feature)
        session.step += 1
        session.used_s = self._clock()
        return Stepped(chunk, session.instruction, step, step == 0, replayed, replay_ms)

    def _begin(self, instruction: str) -> Session:
        self._held = None
        self._policy.reset(instruction)
        return Session(instruction, deque(maxlen=self._policy.window - 1), 0, self._clock())

    def _hold(self, session: Session, name: str) -> None:
        self._sessions[name] = self._held = session

    def _replay(self, session: Session) -> int:
        """Bring the policy into the state of a session; returns the number of features that it took."""
        self._held = None
        self._policy.reset(session.instruction)
        for feature in session.features:
            self._policy.run_action_head(feature[None])
        self._held = session
        return len(session.features)

    def _forget_expired(self) -> None:
        oldest = self._clock() - self._expiry_s
        for name in [name for name, session in self._sessions.items() if session.used_s < oldest]:
            self._forget(name)

    def _make_room(self) -> None:
        if len(self._sessions) < self._max_sessions:
            return
        name, session = min(self._sessions.items(), key=lambda item: item[1].used_s)
        idle_s = self._clock() - session.used_s
        if idle_s < SPARE_AFTER_S:
            raise Refusal(
                503,
                "sessions",
                "there are too many sessions",
                got=f"{len(self._sessions)} in use",
                expected=f"at most {self._max_sessions}",
                hint="use one session per robot, or start the service with a larger --max-sessions.",
                retry_after_s=max(1, round(SPARE_AFTER_S - idle_s)),
            )
        self._forget(name)

    def _forget(self, name: str) -> None:
        if self._sessions.pop(name) is self._held:
            self._held = None
