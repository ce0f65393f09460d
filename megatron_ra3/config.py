"""The settings of mid-training, and those that every kind of run shares; each states its unit and source.

Settings that clash name both keys and the fix, before a single process group or engine is started. Imports neither
torch nor numpy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ra3.presets import ObjectiveConfig
from megatron_ra3.settings import build, read_settings
from megatron_ra3.validation import validate


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How samples are mixed, read and, where damaged, skipped (docs/stream.md)."""

    shuffle_shards: int = 16
    """Shards that are open to one another: samples mix among so many at a time."""
    chunk_samples: int = 64
    """Neighbouring samples of a shard that one request reads."""
    window_samples: int = 8192
    """Samples whose order is drawn at once, from chunks all over those shards; their bytes are held in memory."""
    max_bad_samples: int = 0
    """Samples that may be skipped because they are torn, corrupt or out of reach, over all ranks, counted each time
    one comes up; the next one ends the run."""
    prefetch_samples: int = 2048
    """How far ahead of the current step chunks are read, in samples of all ranks."""
    read_threads: int = 8
    read_timeout_s: float = 60.0
    """Longest silence of a storage that is not local before a read has failed."""
    read_attempts: int = 3
    """Reads of a storage that is not local before it counts as out of reach; the pauses between them double."""
    stall_s: float = 5.0
    """A step that waits longer than this for its samples says for which shard."""
    cache_folder: str = ""
    """Local folder for the shards of a `pipe:` corpus, which the ranks of a machine share; empty: a temporary one for
    each process. Holds up to 2 * `shuffle_shards` + `read_threads` shards."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(StreamConfig):
    """Where the prepared corpus lies (see `ra3 prepare`) and how it is read."""

    folder: str = ""
    """Folder with `manifest.json`, shards and their index: a path, a URL of fsspec (https://, s3://, ...), or
    `pipe:COMMAND` with `{name}` in the place of a file's name."""
    tokenizer: str = ""
    """Folder of a Hugging Face fast tokenizer; empty: `model.folder` if `model.init` is `pretrained`, else
    `<corpus.folder>/tokenizer`. A pretrained model that holds a tokenizer takes no other one."""
    max_snippet_tokens: int = 512
    """Longer snippets are cut after the last whole line that fits; tokens, gates included."""
    verify_checksums: bool = True
    """The first rank compares the sha256 of every file at start; where the folder is a URL, the sizes."""


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """How a latent looks in the token stream (algorithm.md 1, 6)."""

    surface: Literal["newline", "special"] = "newline"
    """`newline`: "\\n" and "\\n#..." as published; `special`: <act>, <think> ... </think>."""
    comments: Literal["observe", "strip", "keep_as_code"] = "observe"
    """What native full-line comments become."""
    max_rationale_tokens: int = 16
    """Sampled tokens per rationale at most, the closing token included; `corpus.max_snippet_tokens` - 2 at most."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to start from."""

    folder: str = ""
    """Hugging Face folder (Qwen2 or Llama family): config.json, safetensors and tokenizer."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: read only config.json; vocab_size follows the tokenizer."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    reward_precision: Literal["auto", "fp32", "bf16", "fp8", "fp8_rescored"] = "auto"
    """Operands of the output layer for the likelihood of lines in the E-step's rewards; `auto` is `dtype`
    (docs/kernels.md)."""
    loss_precision: Literal["auto", "fp32", "bf16", "fp8_rescored"] = "auto"
    """The same for all else: losses, latents, evaluation."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Layout of the trainer ranks; data parallelism is what remains of the world size."""

    tensor: int = 1
    pipeline: int = 1
    distributed_optimizer: bool = False
    micro_batch_tokens: int = 8192
    """Padded tokens per forward pass at most; a single longer trajectory still runs alone."""
    timeout_s: float = 1800.0
    """How long a collective waits for its slowest rank."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, shared by all phases; learning rates belong to the phases."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """Next-token training: the warm-up / NTP phase, and the M-step (algorithm.md 5, 6)."""

    steps: int = 0
    """Optimizer steps of the phase."""
    snippets_per_step: int = 64
    learning_rate: float = 3e-4
    lr_warmup_fraction: float = 0.02
    """Part of the phase over which the learning rate rises linearly; a cosine follows."""
    lr_final_fraction: float = 0.1
    latent_weight: float = 1.0
    """Loss weight of gate and rationale tokens against code tokens."""
    max_tokens: int = 0
    """If positive the phase ends at the first step that reaches this many tokens, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class EStepConfig:
    """Amount of policy gradient and sampling of latents (algorithm.md 3, 4); `objective` says towards what."""

    steps: int = 20
    snippets_per_step: int = 8
    rollouts_per_snippet: int = 8
    learning_rate: float = 1e-4
    window: int = 0
    """Lines scored ahead per gate request; 1: line by line; 0: from the running think rate."""
    max_staleness_steps: int = 0
    """If positive, coming steps are sampled while this one is scored and updated (needs servers): no latent of an
    update is sampled with weights more than so many updates old. 0: every step waits for its own rollouts."""
    lockstep: bool = False
    """Staleness without overlap, for study: every step is sampled exactly `max_staleness_steps` updates before its own
    (the first ones of a phase with the weights at its start), while all wait. Works with any engine."""


@dataclass(frozen=True, kw_only=True)
class EmConfig:
    """Expectation-maximisation (algorithm.md 5)."""

    rounds: int = 2
    restart_from_base: bool = False
    """Begin every M-step from the weights at the start of the run instead of the last ones."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The sampling engine."""

    kind: Literal["auto", "vllm", "inprocess"] = "auto"
    """`vllm`: servers; `inprocess`: the trainer's own weights, for small models; `auto`: vllm where it is installed."""
    urls: tuple[str, ...] = ()
    """Running servers (`ra3 serve`), dealt out to the replicas; empty: every replica starts its own on its machine."""
    per_replica: int = 1
    """Servers that a replica starts, and starts again when they die, where `urls` is empty."""
    host: str = "127.0.0.1"
    port: int = 0
    """0: a free port."""
    model_folder: str = ""
    """`ra3 serve`: the folder to serve; empty: `model.folder`."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_in_flight: int = 64
    """Queries that are open at one engine; more wait in the trainer."""
    request_timeout_s: float = 120.0
    """A query that is not answered in so long is asked elsewhere; an engine that answered none in that time is lost."""
    health_interval_s: float = 5.0
    """An engine with open queries that has answered nothing for so long is asked whether it lives."""
    health_timeout_s: float = 30.0
    """How long it may take to say so."""
    start_timeout_s: float = 300.0
    sync_timeout_s: float = 300.0
    wait_timeout_s: float = 900.0
    """How long the run waits for an engine of a replica that has lost all, before it saves and ends with status 75."""
    max_restarts: int = 5
    """Restarts in a row of a server that dies; one that has served for `start_timeout_s` begins a new row."""
    restart_pause_s: float = 2.0
    """Before the first restart of a row; doubles up to a minute."""
    tensor_parallel: int = 1
    memory_fraction: float = 0.85
    """GPU memory vLLM may take."""
    cpu_kv_cache_bytes: int = 268435456
    block_size: int = 32
    """Tokens per prefix-cache block on CPU, a multiple of 32; GPUs use vLLM's own default."""

    @property
    def resolved_kind(self) -> Literal["vllm", "inprocess"]:
        """`kind` with `auto` decided."""
        if self.kind != "auto":
            return self.kind
        return "vllm" if importlib.util.find_spec("vllm") else "inprocess"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out evaluation after every round."""

    snippets: int = 64
    samples_shown: int = 4
    """Annotated held-out snippets written to samples.jsonl per evaluation."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep (docs/durability.md)."""

    every_steps: int = 50
    asynchronous: bool = True
    """Training waits for a copy of the state only; otherwise until it is on disk."""
    keep_last: int = 2
    keep_every_steps: int = 0
    """If positive: checkpoints of steps that this divides are never removed."""
    stop_after_steps: int = 0
    """If positive: save and leave after this many steps of this process (for time-limited jobs)."""
    wall_clock_limit_s: float = 0.0
    """If positive: save and leave before this process is so old. SLURM_JOB_END_TIME counts too, where it is set."""
    stop_before_s: float = 60.0
    """What to keep free before either end, besides the longest step and the longest save so far."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Metrics always go to metrics.jsonl; the rest is described in docs/observability.md."""

    wandb_project: str = ""
    """Log to wandb too, where it is given (WANDB_MODE=offline works)."""
    wandb_group: str = ""
    """Empty: the group of the run that `model.folder` was exported by, else the name of the run folder."""
    timeline_megabytes: int = 32
    """What each rank keeps in the run folder of what it did and for whom it waited, at most; 0: nothing."""
    engine_metrics: bool = True
    """Ask vLLM servers for their own figures once a step."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """torch.profiler traces of chosen steps, in `profile/` of the run folder."""

    steps: tuple[int, ...] = ()
    """First and last step, as `step` of metrics.jsonl counts them; empty: none. Each costs a file of megabytes."""
    ranks: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class SignatureConfig:
    """When a run's metrics look like a known failure (algorithm.md 7); means must lie beyond by two standard errors."""

    window: int = 20
    """E-step steps that a verdict looks back on; fewer where `estep.steps` is less."""
    max_think_rate: float = 0.8
    min_think_rate: float = 0.01
    max_thinking_loss_nats: float = 0.001
    """How far below 0 the mean advantage of lines with a rationale may lie."""
    max_malformed_rate: float = 0.2
    max_cap_fraction: float = 0.9
    """Mean rationale tokens over `latents.max_rationale_tokens`, where most rationales are malformed."""
    max_forced_act_rate: float = 0.1
    max_mismatch_nats: float = 0.1
    """Mean absolute difference of trainer and engine log-probs per decision."""
    min_effective_samples: float = 0.5
    min_mstep_fall: float = 0.01
    """Least relative fall of the cross-entropy over an M-step."""
    max_heldout_rise: float = 0.01
    """Relative rise of held-out nats from round to round beside a rising reward."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What every kind of run needs: a place, a model, ranks, an optimizer, an engine, checkpoints."""

    run_folder: str = ""
    """Checkpoints, metrics, samples and logs of this run."""
    seed: int = 0
    stall_timeout_s: float = 900.0
    """If positive: where no rank moves for so long, all write their stacks and end with status 76, to be started again
    (docs/durability.md). Keep it below `parallel.timeout_s`, after which a collective fails without telling why."""
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies."""
        return Path(self.model.folder)

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence that the trainer scores or an engine continues."""
        raise NotImplementedError

    @property
    def samples(self) -> bool:
        """Whether an engine is needed."""
        return True

    @property
    def shared_counts(self) -> dict[str, int]:
        """Settings that count what the data-parallel replicas share: none may get nothing."""
        raise NotImplementedError

    def fitting(self, positions: int) -> str:
        """What to change, and why, where the model has only so many positions."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainerConfig):
    """Everything of a mid-training run."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    warmup: NextTokenConfig = field(default_factory=NextTokenConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    estep: EStepConfig = field(default_factory=EStepConfig)
    mstep: NextTokenConfig = field(default_factory=lambda: NextTokenConfig(steps=50))
    em: EmConfig = field(default_factory=EmConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    signatures: SignatureConfig = field(default_factory=SignatureConfig)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies; see `corpus.tokenizer`."""
        if self.corpus.tokenizer:
            return Path(self.corpus.tokenizer)
        if self.model.init == "pretrained":
            return Path(self.model.folder)
        return Path(self.corpus.folder) / "tokenizer"

    @property
    def max_sequence_tokens(self) -> int:
        """Room of a trajectory: a whole snippet, as many tokens again for rationales, and for gates inside lines."""
        return (3 if self.objective.granularity == "token" else 2) * self.corpus.max_snippet_tokens

    @property
    def samples(self) -> bool:
        """Whether an engine is needed: some objectives have no latent to sample."""
        return self.em.rounds > 0 and self.objective.gate != "never"

    @property
    def shared_counts(self) -> dict[str, int]:
        """Settings that count what the data-parallel replicas share: none may get nothing."""
        return {
            "warmup.snippets_per_step": self.warmup.snippets_per_step,
            "estep.snippets_per_step": self.estep.snippets_per_step,
            "mstep.snippets_per_step": self.mstep.snippets_per_step,
            "evaluate.snippets": self.evaluate.snippets,
        }

    def fitting(self, positions: int) -> str:
        """What to change, and why, where the model has only so many positions."""
        longest = self.corpus.max_snippet_tokens
        return (
            f"corpus.max_snippet_tokens={longest}: with rationales a trajectory may take {self.max_sequence_tokens} "
            f"tokens but the model has {positions} positions; lower it to "
            f"{positions * longest // self.max_sequence_tokens}"
        )


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a mid-training run, see `settings.read_settings` and `settings.build`; ValueError: they clash."""
    config = build(RunConfig, read_settings(path, overrides))
    validate(config)
    return config
