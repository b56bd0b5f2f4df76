"""vLLM's statistics on Triton's metrics port, under the names that NVIDIA's backend gives them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

import triton_python_backend_utils as pb_utils
from vllm.config import VllmConfig
from vllm.v1.metrics import buckets
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

Report = tuple[Callable[[float], None], float]
Factory = Callable[[VllmConfig, int], StatLoggerBase]


class TritonStatLogger(StatLoggerBase):  # type: ignore[misc]  # vllm is not type-checked
    """Receives vLLM's statistics at every engine step and reports them to Triton.

    Each report is a round trip to the server, so a thread makes them while the engine goes on.
    """

    def __init__(self, labels: dict[str, str], vllm_config: VllmConfig) -> None:
        self.labels = labels
        self.families: list[Any] = []  # a metric ends with its family
        self.reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.last: dict[Any, float] = {}
        latency, tokens = (
            buckets.REQUEST_LATENCY_BUCKETS,
            buckets.build_1_2_5_buckets(vllm_config.model_config.max_model_len),
        )

        self.prompt_tokens = self._counter("prompt_tokens_total", "Prefill tokens processed.")
        self.generation_tokens = self._counter("generation_tokens_total", "Generation tokens processed.")
        self.preemptions = self._counter("num_preemptions_total", "Preemptions by the scheduler.")
        self.running = self._gauge("num_requests_running", "Requests in the engine's running batch.")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait to be scheduled.")
        self.cache_usage = self._gauge("gpu_cache_usage_perc", "KV cache in use; 1 is all of it.")
        self.iteration_tokens = self._histogram(
            "iteration_tokens_total", "Tokens per engine step.", buckets.ITERATION_TOKENS_BUCKETS
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "Time to first token.", buckets.TIME_TO_FIRST_TOKEN_BUCKETS
        )
        self.per_token = self._histogram(
            "time_per_output_token_seconds", "Time between tokens.", buckets.INTER_TOKEN_LATENCY_BUCKETS
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "From arrival to last token.", latency)
        self.queued = self._histogram("request_queue_time_seconds", "Time in the queue.", latency)
        self.inference = self._histogram("request_inference_time_seconds", "Prefill and decode.", latency)
        self.prefill = self._histogram("request_prefill_time_seconds", "Time in prefill.", latency)
        self.decode = self._histogram("request_decode_time_seconds", "Time in decode.", latency)
        self.request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens per request.", tokens)
        self.request_generation = self._histogram("request_generation_tokens", "Tokens generated per request.", tokens)
        self.request_n = self._histogram(
            "request_params_n", "The parameter n of requests.", buckets.REQUEST_PARAMS_N_BUCKETS
        )
        threading.Thread(target=self._report, name="metrics", daemon=True).start()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Queue the reports of one engine step; called by vLLM."""
        if scheduler_stats:
            self._set(self.running, scheduler_stats.num_running_reqs)
            self._set(self.waiting, scheduler_stats.num_waiting_reqs)
            self._set(self.cache_usage, scheduler_stats.kv_cache_usage)
        if iteration_stats:
            self._add(self.prompt_tokens, iteration_stats.num_prompt_tokens)
            self._add(self.generation_tokens, iteration_stats.num_generation_tokens)
            self._add(self.preemptions, iteration_stats.num_preempted_reqs)
            step = iteration_stats.prompt_token_stats.computed + iteration_stats.num_generation_tokens
            self._observe(self.iteration_tokens, [step])
            self._observe(self.first_token, iteration_stats.time_to_first_tokens_iter)
            self._observe(self.per_token, iteration_stats.inter_token_latencies_iter)
            self._observe(self.request_n, iteration_stats.n_params_iter)
            for request in iteration_stats.finished_requests:
                self._observe(self.e2e, [request.e2e_latency])
                self._observe(self.queued, [request.queued_time])
                self._observe(self.inference, [request.inference_time])
                self._observe(self.prefill, [request.prefill_time])
                self._observe(self.decode, [request.decode_time])
                self._observe(self.request_prompt, [request.num_prompt_tokens])
                self._observe(self.request_generation, [request.num_generation_tokens])

    def log_engine_initialized(self) -> None:
        """Nothing to say: vLLM logs its configuration itself."""

    def _family(self, name: str, description: str, kind: Any) -> Any:
        self.families.append(pb_utils.MetricFamily(name=f"vllm:{name}", description=description, kind=kind))
        return self.families[-1]

    def _counter(self, name: str, description: str) -> Any:
        return self._family(name, description, pb_utils.MetricFamily.COUNTER).Metric(labels=self.labels)

    def _gauge(self, name: str, description: str) -> Any:
        return self._family(name, description, pb_utils.MetricFamily.GAUGE).Metric(labels=self.labels)

    def _histogram(self, name: str, description: str, bounds: Iterable[float]) -> Any:
        family = self._family(name, description, pb_utils.MetricFamily.HISTOGRAM)
        return family.Metric(labels=self.labels, buckets=list(bounds))

    def _set(self, gauge: Any, value: float) -> None:
        if self.last.get(gauge) != value:
            self.last[gauge] = value
            self.reports.put((gauge.set, value))

    def _add(self, counter: Any, value: float) -> None:
        if value:
            self.reports.put((counter.increment, value))

    def _observe(self, histogram: Any, values: Iterable[float]) -> None:
        for value in values:
            self.reports.put((histogram.observe, value))

    def _report(self) -> None:
        while True:
            report, value = self.reports.get()
            report(value)


def stat_logger_factory(labels: dict[str, str]) -> Factory:
    """What AsyncLLM's `stat_loggers` wants: called with vLLM's configuration and the engine's index."""
    return lambda vllm_config, _: TritonStatLogger(labels, vllm_config)
