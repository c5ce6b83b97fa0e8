"""Defines every option of a run, with its type, range, default and meaning.

`config.files` reads, checks and writes configs, `config.options` describes their options,
`config.checks` checks options against each other, and `config.readers` finds those without effect.
Sources in the texts: [P] the paper (arXiv 2505.17534), [R] its released script.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from corl_jax.config import checks
from corl_jax.config.denoising import Denoising
from corl_jax.config.fields import (
    Axis,
    CodePath,
    ConfigPath,
    ConfigPaths,
    Fraction,
    LearningRates,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    RewardOptions,
    Section,
    TaskChoice,
    option,
)
from corl_jax.config.fine_tuning import Sft
from corl_jax.config.guard_limits import Guards
from corl_jax.config.unmasking import Unmasking


class Model(Section):
    """The policy: its weights, and how it computes."""

    path: ConfigPath = Field(
        description="Directory of the weights in any layout, or hub id owner/name[@revision]."
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "bfloat16", "Compute dtype. Parameters and optimizer state stay float32."
    )
    remat: Literal["none", "dots", "full"] = option(
        "full",
        "What the forward pass keeps of each layer for the backward pass. none: everything; dots: "
        "matrix products; full: only the layer's input.",
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = option(
        "auto", "Attention kernel of the update. auto: cuDNN or splash where supported, else XLA."
    )
    logprob_chunk: Positive = option(
        1024, "Number of tokens whose logits are in memory at once when a loss is computed."
    )


class Data(Section):
    """The rows, and how prompts are made of them."""

    path: ConfigPaths = Field(
        description="File, directory, glob, a list of these, or hub dataset id. Parquet; other "
        "formats need the library `datasets`."
    )
    name: str | None = option(
        None, "Configuration of the hub dataset. With it or a split, the library `datasets` reads."
    )
    split: str | None = option(
        None, "Split of the data to train on, such as train. null: the only one there is."
    )
    revision: str | None = option(
        None, "Branch, tag or commit of the hub dataset, as in owner/name@revision."
    )
    columns: dict[str, str] = option(
        {}, "Standard column name -> its name in your files, where the two differ."
    )
    max_prompt_length: Positive = option(
        1024, "Most tokens of an encoded prompt. Longer rows are left out. [P, R]"
    )
    max_bad_fraction: Fraction = option(
        0.01, "Largest fraction of rows that cannot be decoded. With more the run stops."
    )
    cache_rows: NonNegative = option(
        0, "Number of decoded rows kept in memory, for small data that is read many times."
    )


class Rollout(Section):
    """Sampling of the completions that are rewarded."""

    group_size: Positive = option(8, "Completions per prompt, G. [P]")
    temperature: PositiveFloat = option(1.0, "Sampling temperature of both tasks and log-probs.")
    top_k: NonNegative = option(
        0, "Text is sampled from this many most likely tokens. 0: from the whole vocabulary."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = option(
        1.0, "Text is sampled from the most likely tokens with this total probability."
    )
    cfg_scale: NonNegativeFloat | None = option(
        None,
        "Scale of classifier-free guidance of images. 1: no guidance. null: the model's own, 2 of "
        "a JanusFlow, 5 of all others. [P]",
    )
    image_window: Positive = option(
        1,
        "Codes of an image that one pass of a Janus's sampler reads: the last one, and guesses of "
        "the next. Larger windows draw the same images, up to rounding, in fewer, longer passes; "
        "docs/measured/performance.md. 1: code by code.",
    )
    max_new_tokens: Positive = option(512, "Most tokens of a text completion. [P]")
    batch_prompts: Positive | None = option(
        None, "Number of prompts sampled at once on all devices. null: all prompts of a step."
    )


class Reward(Section):
    """One reward: a registered one by `name`, or a function of your own by `use`."""

    name: str | None = option(
        None, "Name of a registered reward; `corl-jax score --list` lists them."
    )
    use: CodePath | None = option(
        None, "A reward function of your own: FILE.py:FUNCTION or MODULE:FUNCTION."
    )
    weight: Annotated[float, Field(allow_inf_nan=False)] = option(
        1.0, "Factor of this reward in the sum of its task's rewards. 0: it is only logged."
    )
    options: RewardOptions = Field(
        default_factory=dict, description="Keyword arguments of the reward."
    )
    timeout_s: PositiveFloat = option(60.0, "Seconds that one call of `use` may take.")
    max_failures: Positive = option(
        5, "The run stops after this many failed calls of `use` in a row."
    )

    @property
    def label(self) -> str:
        """The reward's name in logs: the registered name, or that of the user's function."""
        return self.name or (self.use or "").rpartition(":")[2]

    @model_validator(mode="after")
    def _check_kind(self) -> Reward:
        if (self.name is None) == (self.use is None):
            raise ValueError(
                "needs exactly one of name, a registered reward, and use, FILE.py:FUNCTION"
            )
        return self


class RewardNetwork(Section):
    """One reward network: its weights and compute dtype."""

    path: ConfigPath | None = option(
        None, "Directory, file or hub id of the weights. null: the usual place."
    )
    dtype: Literal["float32", "bfloat16"] = option("float32", "Compute dtype of the network.")


class Networks(Section):
    """Reward networks by name. Only networks that the listed rewards need are loaded."""

    # Any further key is the name of a network. The table of networks belongs to the rewards, which
    # check the names, so that a new network needs no change here.
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, RewardNetwork] = Field(init=False)  # type: ignore[reportIncompatibleVariableOverride]

    offload: bool = option(
        False,
        "Keep reward networks and frozen scorers in host memory while they are not in use.",
    )

    @property
    def by_name(self) -> dict[str, RewardNetwork]:
        """The settings of every network that the config names."""
        return self.__pydantic_extra__ or {}

    def settings_of(self, name: str) -> RewardNetwork:
        """Returns the settings of a network; the defaults if the config does not name it."""
        return self.by_name.get(name, RewardNetwork())


class Algorithm(Section):
    """The reinforcement learning algorithm: tasks, advantages, loss and penalty."""

    # The names belong to the tables of algorithms and of evaluation suites, which read them after
    # the config, so that a new row needs no change here.
    name: str = option(
        "grpo",
        "Name of the algorithm: grpo, dr_grpo, dapo, gspo, cispo, rloo, remax, reinforce_pp or "
        "gdpo. It sets the options below that are null; docs/reference/algorithms.md.",
    )
    tasks: TaskChoice = option(
        "unified",
        "Tasks to train. t2i: image generation; mm2t: image understanding; unified: both; think: "
        "image generation after a plan, a text that the policy writes first; self_qa: answers "
        "to questions about the images that the policy generates itself, and these images.",
    )
    advantages: Literal["unified_reward", "unified_advantage", "separate"] = option(
        "unified_reward",
        "How the advantages of the two tasks are joined. unified_reward: one advantage from the "
        "joint reward of each pair; unified_advantage: the sum of the two advantages; separate: "
        "each task has its own.",
    )
    mm2t_weight: NonNegativeFloat = option(
        0.8, "Weight of the text reward in the joint reward, lambda. [P eq. 5]"
    )
    mm2t_loss_weight: NonNegativeFloat = option(1.0, "Weight of the text loss; images have 1.")
    earlier_loss_weight: NonNegativeFloat = option(
        1.0, "Weight of the loss of what a task makes first: plans in think, images in self_qa."
    )
    alternate_every: NonNegative = option(
        0,
        "Steps after which training changes from one task to the other. 0: all tasks in each step.",
    )
    scale: Literal["group", "batch", "none"] | None = option(
        None,
        "Rewards whose standard deviation divides the advantages; with gdpo, those of each reward "
        "by itself. null: as the algorithm says.",
    )
    ddof: Literal[0, 1] = option(
        1, "That standard deviation divides the squares of n rewards by n - ddof; Flow-GRPO has 0."
    )
    advantage_clip: PositiveFloat | None = option(
        None, "Advantages are clipped to this size; Flow-GRPO has 5. null: no clipping."
    )
    mask_indifferent: bool = option(
        False,
        "Leave completions whose advantage is 0, as in groups with equal rewards, out of the loss, "
        "its mean and its KL penalty.",
    )
    reduction: Literal["sequence_mean", "token_mean", "constant"] | None = option(
        None,
        "How the losses of tokens are averaged: over the completions by the mean of each, over all "
        "tokens, or over the longest possible completions. null: as the algorithm says.",
    )
    kl_coef: NonNegativeFloat = option(
        0.0, "Coefficient of the KL penalty, beta. 0: no penalty and no reference model."
    )
    kl_in: Literal["loss", "reward"] | None = option(
        None,
        "Where the penalty is added: to each token's loss, or summed over the completion to its "
        "reward. null: as the algorithm says.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = option(
        None, "Estimate of the KL divergence of a token. null: as the algorithm says."
    )
    reference: Literal["device", "host"] = option(
        "device",
        "Where the reference model is kept while it is not in use. host frees device memory.",
    )
    reference_every: NonNegative = option(
        0, "Steps between updates of the reference model. 0: it stays as at the start."
    )
    reference_decay: Annotated[float, Field(ge=0, lt=1)] = option(
        0.0,
        "Share of the old reference model in an update; the rest is the policy. 0: the policy "
        "replaces it.",
    )
    clip_low: NonNegativeFloat | None = option(
        None,
        "The probability ratio is clipped below 1 - clip_low. null: as the algorithm says. No "
        "effect with 1 iteration.",
    )
    clip_high: NonNegativeFloat | None = option(
        None,
        "The probability ratio is clipped above 1 + clip_high. null: as the algorithm says. No "
        "effect with 1 iteration.",
    )
    dual_clip: PositiveFloat | None = option(
        None,
        "Largest ratio of a token with a negative advantage, above 1 + clip_high. null: no bound. "
        "No effect with 1 iteration.",
    )
    importance_cap: PositiveFloat | None = option(
        None,
        "Multiply each token's loss by the probability ratio of trainer and sampler, but at most "
        "by this. null: no such factor.",
    )
    redraws: NonNegative | None = option(
        None,
        "Most times that groups with equal rewards are replaced by groups of other prompts in a "
        "step. null: as the algorithm says.",
    )
    image_token_share: Annotated[float, Field(gt=0, le=1)] = option(
        1.0, "Share of an image's tokens, those of the highest entropy, that are in the loss."
    )
    image_token_weights: Literal["uniform", "entropy"] = option(
        "uniform", "Weights of an image's tokens in the loss. entropy: in proportion to it."
    )
    num_iterations: Positive = option(1, "Optimizer updates on each rollout, mu.")
    image_logprobs: Literal["conditional", "guided"] = option(
        "conditional",
        "Distribution under which log-probs of image tokens are computed: that of the prompt, or "
        "that of guidance, from which they are sampled.",
    )
    mask_truncated: bool = option(
        False, "Leave text completions without an end token out of the loss."
    )


class Lora(Section):
    """Low-rank adapters in the language model, trained instead of its parameters."""

    rank: NonNegative = option(
        0, "Rank of the adapters. 0: no adapters; train.trainable says what is trained."
    )
    alpha: PositiveFloat = option(32.0, "The output of adapters is scaled by alpha / rank.")
    targets: list[str] | None = option(
        None, "Projections of each layer that get an adapter. null: all that the model can have."
    )


class Optimizer(Section):
    """The optax optimizer. The defaults are those of the released run."""

    name: Literal["adamw", "adafactor", "lion", "sgd"] = option("adamw", "Name of the optimizer.")
    learning_rate: PositiveFloat = option(4e-6, "Peak learning rate. [P]")
    learning_rates: LearningRates = option(
        {},
        "Peak learning rates of groups of parameters that have their own: language_model, "
        "image_head (what draws around the language model), image_encoder, image_tokenizer. "
        "Schedule, decay and clipping are those of all.",
    )
    b1: Fraction = option(0.9, "Decay of the first moment; the momentum of sgd.")
    b2: Fraction = option(0.999, "Decay of the second moment.")
    weight_decay: NonNegativeFloat = option(
        0.0, "Weight decay: decoupled; sgd adds it to the gradient before the momentum."
    )
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "Schedule of the learning rate after warmup. linear and cosine end at 0. [R]"
    )
    warmup_steps: NonNegative = option(
        0, "Updates in which the learning rate rises linearly from 0."
    )
    max_grad_norm: NonNegativeFloat = option(
        1.0, "Gradients are clipped to this global norm. 0: no clipping. [R]"
    )


class Train(Section):
    """Length and batch of the run, and what is trained."""

    prompts_per_step: Positive = option(16, "Prompts of one step on all devices. [P]")
    micro_batch: Positive | None = option(
        None,
        "Prompts whose completions share one backward pass. null: all prompts of a step.",
    )
    epochs: PositiveFloat = option(1.0, "Passes over the data.")
    max_steps: NonNegative | None = option(
        None,
        "Length of the run in steps, instead of epochs. A step is a batch with all its updates. "
        "0: the model is only evaluated, as before the first step of a longer run.",
    )
    trainable: list[str] | None = option(
        None,
        "Regexes of the paths of parameters that are trained; all others are frozen. null: those "
        "of the model's published recipe, for Janus language_model and lm_head. Not read with "
        "lora.rank above 0.",
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = option(
        0.0,
        "Share that a running mean of the weights keeps of itself in each step. Evaluations and "
        "images of fixed prompts are made with the mean, and the export has it. 0: no mean.",
    )
    stop_after: Positive | None = option(
        None,
        "This process stops after this many steps. The learning rate schedule does not change.",
    )


class Mesh(Section):
    """Devices per mesh axis. One axis may be -1: it takes the devices that the others leave."""

    data: Axis = option(-1, "Devices that split the batch and hold the same parameters.")
    fsdp: Axis = option(1, "Devices that split the batch, the parameters and the optimizer state.")
    tensor: Axis = option(1, "Devices that split each layer.")


class Distributed(Section):
    """Training with several processes. One process needs none of these options."""

    initialize: Literal["auto", "always", "never"] = option(
        "auto",
        "Whether to join other processes. auto: if a cluster is detected or an address is given.",
    )
    coordinator_address: str | None = option(
        None, "HOST:PORT of process 0. null: as the cluster says."
    )
    num_processes: Positive | None = option(None, "Number of processes. null: as the cluster says.")
    process_id: NonNegative | None = option(
        None, "Number of this process, from 0. null: as the cluster says."
    )
    initialization_timeout_s: Positive = option(
        300, "Seconds in which all processes must have started."
    )
    heartbeat_timeout_s: Positive = option(
        100, "A process that does not answer for this many seconds counts as dead."
    )


class Checkpoint(Section):
    """Saving the state of the run, so that it can be resumed."""

    every: Positive = option(200, "Steps between two checkpoints. The last step is always saved.")
    keep: Positive = option(
        2,
        "Number of newest checkpoints to keep. One more exists while the next one is written.",
    )
    directory: ConfigPath | None = option(
        None, "Directory of the checkpoints, also gs://BUCKET/... null: in the run directory."
    )
    max_failures: Positive = option(
        3, "The run stops after this many failed saves in a row, or if the last save fails."
    )


class Export(Section):
    """The final model, written for PyTorch."""

    layout: Literal["auto", "transformers", "original", "jax", "none"] = option(
        "auto",
        "Layout of the exported model. auto: the usual one of its family, transformers of a Janus "
        "and original of the others; none: no export.",
    )
    dtype: Literal["keep", "float32", "bfloat16"] = option(
        "keep", "dtype of the exported tensors. keep: that of each tensor in model.path."
    )
    lora: Literal["merged", "adapter"] = option(
        "merged",
        "merged: the adapters are added to the weights of a whole model; adapter: a directory "
        "for PEFT holds them alone (layout transformers).",
    )


class EvalSuite(Section):
    """One more evaluation, on rows of a file of its own."""

    suite: str = Field(description="What is measured: a name as in eval.suite.")
    path: ConfigPath = Field(description="File or directory of the rows.")
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = option(
        None, "Name in metrics, eval/NAME/..; null: the file's name without its ending."
    )
    rows: Positive | None = option(None, "Number of rows, from the first one on. null: all.")


class Eval(Section):
    """Evaluation on held-out rows."""

    suite: str = option(
        "none",
        "What is measured. shapes: the drawn world's exact checker; rewards: the listed rewards; "
        "own_answers: what the model answers about its own images; "
        "in eval.suites also tsv: data in VLMEvalKit's format, and geneval: GenEval's prompts.",
    )
    every: NonNegative = option(0, "Steps between evaluations. 0: only before and after training.")
    path: ConfigPaths | None = option(
        None, "Held-out rows, named as data.path. null: the last rows of data.path."
    )
    split: str | None = option(
        None, "Split of the held-out rows, of eval.path or else of data.path. null: no split."
    )
    rows: Positive = option(64, "Number of held-out rows.")
    suites: list[EvalSuite] = Field(default_factory=list, description="Further evaluations.")
    batch_prompts: Positive = option(16, "Number of prompts evaluated at once on all devices.")


class Log(Section):
    """What the run logs, and how often."""

    every: Positive = option(1, "Steps between lines of metrics.")
    images_every: NonNegative = option(
        50, "Steps between image grids, tables of answers and histograms. 0: none."
    )
    samples_every: NonNegative = option(
        50, "Steps between files of all completions of a step with their rewards. 0: no files."
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=["tensorboard"],
        description="Where metrics, images and texts go beside metrics.jsonl.",
    )


class Compat(Section):
    """Switches that bring back bugs of the released code, which are fixed by default."""

    image_logprobs_unshifted: bool = option(
        False, "Q1: the log-prob of an image token is read one position too late."
    )
    bfloat16_master: bool = option(
        False, "Q2: parameters and optimizer state are bfloat16, with no float32 copy."
    )
    mc_as_open_ended: bool = option(
        False, "Q3: answers to choice questions are compared by word overlap."
    )
    text_top_k_50: bool = option(False, "Q4: text is sampled with transformers' default top_k, 50.")
    ti_sim_fixed_spans: bool = option(
        False, "Q7: image and text tokens are taken from the fixed positions 5:581 and 586:."
    )
    format_without_strip: bool = option(
        False, "Q20: white space around a completion fails the format test."
    )
    answer_single_line: bool = option(False, "Q21: an answer with a newline is not found.")
    format_repeated_blocks: bool = option(
        False, "C1: blocks inside of blocks pass the format test."
    )
    answer_in_thoughts: bool = option(
        False, "C2: an answer block inside of the thoughts counts as the answer."
    )
    compare_by_letters: bool = option(
        False,
        "C3: numbers are compared by their letters, and a class counts inside of any word.",
    )


class Config(Section):
    """A whole run."""

    output_dir: ConfigPath = Field(
        description="Run directory. The same command again resumes the run in it."
    )
    stage: Literal["rl", "sft", "self_sft", "self_sft_through", "vq"] = option(
        "rl",
        "Kind of training. rl: reinforcement learning; sft: supervised fine-tuning; self_sft: "
        "that on own images; self_sft_through: with the gradient into them; vq: image tokenizer.",
    )
    seed: NonNegative = option(0, "Seed of the data order and of all samples.")
    model: Model
    data: Data
    rollout: Rollout = Rollout()
    rewards: list[Reward] = Field(default_factory=list, description="Rewards of the completions.")
    networks: Networks = Networks()
    unmasking: Unmasking = Unmasking()
    denoising: Denoising = Denoising()
    algorithm: Algorithm = Algorithm()
    sft: Sft = Sft()
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

    @model_validator(mode="after")
    def _check_options_together(self) -> Config:
        checks.check_options_together(self)
        return self
