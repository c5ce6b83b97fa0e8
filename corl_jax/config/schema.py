"""Every knob of a run: typed, bounded and documented. `config.files` reads, checks and writes it.
What options mean to each other stands in `config.checks`.

Sources in the field texts: [P] the paper (arXiv 2505.17534), [R] its released script.
"""

from __future__ import annotations

import typing
from typing import Annotated, Literal

from pydantic import Field, model_validator

from corl_jax.config import checks
from corl_jax.config.fields import (
    Axis,
    CodePath,
    ConfigPath,
    ConfigPaths,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    RewardOptions,
    Section,
    option,
)

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = "language_model/layers/.*/lora_[ab]"
"""Regex of the adapters' paths."""


class Model(Section):
    """The policy: where its weights are and how it computes."""

    path: ConfigPath = Field(
        description="directory in any layout, or hub id: owner/name[@revision]"
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "bfloat16", "compute dtype; parameters and optimizer stay float32"
    )
    remat: Literal["none", "dots", "full"] = option(
        "full", "what the backward pass keeps of each layer: all, products, input"
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = option(
        "auto", "of the update; auto: cudnn or splash where one runs, or else xla"
    )
    logprob_chunk: Positive = option(
        1024, "tokens whose logits exist at once in a loss; bounds memory"
    )


class Columns(Section):
    """Names of the dataset's columns; the defaults are the published layout's."""

    prompt: str = "prompt"
    real_image: str = "real_image"
    qa_problem: str = "qa_problem"
    qa_solution: str = "qa_solution"
    qa_type: str = "qa_type"


class Data(Section):
    """Rows and the prompts made of them."""

    path: ConfigPaths = Field(description="parquet file, directory, glob, list, or hub id")
    columns: Columns = Columns()
    max_prompt_length: Positive = option(
        1024, "tokens of an encoded prompt; longer rows are left out [P, R]"
    )
    max_bad_fraction: Fraction = option(0.01, "undecodable rows before the run stops")
    cache_rows: NonNegative = option(
        0, "decoded rows kept in memory; for small data read many times"
    )
    prefetch: NonNegative = option(2, "batches prepared ahead by a thread")
    system_prompt: str = option("", "system text of understanding prompts; CoRL: none")


class Rollout(Section):
    """Sampling of the completions that are rewarded."""

    group_size: Annotated[int, Field(ge=2)] = option(8, "completions per prompt, G [P]")
    temperature: PositiveFloat = option(1.0, "of both tasks, also in log-probs")
    top_k: NonNegative = option(0, "text only; 0 keeps the whole vocabulary")
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    cfg_scale: NonNegativeFloat = option(5.0, "image guidance; 1 is none [P]")
    max_new_tokens: Positive = option(512, "text tokens of a completion [P]")
    pixel_dtype: Literal["float32", "bfloat16"] = option("float32", "of rewarded images")
    batch_prompts: Positive | None = option(
        None, "prompts sampled at once on all devices; null: all of a step"
    )


class Reward(Section):
    """One reward: a registered name, or a function of your own by `use`."""

    name: str | None = option(None, "a name that `python -m corl_jax.score --list` shows")
    use: CodePath | None = option(None, "FILE.py:FUNCTION or MODULE:FUNCTION, a reward of your own")
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    options: RewardOptions = Field(default_factory=dict, description="the reward's own keywords")
    timeout_s: PositiveFloat = option(60.0, "seconds that a call of `use` may take")
    max_failures: Positive = option(5, "failed calls of `use` in a row after which the run stops")

    @property
    def label(self) -> str:
        """The name in logs: the registered one, or that of the user's function."""
        return self.name or (self.use or "").rpartition(":")[2]

    @model_validator(mode="after")
    def _one_kind(self) -> Reward:
        if (self.name is None) == (self.use is None):
            raise ValueError(
                "needs exactly one of name, a registered reward, and use, FILE.py:FUNCTION"
            )
        idle = sorted({"timeout_s", "max_failures"} & checks.changed(self).keys())
        if self.name is not None and idle:
            raise ValueError(
                f"{' and '.join(idle)} act on rewards by use alone; {self.name} is built in"
            )
        return self


class RewardNetwork(Section):
    """Where the weights of a reward network are, and in which type they compute."""

    path: ConfigPath | None = option(None, "directory, file or hub id; null: the usual one")
    dtype: Literal["float32", "bfloat16"] = option("float32", "compute dtype")


class Networks(Section):
    """Networks that rewards ask; only those that the listed rewards name are loaded."""

    offload: bool = option(False, "keep them, and frozen scorers, in host memory between uses")
    blip: RewardNetwork = RewardNetwork()
    bert: RewardNetwork = RewardNetwork()
    sentence: RewardNetwork = RewardNetwork()
    lpips: RewardNetwork = RewardNetwork()
    clip: RewardNetwork = RewardNetwork()
    pickscore: RewardNetwork = RewardNetwork()
    hpsv2: RewardNetwork = RewardNetwork()
    clip_l14: RewardNetwork = RewardNetwork()
    aesthetic: RewardNetwork = RewardNetwork()


class Algorithm(Section):
    """The reinforcement learning algorithm: tasks, advantages, loss and penalty."""

    name: Literal["grpo"] = option("grpo", "row of the table of algorithms")

    tasks: Literal["unified", "t2i", "mm2t"] = "unified"
    advantages: Literal["unified_reward", "unified_advantage", "separate"] = "unified_reward"
    mm2t_weight: NonNegativeFloat = option(
        0.8, "lambda: weight of the text reward in the joint one [P eq. 5]"
    )
    t2i_loss_weight: NonNegativeFloat = 1.0
    mm2t_loss_weight: NonNegativeFloat = 1.0
    std_eps: NonNegativeFloat = option(1e-4, "added to a group's std [R]")
    scale_by_std: bool = option(True, "false: advantages are only centred")
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize",
        "normalize_then_sum: each reward on its own within its group (GDPO)",
    )
    kl_coef: NonNegativeFloat = option(0.0, "beta of the k3 penalty; 0: no reference")
    reference: Literal["device", "host"] = option(
        "device", "where the reference lies between uses; host frees device memory"
    )
    clip_low: NonNegativeFloat = option(0.2, "ratio clip below 1; inert at 1 iteration")
    clip_high: NonNegativeFloat = option(0.2, "ratio clip above 1")
    num_iterations: Positive = option(1, "optimizer steps on each rollout (mu)")
    image_logprobs: Literal["conditional", "guided"] = option(
        "conditional", "distribution that image tokens are scored under"
    )
    mask_truncated: bool = option(
        False, "leave answers without an end token out of the loss (text only)"
    )


class Lora(Section):
    """Low-rank adapters in the language model, trained in place of its parameters."""

    rank: NonNegative = option(
        0, "inner width of the adapters; 0: none, train.trainable says what is trained"
    )
    alpha: PositiveFloat = option(32.0, "what they add is scaled by alpha / rank")
    targets: list[Projection] = option(
        list(typing.get_args(Projection)), "projections of each layer that have one"
    )


class Sft(Section):
    """The supervised stage: both tasks on one language model."""

    answer_column: str = option("sft_answer", "target of the question; text")
    caption_column: str | None = option(
        "caption", "target of the captioning instruction; null trains no captions"
    )
    t2i_weight: NonNegativeFloat = 1.0
    mm2t_weight: NonNegativeFloat = 1.0
    caption_weight: NonNegativeFloat = 1.0
    cfg_dropout: Fraction = option(
        0.1, "rows whose prompt is blanked as guidance's unconditional row is"
    )


class Vq(Section):
    """The image tokenizer's recipe."""

    perceptual_weight: NonNegativeFloat = option(
        0.5, "weight of the error of image gradients beside that of pixels"
    )
    commitment: NonNegativeFloat = option(0.25, "pull of latents to their codes")
    entropy_weight: NonNegativeFloat = option(0.02, "spread of code use over a batch")


class Optimizer(Section):
    """optax; the defaults are the released run's."""

    name: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw"
    learning_rate: PositiveFloat = option(4e-6, "peak [P]")
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "to 0 [R]")
    warmup_steps: NonNegative = 0
    max_grad_norm: NonNegativeFloat = option(1.0, "global clip; 0 is none [R]")


class Train(Section):
    """Length and batch of the run."""

    prompts_per_step: Positive = option(16, "prompts of one rollout, all devices [P]")
    micro_batch: Positive | None = option(
        None, "prompts whose groups are in one backward pass; null: all of a step"
    )
    epochs: PositiveFloat = 1.0
    max_steps: Positive | None = option(
        None,
        "overrides epochs; a step is a batch with all its updates",
    )
    trainable: list[str] = option(
        ["language_model/.*", "lm_head/.*"],
        "regexes of parameter paths; the rest is frozen (all but the adapters is, with lora.rank)",
    )
    stop_after: Positive | None = option(
        None,
        "steps (see max_steps) of this process; the schedule stays that of the run",
    )


class Mesh(Section):
    """Devices per axis; one may be -1 and takes what the others leave."""

    data: Axis = -1
    fsdp: Axis = 1
    tensor: Axis = 1


class Distributed(Section):
    """Several processes; on one machine nothing here is needed."""

    initialize: Literal["auto", "always", "never"] = option(
        "auto", "join others: where a cluster or the next three say so, always, never"
    )
    coordinator_address: str | None = option(
        None, "HOST:PORT of process 0; null: as the cluster says"
    )
    num_processes: Positive | None = option(None, "null: as the cluster says")
    process_id: NonNegative | None = option(
        None, "of this process, from 0; null: as the cluster says"
    )
    initialization_timeout_s: Positive = option(300, "until all must have started")
    heartbeat_timeout_s: Positive = option(100, "after which a silent one is dead")


class Checkpoint(Section):
    """Saving, for resuming."""

    every: Positive = option(200, "steps between two; the last is always saved")
    keep: Positive = option(
        2, "newest checkpoints that stay; one more is there while the next is written"
    )
    directory: ConfigPath | None = option(
        None, "where they are, also gs://BUCKET/..; null: in the run directory"
    )
    max_failures: Positive = option(
        3, "saves that fail in a row after which the run stops; the last must not"
    )


class Export(Section):
    """The final model, for PyTorch."""

    layout: Literal["transformers", "original", "jax", "none"] = "transformers"
    dtype: Literal["keep", "float32", "bfloat16"] = option(
        "keep", "keep: each tensor's dtype in the source"
    )
    base: ConfigPath | None = option(None, "original directory that supplies dropped tensors")
    lora: Literal["merged", "adapter"] = option(
        "merged",
        "merged: a whole model; adapter: a directory for PEFT, transformers layout",
    )


class Eval(Section):
    """Held-out evaluation."""

    suite: Literal["none", "shapes", "rewards"] = "none"
    every: NonNegative = option(0, "steps between; 0: only before and after")
    path: ConfigPaths | None = option(None, "rows; null: the last rows of the data")
    rows: Positive = 64
    batch_prompts: Positive = 16


class Guards(Section):
    """Limits that stop a run or raise an alarm. Reasons: docs/explained/reliability.md."""

    max_skipped_updates: Positive = option(
        3, "updates in a row, skipped as not finite, that end the run with code 3"
    )
    max_failed_reward_fraction: Fraction = option(
        0.5, "samples of 20 steps that a reward by `use` may fail on; else the end"
    )
    step_timeout_s: PositiveFloat | None = option(
        1800.0, "seconds without an iteration, evaluation batch or save; null: no end"
    )
    kl: PositiveFloat | None = option(1.0, "alarm above: nats a token, of either task")
    entropy: PositiveFloat | None = option(
        0.1, "alarm below: mean of 10 steps as a share of the first 10 steps' mean"
    )
    duplicates: Fraction | None = option(
        0.5, "alarm above: drawings that repeat one of their group, mean of 10 steps"
    )
    zero_spread: Fraction | None = option(
        0.9, "alarm above: groups with equal rewards, mean of 10 steps"
    )
    not_applicable: Fraction | None = option(
        0.5,
        "alarm above: completions without a reward, mean of 10 steps; or a reward that applies to "
        "none; the end of a run without any",
    )
    drift_mean: PositiveFloat | None = option(
        0.05, "alarm above: mean |sampler - trainer| log-prob, nats"
    )
    drift_max: PositiveFloat | None = option(5.0, "alarm above: the largest, nats")
    held_out: PositiveFloat | None = option(
        3.0,
        "alarm: standard errors that a held-out score falls while the reward rises",
    )
    fatal: list[
        Literal[
            "kl",
            "entropy",
            "duplicates",
            "zero_spread",
            "not_applicable",
            "drift_mean",
            "drift_max",
            "held_out",
        ]
    ] = Field(default_factory=list, description="alarms that end the run with exit code 3")


class Log(Section):
    """What is written beside the numbers."""

    every: Positive = option(1, "steps between metric lines")
    images_every: NonNegative = option(50, "steps between image grids; 0: none")
    fixed_prompts: Positive = option(4, "held-out prompts drawn in each grid")


class Compat(Section):
    """Switches back to behaviours of the released code that our defaults mend; see the docs."""

    image_logprobs_unshifted: bool = option(False, "Q1: score a token after it is read")
    bfloat16_master: bool = option(False, "Q2: parameters and optimizer in bfloat16")
    mc_as_open_ended: bool = option(False, "Q3: choice answers scored by word overlap")
    text_top_k_50: bool = option(False, "Q4: transformers' implicit top_k")
    ti_sim_fixed_spans: bool = option(False, "Q7: spans 5:581 and 586: of the tokens")
    format_without_strip: bool = option(False, "Q20: white space around spoils the format")
    answer_single_line: bool = option(False, "Q21: answers with a newline not found")
    format_repeated_blocks: bool = option(False, "C1: blocks within blocks pass the format test")
    answer_in_thoughts: bool = option(False, "C2: an answer block in the thoughts decides")
    compare_by_letters: bool = option(
        False, "C3: numbers resemble others by spelling, a class counts within any word"
    )


class Config(Section):
    """A whole run."""

    output_dir: ConfigPath = Field(
        description="run directory; a rerun of the same command resumes it"
    )
    stage: Literal["rl", "sft", "vq"] = option(
        "rl", "reinforcement learning, supervised fine-tuning, or the image tokenizer"
    )
    seed: NonNegative = 0
    model: Model
    data: Data
    rollout: Rollout = Rollout()
    rewards: list[Reward] = Field(default_factory=list)
    networks: Networks = Networks()
    algorithm: Algorithm = Algorithm()
    sft: Sft = Sft()
    vq: Vq = Vq()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: Mesh = Mesh()
    distributed: Distributed = Distributed()
    checkpoint: Checkpoint = Checkpoint()
    export: Export = Export()
    eval: Eval = Eval()
    guards: Guards = Guards()
    log: Log = Log()
    compat: Compat = Compat()

    @property
    def trained(self) -> list[str]:
        """Regexes of the paths of all trained parameters."""
        return [ADAPTERS] if self.lora.rank else self.train.trainable

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        problems = checks.problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self
