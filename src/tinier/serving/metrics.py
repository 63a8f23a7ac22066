"""What the server counts, for Prometheus."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from tinier.serving.replica import Job

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_ITL = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tinier_{name}", text, ["model", *labels], registry=self._registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"tinier_{name}", text, ["model"], registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"tinier_{name}", text, ["model"], registry=self._registry, buckets=buckets
            )

        self._requests = counter("requests", "Outputs that ended, and how", "result")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of their prompts")
        self._cached_tokens = counter("cached_prompt_tokens", "Of those, found in the cache")
        self._output_tokens = counter("output_tokens", "Tokens that were generated")
        self._drafted = counter("draft_tokens", "Tokens that drafts proposed")
        self._accepted = counter("accepted_draft_tokens", "Of those, the ones that were right")
        self._restarts = counter("engine_restarts", "Engines that ended and were started again")
        self._preemptions = gauge("preemptions", "Requests that gave their cache back, so far")
        self._running = gauge("requests_running", "Requests in the batch")
        self._waiting = gauge("requests_waiting", "Requests in the queue")
        self._cache = gauge("kv_cache_usage_ratio", "Share of the cache blocks in use")
        self._ttft = histogram("time_to_first_token_seconds", "From arrival", _TTFT)
        self._itl = histogram("inter_token_latency_seconds", "Mean of each output", _ITL)
        self._whole = histogram("request_seconds", "From arrival to the last token", _WHOLE)

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def first_token(self, model: str, seconds: float) -> None:
        self._ttft.labels(model).observe(seconds)

    def finished(self, model: str, job: "Job", now: float) -> None:
        self._requests.labels(model, job.finished).inc()
        self._prompt_tokens.labels(model).inc(len(job.prompt))
        self._cached_tokens.labels(model).inc(job.num_reused)
        self._output_tokens.labels(model).inc(job.num_tokens)
        self._drafted.labels(model).inc(job.num_drafted)
        self._accepted.labels(model).inc(job.num_accepted)
        self._whole.labels(model).observe(now - job.arrived)
        if job.first_token is not None and job.num_tokens > 1:
            self._itl.labels(model).observe((now - job.first_token) / (job.num_tokens - 1))

    def failed(self, model: str) -> None:
        self._requests.labels(model, "error").inc()

    def cancelled(self, model: str) -> None:
        self._requests.labels(model, "cancelled").inc()

    def refused(self, model: str) -> None:
        self._requests.labels(model, "refused").inc()

    def restarted(self, model: str) -> None:
        self._restarts.labels(model).inc()

    def stands(
        self, model: str, *, running: int, waiting: int, preemptions: int, free_blocks: int,
        num_blocks: int,
    ) -> None:  # fmt: skip
        """How the engines of a model are after a step; num_blocks 0: there are none."""
        self._running.labels(model).set(running)
        self._waiting.labels(model).set(waiting)
        self._preemptions.labels(model).set(preemptions)
        self._cache.labels(model).set(1 - free_blocks / num_blocks if num_blocks else 0)
