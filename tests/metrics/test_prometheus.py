"""The Prometheus exporter: names, values, labels, as a scraper reads them."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from quire.core.stats import ENGINE_STATS, QuarantinedPlugin, RequestStats
from quire.plugins.metrics.prometheus import PrometheusExporter

OLD_AND_NEW = (
    *("num_requests_running", "num_requests_waiting", "num_requests_swapped", "num_preemptions_total"),
    *("gpu_cache_usage_perc", "kv_cache_usage_perc", "cpu_prefix_cache_hit_rate", "gpu_prefix_cache_hit_rate"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total"),
    *("time_to_first_token_seconds_bucket", "time_per_output_token_seconds_bucket", "request_success_total"),
    *("inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_bucket", "request_queue_time_seconds_bucket"),
)


def scraped(exporter: PrometheusExporter) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    rendered = exporter.render()
    assert rendered is not None
    kind, body = rendered
    assert kind.startswith("text/plain")
    families = text_string_to_metric_families(body.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def request(reason: str = "stop") -> RequestStats:
    return RequestStats(reason, 10, 4, 5, e2e_s=1.5, queue_s=0.02, ttft_s=0.1, mean_tpot_s=0.35)


@pytest.fixture
def exporter() -> PrometheusExporter:
    return PrometheusExporter({"model_name": "m"})


@pytest.mark.parametrize("prefix", ["quire:", "vllm:"])
def test_every_promised_name_is_there_from_the_start(exporter: PrometheusExporter, prefix: str) -> None:
    names = {name for name, _ in scraped(exporter)}
    labelled = {
        "plugin_quarantines_total",
        "step_failures_total",
    }  # no plugin, no labels: its help and type alone are there
    assert {prefix + name for name in {*OLD_AND_NEW, *ENGINE_STATS} - labelled} <= names
    rendered = exporter.render()
    assert rendered is not None
    assert all(f"# TYPE {prefix}{name} counter\n" in rendered[1].decode() for name in labelled)


def test_values(exporter: PrometheusExporter) -> None:
    exporter.record_engine({"num_requests_running": 3, "kv_cache_usage_perc": 0.5, "num_preemptions_total": 2})
    exporter.record_engine({"prefix_cache_queries_total": 100, "prefix_cache_hits_total": 25})
    exporter.record_tokens(10, 1, 0.1, [])
    exporter.record_tokens(0, 2, None, [0.02, 0.4])
    exporter.record_request(request())
    found = scraped(exporter)
    model = (("model_name", "m"),)
    for prefix in ("quire:", "vllm:"):
        expected = {
            "num_requests_running": 3,
            "kv_cache_usage_perc": 0.5,
            "gpu_cache_usage_perc": 0.5,
            "num_preemptions_total": 2,
            "gpu_prefix_cache_hit_rate": 0.25,
            "prompt_tokens_total": 10,
            "generation_tokens_total": 3,
            "time_to_first_token_seconds_sum": 0.1,
            "inter_token_latency_seconds_count": 2,
            "inter_token_latency_seconds_sum": 0.42,
            "e2e_request_latency_seconds_sum": 1.5,
            "request_prompt_tokens_sum": 10,
        }
        assert {name: found[prefix + name, model] for name in expected} == pytest.approx(expected)
        assert found[f"{prefix}request_success_total", (("finished_reason", "stop"), *model)] == 1
        assert found[f"{prefix}request_success_total", (("finished_reason", "abort"), *model)] == 0


def test_buckets_are_cumulative_and_bounds_are_inclusive(exporter: PrometheusExporter) -> None:
    for value in (0.001, 0.0011, 50.0, 1000.0):
        exporter.record_tokens(0, 1, value, [])
    found = scraped(exporter)
    name = "vllm:time_to_first_token_seconds_bucket"
    assert found[name, (("le", "0.001"), ("model_name", "m"))] == 1
    assert found[name, (("le", "0.002"), ("model_name", "m"))] == 2
    assert found[name, (("le", "80.0"), ("model_name", "m"))] == 3
    assert found[name, (("le", "+Inf"), ("model_name", "m"))] == 4
    counts = [value for (n, labels), value in found.items() if n == name]
    assert counts == sorted(counts)


def test_figures_of_tomorrow_pass_through(exporter: PrometheusExporter) -> None:
    exporter.record_engine({"a_new_gauge": 4.0, "a_new_counter_total": 5.0})
    exporter.record_request(request("a_new_reason"))
    found = scraped(exporter)
    assert found["quire:a_new_gauge", (("model_name", "m"),)] == 4
    assert found["vllm:a_new_counter_total", (("model_name", "m"),)] == 5


def test_drafts_are_counted_by_their_place(exporter: PrometheusExporter) -> None:
    exporter.record_engine({"spec_decode_num_draft_tokens_total": 5.0, "spec_decode_accepted_at_1_total": 3.0})
    found = scraped(exporter)
    assert found["vllm:spec_decode_num_draft_tokens_total", (("model_name", "m"),)] == 5
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert found[name, (("model_name", "m"), ("position", "1"))] == 3


def test_quarantines_have_labels_and_no_total_beside_them(exporter: PrometheusExporter) -> None:
    exporter.record_engine({"plugin_quarantines_total": 2.0})
    exporter.record_quarantine(QuarantinedPlugin("policy", "mine", "too_slow"))
    exporter.record_quarantine(QuarantinedPlugin("spec_decode", "ngram", "raised"))
    found = {labels: value for (name, labels), value in scraped(exporter).items() if "plugin_quarantines_total" in name}
    policy = (("kind", "policy"), ("model_name", "m"), ("name", "mine"), ("reason", "too_slow"))
    assert found[policy] == 1 and sum(found.values()) == 2


def test_labels_are_escaped() -> None:
    exporter = PrometheusExporter({"model_name": 'a"b\\c\nd', "replica": "1"})
    exporter.record_request(request())
    labels = {labels for name, labels in scraped(exporter) if name == "quire:num_requests_running"}
    assert labels == {(("model_name", 'a"b\\c\nd'), ("replica", "1"))}
