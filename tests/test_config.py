"""Configuration errors name the key, the value and the fix."""

from pathlib import Path

import pytest

from megatron_ra3.config import RunConfig, load_config
from megatron_ra3.settings import known_keys

NEEDED = ["run_folder=r", "corpus.folder=c", "model.folder=m", "engine.kind=inprocess"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.penalti=1", "unknown config key 'objective.penalti'; did you mean 'objective.penalty'"),
        ("penalty=1", "did you mean 'objective.penalty'"),
        ("objective.penalty=-0.1", "objective.penalty=-0.1: must not be negative"),
        ("latents.max_rationale_tokens=0", "latents.max_rationale_tokens=0: must be positive"),
        ("engine.top_p=0.9", "set engine.top_p=1.0"),
        ("engine.top_k=50", "set engine.top_k=0"),
        ("engine.repetition_penalty=1.1", "set engine.repetition_penalty=1.0"),
        ("engine.temperature=0.7", "set engine.temperature=1.0"),
        ("estep.rollouts_per_snippet=1", "needs at least 2"),
        ("objective.gate_exploration=1", "objective.gate_exploration=1.0: must be below 1"),
        ("objective={gate: never, line_gradient: 1.0}", "set objective.line_gradient=0"),
        ("objective.discount=1.5", "must lie between 0 and 1"),
        ("latents.surface=comment", "must be one of"),
        ("latents.comments=keep_as_code", "set latents.surface=special"),
        ("engine.urls=[http://a]", "engine.kind=inprocess uses no server here"),
        ("estep.max_staleness_steps=1", "engine.kind=inprocess, which here is inprocess: .* cannot overlap; set"),
        ("estep.max_staleness_steps=-1", "must not be negative"),
        ("estep.lockstep=true", "no staleness to emulate"),
        ("engine.block_size=16", "multiple of 32"),
        ("engine={kind: vllm, urls: [http://a], per_replica: 2}", "set engine.per_replica=1"),
        ("engine.max_restarts=-1", "engine.max_restarts=-1: must not be negative"),
        ("engine.health_timeout_s=0", "engine.health_timeout_s=0.0: must be positive"),
        ("seed=true", "must be of type int"),
        ("estep.learning_rate=fast", "must be a number"),
        ("estep=3", "is a section with keys of its own"),
        ("seed.x=3", "unknown|is a value|must be of type"),
        ("latents.max_rationale_tokens=511", "room for 510 at corpus.max_snippet_tokens=512; lower the former"),
        ("corpus.max_snippet_tokens=17", "latents.max_rationale_tokens=16: a trajectory has room for 15"),
        ("optimizer.beta1=1", "optimizer.beta1=1.0: must be at least 0 and below 1"),
        ("optimizer.beta2=-0.1", "optimizer.beta2=-0.1: must be at least 0 and below 1"),
        ("objective.penalty", "write it as key=value"),
        ("engine.urls=[a", r"override 'engine.urls=\[a', line 1, column 3: is not valid YAML: expected ',' or '\]'"),
        ("run_folder=2024-13-01", "override 'run_folder=2024-13-01': is not valid YAML: month must be in 1..12"),
        ("logging.timeline_megabytes=-1", "logging.timeline_megabytes=-1: must not be negative"),
        ("profile.steps=[3]", r"profile.steps=\[3\]: write it as \[FIRST, LAST\]"),
        ("profile.steps=[0,2]", "steps from 1 on"),
        ("profile.steps=[3,2]", "steps from 1 on"),
        ("profile={steps: [1, 2], ranks: []}", r"profile.ranks=\[\]: name ranks from 0 on"),
        ("corpus.folder=", "must be of type str"),
        ("run_folder=''", "run_folder is empty"),
    ],
)
def test_bad_setting_is_refused_with_its_name_and_the_fix(override: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_config(None, [*NEEDED, override])


def test_file_and_overrides_are_merged_and_typed(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "run_folder: r\ncorpus: {folder: c}\nmodel: {folder: m}\nestep: {learning_rate: 1e-4}\n"
        "objective: {penalty: 0}\n"
    )
    config = load_config(path, ["objective.penalty=0.2", "engine.kind=vllm", "engine.urls=[http://a:1, http://b:2]"])
    assert config.estep.learning_rate == 1e-4
    assert config.objective.penalty == 0.2
    assert config.engine.urls == ("http://a:1", "http://b:2")
    assert config.mstep.steps == 50


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("gate_exploration=0.1", "ppo_clip=0.2"), "clip and mask would drop what was explored"),
        (("gate_exploration=0.1", "importance_weight=mask"), "clip and mask would drop what was explored"),
        (("ppo_clip=0.2", "importance_weight=mask"), "objective.ppo_clip=0.2 takes its place"),
    ],
)
def test_terms_that_undo_one_another_are_refused(overrides: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        load_config(None, [*NEEDED, *(f"objective.{item}" for item in overrides)])


def test_one_rollout_does_not_explore():
    settings = ("objective.baseline=counterfactual", "estep.rollouts_per_snippet=1")
    assert load_config(None, [*NEEDED, *settings]).estep.rollouts_per_snippet == 1
    with pytest.raises(ValueError, match=r"raise estep\.rollouts_per_snippet"):
        load_config(None, [*NEEDED, *settings, "objective.gate_exploration=0.1"])


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [((), "m"), (("model.init=random",), "c/tokenizer"), (("corpus.tokenizer=t",), "t")],
)
def test_the_tokenizer_comes_from_the_model_unless_weights_are_random(overrides: tuple[str, ...], folder: str):
    assert load_config(None, [*NEEDED, *overrides]).tokenizer_folder == Path(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\nestep:\n\tpenalty: 0\n", r"run\.yaml, line 3, column 1: is not valid YAML: .*'\\t'"),
        (
            b"seed: 1\nrun_folder: \xff\n",
            r"run\.yaml: is not valid YAML: unacceptable character #x00ff: .* position 20",
        ),
        (b"- seed\n", r"run\.yaml: must be a mapping of sections, got list"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "run.yaml", NEEDED)


def test_bounds_themselves_are_allowed():
    config = load_config(None, [*NEEDED, "latents.max_rationale_tokens=510", "optimizer.beta1=0"])
    assert (config.latents.max_rationale_tokens, config.optimizer.beta1) == (510, 0.0)
    assert config.corpus.verify_checksums


def test_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_every_key_is_reachable_and_unique():
    keys = list(known_keys(RunConfig))
    assert len(keys) == len(set(keys))
    assert {"objective.penalty", "mstep.learning_rate", "engine.request_timeout_s", "run_folder"} <= set(keys)
