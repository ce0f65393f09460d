"""vLLM's own figures: read from what a server says, grown between two looks, never in the way; where they are."""

import json
import threading

import pytest

from megatron_ra3.observe.engine_figures import Figures, Reading, Scraper, Targets, growth, merged, parse_reading

SAID = """\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 1.0e+04
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m, {odd}"} 3.0
vllm:num_requests_running{engine="1",model_name="m, {odd}"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 77.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0
# TYPE vllm:prefix_cache_queries_created gauge
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.79e+09
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 600.0
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 4.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 5000.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="m"} 0.0
"""


def test_the_chosen_figures_are_read_and_engines_of_one_server_summed():
    assert parse_reading(SAID) == Reading(
        running=5,
        waiting=1,
        kv_cache_usage=0.5,
        prefix_queries=1000,
        prefix_hits=600,
        generated_tokens=5000,
        preemptions=4,
    )
    with pytest.raises(ValueError, match="no figure of vLLM in 17 characters"):
        parse_reading("<html>404</html>\n")


def test_counters_count_what_was_done_since_also_by_a_server_started_anew():
    before = Reading(generated_tokens=100, preemptions=2)
    found = growth(before, Reading(running=7, generated_tokens=300, preemptions=2), 4.0)
    assert (found.reading.generated_tokens, found.reading.preemptions, found.reading.running) == (200, 0, 7)
    assert found.tokens_per_second == 50
    assert growth(before, Reading(generated_tokens=30), 3.0).tokens_per_second == 10
    assert growth(None, Reading(generated_tokens=30, running=2), 0.0).tokens_per_second == 0


def test_all_engines_make_one_set_of_metrics():
    busy = Reading(3, 0, 0.2, prefix_queries=100, prefix_hits=10, generated_tokens=50, preemptions=1)
    idle = Reading(waiting=2, kv_cache_usage=0.9, prefix_queries=300, prefix_hits=290)
    assert merged([Figures(busy, 5.0), Figures(idle, 5.0)], failed=1) == {
        "engine_scrapes_failed": 1,
        "engine_running": 3,
        "engine_waiting": 2,
        "engine_kv_cache_usage": 0.9,
        "engine_tokens_per_second": 10,
        "engine_preemptions": 1,
        "engine_prefix_hit_rate": 0.75,
    }
    assert "engine_prefix_hit_rate" not in merged([Figures(Reading(), 1.0)], failed=0)
    assert merged([], failed=0) == {}


def test_engines_are_asked_once_a_step_and_a_silent_one_is_counted():
    asked: list[str] = []
    looked = threading.Semaphore(0)

    def fetch(url: str) -> str:
        asked.append(url)
        if url == "http://c":
            looked.release()
            raise ConnectionRefusedError(url)
        return SAID if url == "http://a" else "nonsense"

    scraper = Scraper(lambda: ["http://a", "http://b", "http://c"], fetch, delay_s=0.0)
    try:
        for _ in range(2):
            for _ in range(3):
                scraper.ask()
            assert looked.acquire(timeout=10)
            deadline = threading.Event()
            taken = ([], 0)
            while taken[1] < 2:
                found, failed = scraper.take()
                taken = (taken[0] + found, taken[1] + failed)
                deadline.wait(0.01)
            assert [figures.reading.running for figures in taken[0]] == [5]
            assert taken[1] == 2
    finally:
        scraper.close()
    assert asked == ["http://a", "http://b", "http://c"] * 2


def test_prometheus_finds_engines_where_they_are_now(tmp_path, capsys):
    targets = Targets(tmp_path / "run", 3)
    (tmp_path / "run").write_text("in the way")
    targets.tell(["http://n1:80"])
    targets.tell(["http://n1:80"])
    assert capsys.readouterr().out.count("cannot be written") == 1
    (tmp_path / "run").unlink()
    targets.tell(["http://n1:80"])
    targets.tell(["http://n1:81", "http://n2:82"])
    (path,) = (tmp_path / "run" / "prometheus").iterdir()
    assert path.name == "replica-00003.json"
    assert json.loads(path.read_text()) == [
        {"targets": ["n1:81", "n2:82"], "labels": {"ra3_run": "run", "ra3_replica": "3"}}
    ]
