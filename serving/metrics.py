"""Figures for Prometheus: vLLM's names under the prefix `spike_export:`, so that dashboards need one replacement."""

import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from spike_export.engines.generation.generated_text import Piece
from spike_export.serving.scheduling.limits import Limits
from spike_export.serving.scheduling.worker import Worker

if TYPE_CHECKING:
    from spike_export.serving.scheduling.answer import Answer, Progress

PREFIX = "spike_export:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_BETWEEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
_TOKENS = tuple(float(power * 10**digits) for digits in range(5) for power in (1, 2, 5))


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, model: str, worker: Worker, limits: Limits) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_WorkerState(model, worker, limits))
        self._model = model
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.").labels(model)
        self._queried = self._counter("prefix_cache_queries", "Tokens of prompts that were looked up.").labels(model)
        self._hits = self._counter("prefix_cache_hits", "Tokens of prompts that were not computed again.").labels(model)
        self._generated = self._counter("generation_tokens", "Tokens generated.").labels(model)
        self._success = self._counter("request_success", "Sequences generated, by why they ended.", "finished_reason")
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token.", _TTFT)
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", _BETWEEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to its last token.", _WHOLE)
        self._prompt_sizes = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answer_sizes = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}{name}", text, ("model_name", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        labels = ("model_name",)
        histogram = Histogram(f"{PREFIX}{name}", text, labels, buckets=buckets, registry=self._registry)
        return histogram.labels(self._model)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)

    async def observed(self, answer: "Answer", prompts: list[int]) -> "AsyncIterator[tuple[int, Piece | Progress]]":
        """Pass on what comes of a request, and count its pieces; `prompts` has the prompt tokens of each sequence."""
        begun = time.perf_counter()
        before: dict[int, float] = {}
        counts = [0] * len(prompts)
        for tokens in prompts:
            self._prompt.inc(tokens)
            self._prompt_sizes.observe(tokens)
        async for number, piece in answer.pieces():
            if not isinstance(piece, Piece):
                yield number, piece
                continue
            now = time.perf_counter()
            if number in before:
                self._between.observe(now - before[number])
            else:
                self._first.observe(now - begun)
                self._queried.inc(prompts[number])
                self._hits.inc(answer.reused[number])
            before[number] = now
            counts[number] += 1
            self._generated.inc()
            if piece.finish_reason is not None:
                self._whole.observe(now - begun)
                self._answer_sizes.observe(counts[number])
                self._success.labels(self._model, piece.finish_reason).inc()
            yield number, piece


class _WorkerState(Collector):
    """What the worker is doing when the figures are read."""

    def __init__(self, model: str, worker: Worker, limits: Limits) -> None:
        self._model, self._worker, self._limits = model, worker, limits

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges."""
        worker = self._worker
        gauges = (
            ("num_requests_running", "Sequences that are being computed.", worker.running),
            ("num_requests_waiting", "Sequences that wait for a row.", worker.waiting),
            ("kv_cache_usage_perc", "Share of the rows in use, 0 to 1.", worker.running / self._limits.rows),
            ("engine_ready", "1 while the engine computes, 0 after a failure.", float(worker.state == "ready")),
        )
        for name, text, value in gauges:
            family = GaugeMetricFamily(f"{PREFIX}{name}", text, labels=("model_name",))
            family.add_metric([self._model], value)
            yield family
        restarts = CounterMetricFamily(f"{PREFIX}engine_restarts", "Restarts of the engine.", labels=("model_name",))
        restarts.add_metric([self._model], worker.restarts)
        yield restarts
        yield from self._clipped()

    def _clipped(self) -> Iterator[Metric]:
        counts = self._worker.clipped
        names = ("clipped_activations", "sampled_activations")
        texts = (
            "Activations beyond the range of their static scale, in the calls that counted.",
            "All activations there.",
        )
        for place, (name, text) in enumerate(zip(names, texts, strict=True)):
            family = CounterMetricFamily(f"{PREFIX}{name}", text, labels=("model_name", "group"))
            for group, figures in counts.items():
                family.add_metric([self._model, group], figures[place])
            yield family
