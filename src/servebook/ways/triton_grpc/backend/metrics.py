"""vLLM's statistics on Triton's metrics port, under the names that NVIDIA's backend gives them."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

import triton_python_backend_utils as pb_utils
from vllm.config import VllmConfig
from vllm.v1.metrics import buckets
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

Factory = Callable[[VllmConfig, int], StatLoggerBase]

COUNTERS = {
    "prompt_tokens_total": "Prefill tokens processed.",
    "generation_tokens_total": "Generation tokens processed.",
    "num_preemptions_total": "Preemptions by the scheduler.",
}
GAUGES = {
    "num_requests_running": "Requests in the engine's running batch.",
    "num_requests_waiting": "Requests that wait to be scheduled.",
    "gpu_cache_usage_perc": "KV cache in use; 1 is all of it.",
}
LATENCIES = {
    "e2e_request_latency_seconds": ("e2e_latency", "From arrival to the last token."),
    "request_queue_time_seconds": ("queued_time", "Time in the queue."),
    "request_inference_time_seconds": ("inference_time", "Time in prefill and decode."),
    "request_prefill_time_seconds": ("prefill_time", "Time in prefill."),
    "request_decode_time_seconds": ("decode_time", "Time in decode."),
}
"""Histogram → vLLM's field of a finished request, in seconds, and what it is."""

MOST_REPORTS = 100_000
"""How many may wait for Triton, some 15 MB. It falls behind only where it is stuck: there is about one a token."""


class TritonStatLogger(StatLoggerBase):  # type: ignore[misc]  # vllm is not type-checked
    """Receives vLLM's statistics at every engine step and reports them to Triton.

    Each report is a round trip to the server, so a thread makes them while the engine goes on. One that cannot be made
    is dropped: an engine does not end, or fill the memory, for the sake of its statistics.
    """

    def __init__(self, labels: dict[str, str], vllm_config: VllmConfig) -> None:
        self.labels = labels
        self.metrics: dict[str, Any] = {}
        self.gauges: dict[str, float] = {}
        self.reports: queue.Queue[tuple[Callable[[float], None], float]] = queue.Queue(MOST_REPORTS)
        self.dropped = False
        kinds = pb_utils.MetricFamily
        for name, about in COUNTERS.items():
            self._create(name, about, kinds.COUNTER)
        for name, about in GAUGES.items():
            self._create(name, about, kinds.GAUGE)
        tokens = buckets.build_1_2_5_buckets(vllm_config.model_config.max_model_len)
        for name, about, bounds in (
            ("iteration_tokens_total", "Tokens per engine step.", buckets.ITERATION_TOKENS_BUCKETS),
            ("time_to_first_token_seconds", "Time to first token.", buckets.TIME_TO_FIRST_TOKEN_BUCKETS),
            ("time_per_output_token_seconds", "Time between tokens.", buckets.INTER_TOKEN_LATENCY_BUCKETS),
            *((name, about, buckets.REQUEST_LATENCY_BUCKETS) for name, (_, about) in LATENCIES.items()),
            ("request_prompt_tokens", "Prompt tokens per request.", tokens),
            ("request_generation_tokens", "Tokens generated per request.", tokens),
            ("request_params_n", "The parameter n of requests.", buckets.REQUEST_PARAMS_N_BUCKETS),
        ):
            self._create(name, about, kinds.HISTOGRAM, buckets=list(bounds))
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
            self._set("num_requests_running", scheduler_stats.num_running_reqs)
            self._set("num_requests_waiting", scheduler_stats.num_waiting_reqs)
            self._set("gpu_cache_usage_perc", scheduler_stats.kv_cache_usage)
        if iteration_stats:
            self._add("prompt_tokens_total", iteration_stats.num_prompt_tokens)
            self._add("generation_tokens_total", iteration_stats.num_generation_tokens)
            self._add("num_preemptions_total", iteration_stats.num_preempted_reqs)
            step = iteration_stats.prompt_token_stats.computed + iteration_stats.num_generation_tokens
            self._observe("iteration_tokens_total", [step])
            self._observe("time_to_first_token_seconds", iteration_stats.time_to_first_tokens_iter)
            self._observe("time_per_output_token_seconds", iteration_stats.inter_token_latencies_iter)
            self._observe("request_params_n", iteration_stats.n_params_iter)
            for request in iteration_stats.finished_requests:
                for name, (field, _) in LATENCIES.items():
                    self._observe(name, [getattr(request, field)])
                self._observe("request_prompt_tokens", [request.num_prompt_tokens])
                self._observe("request_generation_tokens", [request.num_generation_tokens])

    def log_engine_initialized(self) -> None:
        """Nothing to say: vLLM logs its configuration itself."""

    def _create(self, name: str, about: str, kind: Any, **more: Any) -> None:
        family = pb_utils.MetricFamily(name=f"vllm:{name}", description=about, kind=kind)
        self.metrics[name] = family.Metric(labels=self.labels, **more)
        for thing in (family, self.metrics[name]):
            # Never to be freed: that asks Triton, which does not answer while it unloads the model.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))

    def _set(self, gauge: str, value: float) -> None:
        if self.gauges.get(gauge) != value and self._put(self.metrics[gauge].set, value):
            self.gauges[gauge] = value

    def _add(self, counter: str, value: float) -> None:
        if value:
            self._put(self.metrics[counter].increment, value)

    def _observe(self, histogram: str, values: Iterable[float]) -> None:
        for value in values:
            self._put(self.metrics[histogram].observe, value)

    def _put(self, report: Callable[[float], None], value: float) -> bool:
        """Queue a report; False where it is dropped."""
        try:
            self.reports.put_nowait((report, value))
        except queue.Full:
            self.dropped = True
            return False
        return True

    def _report(self) -> None:
        said = False
        while True:
            report, value = self.reports.get()
            # Said here and not by `_put`, and once: a line in the log is a round trip to Triton, too.
            why = f"more than {MOST_REPORTS} were waiting for Triton" if self.dropped else ""
            try:
                report(value)
            except Exception as error:  # the next one may be taken
                why = repr(error)
            if why and not said:
                pb_utils.Logger.log_warn(f"vLLM's statistics on the metrics page are incomplete: {why}")
                said = True


def stat_logger_factory(labels: dict[str, str]) -> Factory:
    """What AsyncLLM's `stat_loggers` wants: called with vLLM's configuration and the engine's index."""
    return lambda vllm_config, _: TritonStatLogger(labels, vllm_config)
