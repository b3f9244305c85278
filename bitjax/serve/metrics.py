"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from bitjax.engine import Engine
    from bitjax.serve.worker import Ticket, Worker

# Seconds. A token of a 2B model takes some 15 ms alone, and some 150 ms among 32.
_TOKEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, each in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        rest: dict[str, Any] = {"registry": self.registry}
        self._answers = Counter(
            "bitjax_http_requests", "Answers, by path and status", ["path", "status"], **rest
        )
        self._cancelled = Counter(
            "bitjax_cancelled", "Requests that were cancelled, by reason", ["reason"], **rest
        )
        self._first = Histogram(
            "bitjax_time_to_first_token_seconds", "From a request's arrival", buckets=_FIRST, **rest
        )
        self._token = Histogram(
            "bitjax_inter_token_seconds", "Between tokens of a sequence", buckets=_TOKEN, **rest
        )
        self._whole = Histogram(
            "bitjax_request_seconds", "From a request's arrival to its end", buckets=_WHOLE, **rest
        )

    def watch(self, worker: Worker) -> None:
        """Show a worker's and its engine's own counts too."""
        self.registry.register(_EngineCollector(worker, worker.engine))

    def answered(self, path: str, status: int) -> None:
        """An answer was sent."""
        self._answers.labels(path, str(status)).inc()

    def cancelled(self, reason: str) -> None:
        """A request was cancelled."""
        self._cancelled.labels(reason).inc()

    def token(self, ticket: Ticket, sample: tuple[int, int], count: int, now: float) -> None:
        """Tokens came for a sample of a ticket; several at once share the time."""
        if not count:
            return
        before = ticket.last.get(sample)
        if before is None:
            self._first.observe(now - ticket.created)
            count -= 1
        for _ in range(count):
            self._token.observe((now - before) / count if before is not None else 0.0)
        ticket.last[sample] = now

    def finished(self, seconds: float) -> None:
        """A request was answered to its end."""
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class _EngineCollector:
    """Reads the counts when Prometheus asks."""

    def __init__(self, worker: Worker, engine: Engine) -> None:
        self._worker, self._engine = worker, engine

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """As prometheus_client wants it."""
        stats, worker = self._engine.stats, self._worker
        for name, text, value in (
            ("sequences_running", "Sequences that run", stats.running),
            ("sequences_waiting", "Sequences that wait", stats.waiting),
            ("sequences_reserved", "Places of the queue that are taken", worker.reserved),
            ("sequences_capacity", "Places of the queue", worker.capacity),
            ("requests_live", "Prompts that somebody waits for", worker.live),
            ("cache_pages", "Pages of the cache", stats.pages),
            ("cache_pages_used", "Pages of the cache in use", stats.pages_used),
        ):
            yield GaugeMetricFamily(f"bitjax_{name}", text, value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts", stats.prompt_tokens),
            ("cached_tokens", "Tokens of prompts that were shared", stats.cached_tokens),
            ("generated_tokens", "Tokens generated", stats.completion_tokens),
            ("finished", "Requests finished", stats.finished),
            ("preempted", "Sequences put back for want of memory", stats.preempted),
            ("steps", "Steps of the engine", stats.steps),
            ("guessed_tokens", "Tokens guessed from the text so far", stats.guessed),
            ("accepted_tokens", "Guesses that were right", stats.accepted),
        ):
            yield CounterMetricFamily(f"bitjax_{name}", text, value)
