"""What the service counts, for Prometheus. Labels have few values, whatever clients send: a path that is not ours counts as `other`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

PATHS = frozenset({"/predict", "/reset", "/policy", "/health", "/metrics", "/openapi.json"})
# Milliseconds of a GPU to seconds of a small CPU.
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """Counters of one service. Needs prometheus-client; has a registry of its own, so that services in one process do not add up."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        self._requests = Counter("jetvla_requests", "Requests answered.", ("path", "code"), registry=self._registry)
        self._refused = Counter("jetvla_refused", "Requests refused.", ("reason",), registry=self._registry)
        self._sections = Histogram(
            "jetvla_step_seconds",
            "Time of a step by section.",
            ("section",),
            registry=self._registry,
            buckets=_BUCKETS_S,
        )
        self._replayed = Counter(
            "jetvla_replayed_features", "Features run again after a change of session.", registry=self._registry
        )
        self._sessions = Gauge("jetvla_sessions", "Sessions in use.", registry=self._registry)
        self.in_flight = Gauge("jetvla_requests_in_flight", "Requests being handled.", registry=self._registry)

    def request(self, path: str, code: int) -> None:
        """A request is over; code 0 is one whose client went away."""
        self._requests.labels(path if path in PATHS else "other", str(code) if code else "none").inc()

    def refused(self, reason: str) -> None:
        """A request was refused; `reason` is one of the service's own words."""
        self._refused.labels(reason).inc()

    def step(self, milliseconds: Mapping[str, float], replayed: int) -> None:
        """A step was answered."""
        for section, value in milliseconds.items():
            self._sections.labels(section).observe(value / 1e3)
        self._replayed.inc(replayed)

    def count_sessions(self, count: Callable[[], float]) -> None:
        """Ask `count` for the number of sessions whenever metrics are read."""
        self._sessions.set_function(count)

    def text(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text form, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
