"""Configuration errors name the key, the value and the fix."""

from pathlib import Path

import pytest

from megatron_ra3.config import RunConfig, known_keys, load_config

NEEDED = ["run_folder=r", "corpus.folder=c", "model.folder=m"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("estep.penalti=1", "unknown config key 'estep.penalti'; did you mean 'estep.penalty'"),
        ("penalty=1", "did you mean 'estep.penalty'"),
        ("estep.penalty=-0.1", "estep.penalty=-0.1: must not be negative"),
        ("latents.max_rationale_tokens=0", "latents.max_rationale_tokens=0: must be positive"),
        ("engine.top_p=0.9", "set engine.top_p=1.0"),
        ("engine.top_k=50", "set engine.top_k=0"),
        ("engine.repetition_penalty=1.1", "set engine.repetition_penalty=1.0"),
        ("engine.temperature=0.7", "set engine.temperature=1.0"),
        ("estep.rollouts_per_snippet=1", "needs at least 2"),
        ("estep.discount=1.5", "must lie between 0 and 1"),
        ("latents.surface=comment", "must be one of"),
        ("latents.comments=keep_as_code", "set latents.surface=special"),
        ("engine.urls=[http://a]", "set engine.kind=vllm"),
        ("engine.block_size=16", "multiple of 32"),
        ("seed=true", "must be of type int"),
        ("estep.learning_rate=fast", "must be a number"),
        ("estep=3", "is a section with keys of its own"),
        ("seed.x=3", "unknown|is a value|must be of type"),
        ("estep.penalty", "write it as key=value"),
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
        "run_folder: r\ncorpus: {folder: c}\nmodel: {folder: m}\nestep: {learning_rate: 1e-4, penalty: 0}\n"
    )
    config = load_config(path, ["estep.penalty=0.2", "engine.kind=vllm", "engine.urls=[http://a:1, http://b:2]"])
    assert config.estep.learning_rate == 1e-4
    assert config.estep.penalty == 0.2
    assert config.engine.urls == ("http://a:1", "http://b:2")
    assert config.mstep.steps == 50
    assert config.tokenizer_folder == Path("c/tokenizer")


def test_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_every_key_is_reachable_and_unique():
    keys = list(known_keys(RunConfig))
    assert len(keys) == len(set(keys))
    assert {"estep.penalty", "mstep.learning_rate", "engine.request_timeout_s", "run_folder"} <= set(keys)
