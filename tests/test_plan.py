"""`ra3 plan`: counts against numbers worked out by hand and published totals, the search, and the refusals."""

import dataclasses
import json
import math
from itertools import pairwise

import pytest

from megatron_ra3.cli import main
from megatron_ra3.config import load_config
from megatron_ra3.corpus.manifest import Manifest, SplitInfo
from megatron_ra3.launch.forecast import bottlenecks, model_flops
from megatron_ra3.launch.hardware import GIB, GPUS, device
from megatron_ra3.launch.layout import DoesNotFitError, Layout
from megatron_ra3.launch.memory import (
    MicroBatchShape,
    Sharding,
    engine_memory,
    kv_bytes_per_token,
    layer_activation_bytes,
    model_parameters,
    optimizer_bytes_per_parameter,
    stage_parameters,
)
from megatron_ra3.launch.models import MODELS
from megatron_ra3.launch.plan import Question, make_plan
from megatron_ra3.launch.plan_command import WITHOUT_CONFIG
from megatron_ra3.launch.timing import (
    Machine,
    StepTime,
    data_parallel_seconds,
    pipelined,
    prefilled_tokens,
    queries_per_trajectory,
    sync_seconds,
)
from megatron_ra3.launch.workload import Assumptions, workload
from megatron_ra3.model.geometry import Geometry

LARGE_STEPS = (
    "estep.snippets_per_step=128",
    "mstep.snippets_per_step=1024",
    "mstep.steps=50",
    "engine.max_in_flight=256",
)
PARALLEL = {
    "qwen2.5-1.5b": (),
    "qwen2.5-7b": ("parallel.tensor=2",),
    "llama-3.1-8b": ("parallel.tensor=2",),
    "qwen2.5-72b": ("parallel.tensor=8", "parallel.pipeline=2", "engine.tensor_parallel=4"),
    "llama-3.1-70b": ("parallel.tensor=8", "parallel.pipeline=2", "engine.tensor_parallel=4"),
}


def shape(model):
    return Geometry.of(MODELS[model])


def question(model, *overrides, nodes=4, gpu="h100", **more):
    return Question(
        config=load_config(None, [*WITHOUT_CONFIG, *overrides]),
        hf_config=MODELS[model],
        model=model,
        gpu=gpu,
        nodes=nodes,
        gpus_per_node=8,
        **more,
    )


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-72b", 72_706_203_648),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
    ],
)
def test_parameters_are_the_published_totals(model, published):
    assert model_parameters(shape(model)) == published


def test_ranks_hold_the_whole_model_between_them():
    g = shape("llama-3.1-8b")  # 128256 = 8 x 16032 rows, so no padding
    cut = Sharding(tp_size=8, pp_size=4)
    held = 8 * sum(stage_parameters(g, cut, stage, row_multiple=1) for stage in range(4))
    replicated_norms = (8 - 1) * (2 * g.layers + 1) * g.hidden
    assert held == model_parameters(g) + replicated_norms


def test_a_tied_model_over_stages_holds_its_table_twice():
    g = shape("qwen2.5-1.5b")
    cut = Sharding(pp_size=2)
    held = sum(stage_parameters(g, cut, stage, row_multiple=1) for stage in range(2))
    assert held == model_parameters(g) + 151936 * 1536


def test_vocabulary_rows_are_padded_on_every_rank():
    g = shape("qwen2.5-1.5b")  # 151936 rows over 2 ranks: 75968 each, 76032 as a multiple of 128
    padded, exact = (stage_parameters(g, Sharding(tp_size=2), 0, row_multiple=rows) for rows in (128, 1))
    assert padded - exact == 64 * 1536


@pytest.mark.parametrize(
    ("dtype", "sharding", "expected"),
    [
        ("fp32", Sharding(dp_size=4), 8.0),
        ("bf16", Sharding(dp_size=4), 12.0),
        ("bf16", Sharding(dp_size=4, distributed_optimizer=True), 3.0),
        ("fp32", Sharding(dp_size=16, distributed_optimizer=True), 0.5),
    ],
)
def test_optimizer_bytes_per_parameter(dtype, sharding, expected):
    assert optimizer_bytes_per_parameter(dtype, sharding) == expected


@pytest.mark.parametrize(
    ("model", "tp_size", "expected"),
    [
        ("qwen2.5-1.5b", 1, 2 * 28 * 2 * 128 * 2),
        ("qwen2.5-7b", 1, 57344),
        ("qwen2.5-72b", 8, 40960),
        ("llama-3.1-8b", 1, 131072),
        ("llama-3.1-70b", 1, 327680),
        ("qwen2.5-7b", 8, 2 * 28 * 1 * 128 * 2),  # 4 key heads on 8 GPUs: every one is held twice
    ],
)
def test_kv_bytes_per_token(model, tp_size, expected):
    assert kv_bytes_per_token(shape(model), tp_size, "bf16") == expected


def test_activations_of_a_fused_layer_per_token():
    batch = MicroBatchShape(tokens=1000, sequence_tokens=500)
    norms = 2 * (2 * 2 * 3584 + 4) / 2  # two norms, input and output in bf16 and a statistic, over two ranks
    attention = 2 * (14 * 128 + 2 * 2 * 128 + 14 * 128) + 4 * 14  # q, k and v, context, a sum per head
    feed_forward = 2 * 3 * 9472
    expected = 1000 * (norms + attention + feed_forward)
    assert layer_activation_bytes(shape("qwen2.5-7b"), 2, "bf16", batch, fused=True) == expected


def test_an_engines_cache_is_what_weights_leave():
    found = engine_memory(shape("qwen2.5-7b"), 1, "bf16", memory_bytes=60 * GIB, trajectory_tokens=1000.0)
    assert found.weights == 2 * 7_615_616_512
    assert found.kv_cache == 60 * GIB - 2 * 7_615_616_512 - 4 * GIB
    assert found.sequences == int(found.kv_cache // (57344 * 1000))


def test_ranks_lie_as_megatron_numbers_them():
    layout = Layout(gpus_per_node=4, trainer_gpus=8, engine_gpus=4, tp_size=2, pp_size=2, engine_tp_size=2)
    assert [layout.coordinates(rank) for rank in range(8)] == [
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)
    ]  # fmt: skip
    assert list(layout.describe()) == [
        "node 0: ranks 0-3: tp 0-1 dp 0-1 pp 0",
        "node 1: ranks 4-7: tp 0-1 dp 0-1 pp 1",
        "node 2: engines 0-1 (TP2)",
    ]
    assert (layout.dp_size, layout.engines, layout.trainer_nodes, layout.engine_nodes) == (2, 2, 2, 1)


def test_a_tensor_parallel_group_that_leaves_its_node_is_named():
    assert not list(Layout(gpus_per_node=8, trainer_gpus=16, engine_gpus=0, tp_size=8).warnings())
    (warning,) = Layout(gpus_per_node=4, trainer_gpus=8, engine_gpus=0, tp_size=8).warnings()
    assert warning.startswith("parallel.tensor=8 leaves its node of 4 GPUs")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"trainer_gpus": 8, "tp_size": 3}, "8 trainer GPUs cannot be split into replicas of parallel.tensor=3"),
        ({"trainer_gpus": 16, "engine_gpus": 8}, "8 engines for 16 data-parallel replicas, and each needs one: give 2"),
        ({"trainer_gpus": 8, "engine_gpus": 8, "engine_tp_size": 3}, "engine.tensor_parallel=3 does not divide"),
    ],
)
def test_uneven_layouts_are_refused(layout, message):
    with pytest.raises(DoesNotFitError, match=message):
        Layout(**{"gpus_per_node": 8, "engine_gpus": 0} | layout).check()


def test_collectives_take_the_slowest_link_they_cross():
    gpu = device(GPUS["h100"], "bf16")

    def machine(gpus_per_node, tp_size):
        layout = Layout(gpus_per_node=gpus_per_node, trainer_gpus=16, engine_gpus=0, tp_size=tp_size)
        return Machine(device=gpu, layout=layout, dtype="bf16")

    assert machine(16, 2).data_bytes_per_s == 0.8 * 450e9
    assert machine(8, 8).data_bytes_per_s == 0.8 * 50e9  # one rank of the group on a node
    assert machine(8, 2).data_bytes_per_s == 0.8 * 200e9  # four
    assert machine(4, 8).tensor_bytes_per_s == 0.8 * 50e9


def test_gradients_and_weights_move_what_they_weigh():
    g = shape("llama-3.1-8b")
    layout = Layout(gpus_per_node=8, trainer_gpus=16, engine_gpus=16, tp_size=8)
    machine = Machine(device=device(GPUS["h100"], "bf16"), layout=layout, dtype="bf16")
    held = stage_parameters(g, Sharding(tp_size=8, dp_size=2), 0, row_multiple=128)
    assert data_parallel_seconds(g, machine) == pytest.approx(2 * 4 * held / 2 / 40e9)
    sharded = dataclasses.replace(machine, distributed_optimizer=True)
    assert data_parallel_seconds(g, sharded) == pytest.approx((4 + 2) * held / 2 / 40e9)
    weights = 2 * 8_030_261_248
    assert sync_seconds(g, machine) == pytest.approx(0.1 + weights / 40e9 + weights / 360e9)


def test_a_pipeline_waits_for_its_slowest_stage():
    stage = StepTime(layers=1.0)
    assert pipelined(stage, 0.0, 6, 4).bubble == 3.0  # (pp - 1) stages
    whole = pipelined(stage, 0.5, 6, 4)
    assert whole.total == pytest.approx(5 * 1.5 + 4 * 1.0 + 0.5)
    assert whole.head == 3.0


def test_a_corpus_tells_how_long_its_snippets_are():
    train = SplitInfo(
        files=1, repos=1, snippets=10, lines=300, native_comments=0, chars=14000, tokens=3900, shards=()
    )  # fmt: skip
    manifest = Manifest(2, {}, 1, 1, {}, {}, {}, {}, {}, None, {"train": train})
    config = load_config(None, [*WITHOUT_CONFIG, "latents.max_rationale_tokens=20"])
    work = workload(config, Assumptions(think_rate=0.1), manifest)
    assert (work.snippet_tokens, work.actions) == (420.0, 30.0)  # 390 tokens of code and a gate per line
    assert work.trajectory_tokens == pytest.approx(420.0 + 30 * 0.1 * 10)
    assert work.micro_batches(40) == (3, pytest.approx(40 * 450 / 3))  # 18 sequences of 450 tokens fit in 8192
    no_tokens = dataclasses.replace(manifest, splits={"train": dataclasses.replace(train, tokens=None)})
    assert workload(config, Assumptions(), no_tokens).snippet_tokens == 14000 / 3.5 / 10 + 30
    short = load_config(None, [*WITHOUT_CONFIG, "corpus.max_snippet_tokens=210"])
    cut = workload(short, Assumptions(), manifest)
    assert (cut.snippet_tokens, cut.actions) == (210.0, 15.0)


@pytest.mark.parametrize(
    ("think_rate", "requests", "prefilled"), [(0.05, 3.90, 351), (0.2, 13.7, 856), (0.5, 30.9, 1414)]
)
def test_sampling_asks_about_as_often_as_was_measured(think_rate, requests, prefilled):
    # 8 snippets x 8 rollouts of 30 lines of 14 tokens with vLLM on a CPU, cache blocks of 32 tokens; per rollout
    config = load_config(None, [*WITHOUT_CONFIG, "corpus.max_snippet_tokens=420", "latents.max_rationale_tokens=16"])
    work = workload(config, Assumptions(think_rate=think_rate, line_tokens=14), None)
    assert queries_per_trajectory(work) + work.thinks == pytest.approx(requests, rel=0.1)
    coarser_blocks = (queries_per_trajectory(work) - 1) * (32 - 16) / 2
    assert prefilled_tokens(work, 8) + coarser_blocks == pytest.approx(prefilled, rel=0.4)


@pytest.mark.parametrize("model", MODELS)
def test_training_steps_reach_about_the_published_utilisation(model):
    plan = make_plan(question(model, *LARGE_STEPS, *PARALLEL[model], nodes=8))
    assert 0.38 < plan.utilisation < 0.52  # Megatron-LM's README: 41 to 48 % on H100s
    flops = model_flops(plan.geometry, plan.work.trajectory_tokens) / 6
    assert flops == pytest.approx(plan.parameters, rel=0.17)  # 6 flops per parameter and token, but for the embedding


def test_more_nodes_are_never_slower_and_more_memory_never_smaller():
    rounds = [make_plan(question("qwen2.5-7b", *LARGE_STEPS, "parallel.tensor=2", nodes=n)) for n in range(1, 12)]
    assert all(few.chosen.times.seconds >= many.chosen.times.seconds for few, many in pairwise(rounds))
    assert rounds[0].chosen.times.seconds > 4 * rounds[-1].chosen.times.seconds
    h100, h200 = (make_plan(question("qwen2.5-7b", "parallel.tensor=2", gpu=gpu)).chosen for gpu in ("h100", "h200"))
    assert h200.engine.sequences > 2 * h100.engine.sequences
    assert h200.times.seconds < h100.times.seconds


def test_the_split_is_the_best_of_all_and_every_replica_has_an_engine():
    plan = make_plan(question("qwen2.5-7b", *LARGE_STEPS, "parallel.tensor=2"))
    assert plan.chosen.times.seconds == min(split.times.seconds for split in plan.splits)
    assert {split.layout.engine_gpus for split in plan.splits} == {8, 16, 24}
    assert all(split.layout.engines >= split.layout.dp_size for split in plan.splits)
    forced = make_plan(question("qwen2.5-7b", *LARGE_STEPS, "parallel.tensor=2", engine_nodes=1))
    assert forced.chosen.layout.engine_nodes == 1
    assert forced.chosen.times.seconds > plan.chosen.times.seconds


def test_steps_too_small_for_the_nodes_leave_nodes_unused():
    plan = make_plan(question("qwen2.5-1.5b", "mstep.steps=10", nodes=8))  # 8 snippets per E-step step
    assert plan.chosen.layout.dp_size == 8
    assert plan.chosen.layout.nodes < 8
    assert any("nodes stay unused" in warning for warning in plan.warnings)


def test_overlap_hides_the_shorter_of_sampling_and_training():
    both = [
        make_plan(question("qwen2.5-7b", *LARGE_STEPS, "parallel.tensor=2", *staleness, engine_nodes=2))
        for staleness in ((), ("engine.kind=vllm", "estep.max_staleness_steps=1"))
    ]
    synchronous, asynchronous = (plan.chosen.times.estep for plan in both)
    assert synchronous.seconds == pytest.approx(
        synchronous.sync + synchronous.sampling.seconds + synchronous.trainer, rel=1e-9
    )
    assert asynchronous.seconds == asynchronous.sync + max(asynchronous.sampling.seconds, asynchronous.trainer)
    hidden = {share.name for share in both[1].shares}
    assert not any(name.startswith("E-step sampling") for name in hidden)


def test_the_parts_of_a_round_add_up_to_it():
    plan = make_plan(question("llama-3.1-8b", *LARGE_STEPS, "parallel.tensor=2"))
    named = sum(share.seconds for share in plan.shares)
    assert named + plan.chosen.times.evaluation == pytest.approx(plan.chosen.times.seconds)
    assert plan.shares == sorted(plan.shares, key=lambda share: -share.seconds)
    tokens = 50 * plan.work.mstep_tokens
    gpus = plan.chosen.layout.nodes * 8
    assert plan.cost.gpu_hours == pytest.approx(plan.chosen.times.seconds * gpus / 3600 / tokens * 1e9)


def test_few_requests_in_flight_are_found_to_be_the_bottleneck():
    plan = make_plan(question("qwen2.5-7b", *LARGE_STEPS, "parallel.tensor=2", "engine.max_in_flight=2"))
    first = bottlenecks(plan.chosen.times, plan.work, plan.chosen.sampler)[0]
    assert first.name == "bootstrap sampling: decoding"
    assert first.fix.startswith("raise engine.max_in_flight from 2 to ")


@pytest.mark.parametrize(
    ("model", "overrides", "more", "message"),
    [
        (
            "llama-3.1-70b",
            (),
            {},
            r"needs [\d.]+ GiB, [\d.]+ more than the 79.1 it has. No settings fit on 4 nodes; 8 ",
        ),
        ("qwen2.5-7b", ("parallel.distributed_optimizer=false",), {"nodes": 2}, r"these nodes: parallel\.tensor=\d"),
        ("llama-3.1-70b", PARALLEL["llama-3.1-70b"][:2], {"nodes": 8}, r"an engine GPU has .* too little: 131.4 GiB"),
        ("qwen2.5-7b", ("parallel.tensor=8",), {}, "tp=8 does not divide num_attention_heads=28"),
        ("qwen2.5-7b", ("engine.tensor_parallel=8",), {}, "does not divide the 28 attention heads"),
        ("qwen2.5-7b", ("engine.kind=inprocess",), {}, "engine.kind=inprocess"),
        ("qwen2.5-7b", (), {"engine_nodes": 0}, "needs engines"),
        ("qwen2.5-7b", (), {"nodes": 1, "engine_nodes": 1}, "cut by GPUs"),
        ("qwen2.5-7b", (), {"nodes": 2, "engine_nodes": 2}, "need a trainer node too"),
        ("qwen2.5-7b", ("corpus.max_snippet_tokens=100000",), {}, "131072 positions"),
    ],
)
def test_what_cannot_run_is_refused_with_the_remedy(model, overrides, more, message):
    with pytest.raises(ValueError, match=message):
        make_plan(question(model, *overrides, **more))


def test_the_remedy_of_a_refusal_fits():
    with pytest.raises(DoesNotFitError) as refusal:
        make_plan(question("qwen2.5-7b", *LARGE_STEPS, "parallel.distributed_optimizer=false", nodes=2))
    _, _, remedy = str(refusal.value).partition("What would fit on these nodes: ")
    changed = ["parallel.distributed_optimizer=false", *remedy.split()]
    plan = make_plan(question("qwen2.5-7b", *LARGE_STEPS, *changed, nodes=2))
    assert plan.chosen.trainer.total <= GPUS["h100"].memory_bytes


def test_an_objective_without_latents_needs_no_engines():
    plan = make_plan(question("qwen2.5-7b", "objective.preset=ntp", "parallel.tensor=2", "mstep.steps=5"))
    assert plan.chosen.layout.engine_gpus == 0
    assert plan.chosen.times.estep is None
    assert math.isclose(plan.chosen.times.seconds, plan.chosen.times.mstep_seconds + plan.chosen.times.evaluation)


def test_the_command_plans_from_a_config_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["qwen2.5-1.5b"]))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run_folder: r\ncorpus: {{folder: c}}\nmodel: {{folder: {tmp_path}, dtype: bf16}}\nengine: {{kind: vllm}}\n"
        "mstep: {steps: 10}\n"
    )
    command = ["plan", str(path), "--gpu-hour-price", "2", "estep.steps=5"]
    assert main(command) == 0
    page = capsys.readouterr().out
    assert "1.54 billion parameters" in page
    assert "bottleneck" in page
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 1_543_714_304
    assert found["batch"]["estep_steps"] == 5
    assert found["per_billion_mstep_tokens"]["money"] == 2 * found["per_billion_mstep_tokens"]["gpu_hours"]
    assert main(["plan", "--model", "llama-3.1-70b", "parallel.tensor=8"]) == 2
    assert "DoesNotFit" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(path), "--nodes", "1", "nonsense"])
    assert "unrecognized arguments: nonsense" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "--model" in capsys.readouterr().err
