"""What Prometheus reads from `/metrics`."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from rmjax.serve.http.service import Service

_BATCH = (1, 2, 4, 8, 16, 32, 64)
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Counts the requests of one app.

    Args:
      service: its store is read when Prometheus asks.
    """

    def __init__(self, service: Service):
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "rmjax_requests", "Requests.", ["endpoint", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "rmjax_request_seconds",
            "Seconds from the head of a request to its reply.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        batch = Histogram(
            "rmjax_batch_requests",
            "Requests that were computed together.",
            buckets=_BATCH,
            registry=self._registry,
        )
        streams = service.streams
        streams.observe(batch.observe)
        for name, text, read in (
            ("rmjax_users", "Users that have a stream.", lambda: len(streams)),
            ("rmjax_queue_length", "Requests that wait.", lambda: streams.waiting),
        ):
            Gauge(name, text, registry=self._registry).set_function(read)
        ProcessCollector(registry=self._registry)

    def count(self, endpoint: str, status: int, seconds: float) -> None:
        """Counts a request that is done."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)
