"""The policy service as an ASGI application: endpoints, and how they use one policy in turns.

The event loop only moves bytes: bodies are parsed and pictures decoded on worker threads, and the policy runs on a thread of its own, so
/health answers while a step runs. Needs the extra `serve`; imported by runtime/service/server.py when a service is started.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import msgspec
import numpy as np
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from bundle.errors import BackendError, BundleError, JetvlaError
from bundle.manifest import Manifest
from runtime.service.metrics import Metrics
from runtime.service.openapi import add_endpoints
from runtime.service.pictures import decode
from runtime.service.refusal import Refusal, answer, as_refusal, unexpected
from runtime.service.security import STANDING, Access, Guard
from runtime.service.sessions import Sessions, Stepped, SteppingPolicy
from runtime.service.turns import Turns
from runtime.service.upload import read_body, record_of, step_of
from runtime.service.wire import Health, PredictFields, Prediction, ResetAnswer, ResetRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one service lets its clients use.

    Attributes:
        max_sessions: robots at the same time.
        session_expiry_s: an unused session is forgotten after so long.
        max_upload_mb: of one request, in units of 1e6 bytes.
        max_pixels: of one picture.
        max_waiting: requests that wait for the policy, besides the one that runs.
        request_timeout_s: for a whole request to come in.
        max_connections: open at the same time.
    """

    max_sessions: int = 16
    session_expiry_s: float = 300.0
    max_upload_mb: float = 8.0
    max_pixels: int = 8_300_000
    max_waiting: int = 8
    request_timeout_s: float = 10.0
    max_connections: int = 64


class Service:
    """One policy behind HTTP.

    Args:
        policy: loaded; the service is its only user from now on, and closes it.
        manifest: of the bundle as it lies on disk, of which the policy's own may be a view.
        limits: see there.
        on_fatal: called when only a new process can help, such as after the loss of a GPU.
    """

    def __init__(
        self, policy: SteppingPolicy, manifest: Manifest, limits: Limits, *, on_fatal: Callable[[], None] = lambda: None
    ) -> None:
        self.metrics = Metrics()
        self._policy, self._manifest, self._limits, self._on_fatal = policy, manifest, limits, on_fatal
        self._sessions = Sessions(policy, max_sessions=limits.max_sessions, expiry_s=limits.session_expiry_s)
        self._turns = Turns(limits.max_waiting)
        self._started_s = time.monotonic()
        self._failed = False
        self.metrics.count_sessions(lambda: len(self._sessions))

    def guarded(self, key: str | None) -> Guard:
        """The ASGI application, with its guard in front."""
        access = Access(key, int(self._limits.max_upload_mb * 1e6), self._limits.request_timeout_s)
        return Guard(self._application(), access, self.metrics)

    def close(self) -> None:
        """Wait for the running step and release the policy."""
        self._turns.close()
        self._policy.close()

    async def predict(self, request: Request) -> Response:
        """Decide on one frame of a session."""
        clock = [request.scope["jetvla.start_s"]]
        body = await read_body(request)
        clock.append(time.perf_counter())
        async with self._turns.admitted():
            request.scope[STANDING].waits = True
            fields, frame = await self._turns.read(lambda: self._read_step(request, body))
            clock.append(time.perf_counter())
            async with self._turns.turn():
                clock.append(time.perf_counter())
                if await request.is_disconnected():
                    # Its answer would reach nobody, and others wait.
                    raise Refusal(400, "gone", "the client went away", hint="nobody reads this.")
                stepped = await self._turns.run(
                    lambda: self._on_policy(
                        lambda: self._sessions.predict(
                            fields.session, frame, instruction=fields.instruction, expect_step=fields.expect_step
                        )
                    )
                )
        timing = _timing(clock, stepped)
        self.metrics.step(timing, stepped.replayed)
        chunk, action = stepped.chunk, self._policy.manifest.action
        return _json(
            Prediction(
                values=chunk.values.tolist(),
                normalized=chunk.normalized.tolist(),
                action_names=list(action.names),
                units=list(action.units),
                session=fields.session,
                instruction=stepped.instruction,
                step=stepped.step,
                reset=stepped.reset,
                bundle=self._manifest.manifest_sha256,
                timing=timing,
                engine_ms=chunk.engine_ms if math.isfinite(chunk.engine_ms) else None,
            )
        )

    async def reset(self, request: Request) -> Response:
        """Start an episode in a session."""
        asked = record_of(await read_body(request, "application/json"), ResetRequest)
        self._check_bundle(asked.bundle)
        async with self._turns.admitted():
            request.scope[STANDING].waits = True
            async with self._turns.turn():
                await self._turns.run(
                    lambda: self._on_policy(lambda: self._sessions.reset(asked.session, asked.instruction))
                )
        return _json(
            ResetAnswer(
                session=asked.session, instruction=asked.instruction, step=0, bundle=self._manifest.manifest_sha256
            )
        )

    async def health(self, request: Request) -> Response:
        """Whether the service can drive; needs no key."""
        health = Health(
            status="failed" if self._failed else "ok",
            loaded=not self._failed,
            backend=self._policy.backend,
            precision=self._policy.manifest.precision,
            bundle=self._manifest.manifest_sha256,
            uptime_s=round(time.monotonic() - self._started_s, 3),
        )
        return _json(health, 503 if self._failed else 200)

    async def policy(self, request: Request) -> Response:
        """The bundle's manifest."""
        return Response(self._manifest.encode(), media_type="application/json")

    async def prometheus(self, request: Request) -> Response:
        """Counters in Prometheus' text form."""
        text, kind = self.metrics.text()
        return Response(text, headers={"content-type": kind})

    def _application(self) -> FastAPI:
        # No pages: FastAPI's load their scripts from elsewhere. No redirects: a client that follows one loses its key to a stranger.
        app = FastAPI(title="jetvla policy service", docs_url=None, redoc_url=None, redirect_slashes=False)
        add_endpoints(
            app,
            {
                ("POST", "/predict"): self.predict,
                ("POST", "/reset"): self.reset,
                ("GET", "/policy"): self.policy,
                ("GET", "/health"): self.health,
                ("GET", "/metrics"): self.prometheus,
            },
        )
        app.add_exception_handler(JetvlaError, self._refuse)
        app.add_exception_handler(HTTPException, self._refuse_route)
        app.add_exception_handler(Exception, self._refuse_unexpected)
        return app

    async def _refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, JetvlaError)
        self.metrics.refused(as_refusal(error).reason)
        return _error(error)

    async def _refuse_unexpected(self, request: Request, error: Exception) -> Response:
        return await self._refuse(request, unexpected(error))

    async def _refuse_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refusal = Refusal(
            error.status_code,
            "route",
            "there is no such endpoint" if error.status_code == 404 else str(error.detail),
            got=f"{request.method} {request.url.path[:100]}",
            expected="one of those in /openapi.json",
            hint="docs/policy-service.md lists the endpoints.",
        )
        self.metrics.refused(refusal.reason)
        response = _error(refusal)
        response.headers.update(error.headers or {})
        return response

    def _read_step(self, request: Request, body: bytes) -> tuple[PredictFields, NDArray[np.uint8]]:
        fields, file = step_of(request, body)
        self._check_bundle(fields.bundle)
        return fields, decode(file, max_pixels=self._limits.max_pixels)

    def _check_bundle(self, wanted: str | None) -> None:
        if wanted is not None and wanted != self._manifest.manifest_sha256:
            raise Refusal(
                409,
                "bundle",
                "another bundle is served than the client wants",
                got=self._manifest.manifest_sha256,
                expected=wanted,
                hint="the service was started again with another bundle: start the client again, or serve the right one.",
            )

    def _on_policy(self, work: Callable[[], T]) -> T:
        """Run work that uses the policy, on the policy's thread."""
        if self._failed:
            raise _lost("the policy failed before")
        try:
            return work()
        except (BackendError, BundleError) as error:
            if isinstance(error, BundleError) or getattr(error, "sticky", False):
                self._failed = True
                self._on_fatal()
                raise _lost(error.what) from error
            raise


def _lost(got: str) -> Refusal:
    return Refusal(
        503,
        "failed",
        "the service cannot run the policy any more",
        got=got,
        hint="it must be started again; a supervisor that restarts it on failure does so by itself.",
        retry_after_s=10,
    )


def _timing(clock: list[float], stepped: Stepped) -> dict[str, float]:
    receive, decoding, queue = ((later - earlier) * 1e3 for earlier, later in pairwise(clock))
    sections = dict(stepped.chunk.timing)
    policy = sections.pop("total")
    return {
        "receive": receive,
        "decode": decoding,
        "queue": queue,
        "replay": stepped.replay_ms,
        **sections,
        "policy": policy,
        "total": (time.perf_counter() - clock[0]) * 1e3,
    }


def _json(record: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(record), status, media_type="application/json")


def _error(error: JetvlaError) -> Response:
    status, headers, body = answer(error)
    response = Response(body, status)
    response.raw_headers = headers
    return response
