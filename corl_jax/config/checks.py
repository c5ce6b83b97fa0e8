"""Checks options against each other: refuses contradictions, reports options without effect.

Types and ranges are checked by pydantic, in `schema`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from corl_jax.config.fields import Section
from corl_jax.config.stages import STAGE_FACTS
from corl_jax.errors import Problems
from corl_jax.nearest import nearest_divisors
from corl_jax.tasks import IMAGES, TASKS, TEXTS, choose_tasks, plan_tasks

if TYPE_CHECKING:
    from corl_jax.config.schema import Config

LONG_TASKS = tuple(name for name, task in TASKS.items() if task.has_several_segments)
REWARD_GRACE_S = 1.0
"""Seconds beyond its timeout_s that a reward by `use` has to end tidily."""
HTTP_REWARDS = ("http", "http_texts")
"""Rewards of the registry that may fail, because servers compute them."""

SWITCH_USERS = {
    "mc_as_open_ended": ("qa_accuracy",),
    "answer_single_line": ("qa_accuracy", "oc_accuracy"),
    "answer_in_thoughts": ("qa_accuracy", "oc_accuracy"),
    "compare_by_letters": ("qa_accuracy", "oc_accuracy", "t2i_oc"),
    "format_without_strip": ("format",),
    "format_repeated_blocks": ("format",),
    "ti_sim_fixed_spans": ("t2i_ti_sim",),
}
"""Switch of `compat` that changes rewards -> those rewards."""

OPTIMIZERS_WITH = {"b1": ("adamw", "lion", "sgd"), "b2": ("adamw", "lion")}
"""Option of the optimizer -> the optimizers that read it."""


# ---- options without effect


@dataclasses.dataclass(frozen=True)
class Reader:
    """The reader of some options. In a config without this reader they have no effect."""

    options: str  # regex of whole keys
    name: str  # completes "only .. reads it"
    is_present: Callable[[Config, str], bool]  # of a config and the option's key


def _has_reward(*names: str) -> Callable[[Config, str], bool]:
    return lambda config, _: any(reward.label in names for reward in config.rewards)


def _has_optimizer(*names: str) -> Callable[[Config, str], bool]:
    return lambda config, _: config.optimizer.name in names


def _has_block(block: str) -> Callable[[Config, str], bool]:
    return lambda config, _: STAGE_FACTS[config.stage].block == block


def _evaluates(config: Config) -> bool:
    return config.eval.suite != "none" or bool(config.eval.suites)


def _makes(config: Config, result: str) -> bool:
    """Returns whether a task of reinforcement learning makes IMAGES or TEXTS."""
    if not STAGE_FACTS[config.stage].has_rollouts:
        return True  # the export of a supervised stage states the sampling
    return any(result in TASKS[task].results for task in choose_tasks(config.algorithm.tasks))


def _plans(config: Config) -> bool:
    """Returns whether a task of reinforcement learning makes plans."""
    return bool(
        STAGE_FACTS[config.stage].has_rollouts and plan_tasks(choose_tasks(config.algorithm.tasks))
    )


def _fine_tunes(config: Config, result: str) -> bool:
    return any(result in TASKS[task].results for task in choose_tasks(config.sft.tasks))


READERS = (
    *(
        Reader(rf"{facts.block}\..*", f"stage {stage}", _has_block(facts.block))
        for stage, facts in STAGE_FACTS.items()
        if facts.block
    ),
    Reader(r"sft\.redraw", "self_sft_through", lambda c, _: STAGE_FACTS[c.stage].reaches_images),
    Reader(r"sft\.(tasks|(caption|text)_column|released)", "a stage without rollouts",
           lambda config, _: not STAGE_FACTS[config.stage].has_rollouts),
    Reader(r"sft\.caption_column", "a task that makes texts",
           lambda config, _: config.sft.caption_column is None or _fine_tunes(config, TEXTS)),
    Reader(r"sft\.t2i_weight", "a task that makes images", lambda c, _: _fine_tunes(c, IMAGES)),
    Reader(
        r"rewards\.\d+\.(timeout_s|max_failures)", "a reward by `use`",
        lambda config, key: config.rewards[int(key.split(".")[1])].use is not None,
    ),
    *(
        Reader(rf"compat\.{switch}", f"the reward {' or '.join(names)}", _has_reward(*names))
        for switch, names in SWITCH_USERS.items()
    ),
    Reader(
        r"compat\.(image_logprobs_unshifted|text_top_k_50)|guards\.(?!max_skipped|step_timeout).*",
        "a stage with rollouts", lambda config, _: STAGE_FACTS[config.stage].has_rollouts,
    ),
    Reader(
        r"compat\.image_logprobs_unshifted|guards\.duplicates|"
        r"unmasking\.(logprobs|scored_steps)|algorithm\.image_(logprobs|token_share|token_weights)",
        "a task that makes images", lambda config, _: _makes(config, IMAGES),
    ),
    Reader(
        r"compat\.text_top_k_50|algorithm\.mask_truncated", "a task that makes texts or plans",
        lambda config, _: _makes(config, TEXTS) or _plans(config),
    ),
    Reader(r"algorithm\.mm2t_loss_weight", "a task that makes texts",
           lambda config, _: _makes(config, TEXTS)),
    Reader(
        r"algorithm\.earlier_loss_weight", f"algorithm.tasks {' or '.join(LONG_TASKS)}",
        lambda config, _: not {*LONG_TASKS}.isdisjoint(choose_tasks(config.algorithm.tasks)),
    ),
    Reader(
        r"rollout\.(top_k|top_p|max_new_tokens)",
        "a task that makes texts or plans, or an eval.suite",
        lambda config, _: _makes(config, TEXTS) or _plans(config) or _evaluates(config),
    ),
    Reader(
        r"rollout\.cfg_scale|unmasking\.steps", "a task that makes images, or an eval.suite",
        lambda config, _: _makes(config, IMAGES) or _evaluates(config),
    ),
    Reader(
        r"rollout\.(group_size|batch_prompts)", "a stage with rollouts, or an eval.suite",
        lambda config, _: STAGE_FACTS[config.stage].has_rollouts or _evaluates(config),
    ),
    Reader(
        r"algorithm\.(clip_low|clip_high|dual_clip)", "algorithm.num_iterations above 1",
        lambda config, _: config.algorithm.num_iterations > 1,
    ),
    Reader(
        r"denoising\.(?!eval_steps|schedule|shift).*",
        "a stage with rollouts and a task that makes images",
        lambda config, _: STAGE_FACTS[config.stage].has_rollouts and _makes(config, IMAGES),
    ),
    Reader(r"denoising\.window_starts", "denoising.window above 0",
           lambda config, _: config.denoising.window > 0),
    Reader(r"denoising\.kl", "algorithm.kl_coef above 0",
           lambda config, _: config.algorithm.kl_coef > 0),
    Reader(r"denoising\.clip", "algorithm.num_iterations above 1",
           lambda config, _: config.algorithm.num_iterations > 1),
    Reader(r"unmasking\.scored_steps", "unmasking.logprobs trajectory",
           lambda config, _: config.unmasking.logprobs == "trajectory"),
    Reader(
        r"algorithm\.(advantages|mm2t_weight|alternate_every)", "algorithm.tasks unified",
        lambda config, _: len(choose_tasks(config.algorithm.tasks)) > 1,
    ),
    Reader(
        r"algorithm\.(advantages|mm2t_weight)", "algorithm.alternate_every 0",
        lambda config, _: not config.algorithm.alternate_every,
    ),
    Reader(
        r"algorithm\.mm2t_weight", "algorithm.advantages unified_reward or unified_advantage",
        lambda config, _: config.algorithm.advantages != "separate",
    ),
    Reader(
        r"algorithm\.(reference.*|kl_in|kl_estimator)|guards\.kl", "algorithm.kl_coef above 0",
        lambda config, _: config.algorithm.kl_coef > 0,
    ),
    Reader(
        r"algorithm\.reference_decay", "algorithm.reference_every above 0",
        lambda config, _: config.algorithm.reference_every > 0,
    ),
    Reader(
        # With adapters a fixed reference model is the frozen part, which has no copy of its own.
        r"algorithm\.reference", "a run with lora.rank 0",
        lambda config, _: not config.lora.rank or config.algorithm.reference_every > 0,
    ),
    Reader(r"lora\.(alpha|targets)|export\.lora", "lora.rank above 0",
           lambda config, _: config.lora.rank > 0),
    Reader(
        r"export\.(dtype|lora)", "an export.layout other than none",
        lambda config, _: config.export.layout != "none",
    ),
    *(
        Reader(rf"optimizer\.{option}", f"optimizer.name {' or '.join(names)}",
               _has_optimizer(*names))
        for option, names in OPTIMIZERS_WITH.items()
    ),
    Reader(
        r"train\.micro_batch", "a stage that trains the language model",
        lambda config, _: STAGE_FACTS[config.stage].has_micro_batches,
    ),
    Reader(
        r"train\.epochs", "a run without train.max_steps",
        lambda config, _: config.train.max_steps is None,
    ),
    Reader(
        r"eval\.(every|batch_prompts)|guards\.held_out",
        "an eval.suite other than none, or eval.suites",
        lambda config, _: _evaluates(config),
    ),
    Reader(
        r"eval\.(path|split|rows)", "an eval.suite other than none",
        lambda config, _: config.eval.suite != "none",
    ),
    Reader(
        r"guards\.max_failed_reward_fraction", "a reward by `use` or by http",
        lambda config, _: any(x.use or x.name in HTTP_REWARDS for x in config.rewards),
    ),
    Reader(
        r"distributed\.(?!initialize$).*", "distributed.initialize auto or always",
        lambda config, _: config.distributed.initialize != "never",
    ),
)  # fmt: skip
"""The readers of options. An option that no row matches is always read."""


def find_unused_options(config: Config) -> list[str]:
    """Returns a line for each option that has no effect in this config: its value, and why."""
    lines = []
    for key, value in list_changes(config):
        if key == "guards.fatal":
            continue  # its alarms are checked one by one below
        if value is None and key.startswith("guards."):
            continue  # an alarm that is switched off needs no reader
        if reader := _find_missing_reader(config, key):
            lines.append(f"{key}: {value!r} has no effect; only {reader} reads it")
    for alarm in config.guards.fatal:
        if reader := _find_missing_reader(config, f"guards.{alarm}"):
            lines.append(f"guards.fatal: {alarm!r} has no effect; only {reader} reads it")
    return lines


def _find_missing_reader(config: Config, key: str) -> str | None:
    for reader in READERS:
        # An option may match several rows: one reader that is missing is enough.
        if re.fullmatch(reader.options, key) and not reader.is_present(config, key):
            return reader.name
    return None


def list_changes(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of each option of a block whose value is not the default."""
    # Not `model_fields_set`: a config that was written out sets every option.
    fields = type(section).model_fields
    for name, value in section:
        key = prefix + name
        if isinstance(value, Section):
            yield from list_changes(value, f"{key}.")
        elif value != fields[name].get_default(call_default_factory=True):
            yield key, value
        if isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    yield from list_changes(item, f"{key}.{index}.")


# ---- options that contradict each other


def check_options_together(config: Config) -> None:
    """Refuses options that contradict each other.

    Raises:
        InputError: listing all contradictions.
    """
    problems = Problems()
    _check_batches(config, problems)
    _check_data(config, problems)
    _check_sampling(config, problems)
    _check_fine_tuning(config, problems)
    _check_rewards(config, problems)
    _check_guards(config, problems)
    _check_processes(config, problems)
    _check_places(config, problems)
    _check_adapters(config, problems)
    _check_trackers(config, problems)
    if config.train.max_steps:
        with problems.collect():
            check_warmup(config, config.train.max_steps)
    problems.raise_any()


def check_warmup(config: Config, steps: int) -> None:
    """Refuses a run that ends before it reaches its learning rate.

    Raises:
        InputError: the warm-up is not shorter than `steps` steps.
    """
    warmup = config.optimizer.warmup_steps
    iterations = config.algorithm.num_iterations if STAGE_FACTS[config.stage].compares else 1
    updates = steps * iterations
    problems = Problems()
    # Updates count from 0, so update number `warmup` is the first at the full learning rate.
    if warmup >= max(updates, 1):
        length = f"{steps} steps"
        length += f" with {iterations} updates each" if iterations > 1 else ""
        problems.add(
            f"optimizer.warmup_steps: found {warmup}, but the run has {length}, so that it never "
            f"reaches optimizer.learning_rate; expected less than {updates}; lower it or train "
            "longer"
        )
    problems.raise_any()


def _check_batches(config: Config, problems: Problems) -> None:
    batch = config.train.prompts_per_step
    rows = {
        "train.micro_batch": config.train.micro_batch,
        "rollout.batch_prompts": config.rollout.batch_prompts,
    }
    for name, part in rows.items():
        if part is not None and batch % part:
            problems.add(
                f"{name}: {part} does not divide train.prompts_per_step {batch}; "
                f"nearest: {nearest_divisors(batch, part)}"
            )


def _check_data(config: Config, problems: Problems) -> None:
    data, held_out = config.data, config.eval
    if held_out.split is None or held_out.path not in (None, data.path):
        return
    if data.split in (None, held_out.split):
        problems.add(
            f"eval.split: found {held_out.split} of the data that data.split {data.split} trains "
            "on; expected two splits; set data.split to another, such as train"
        )


def _check_sampling(config: Config, problems: Problems) -> None:
    if config.compat.image_logprobs_unshifted and config.algorithm.image_logprobs == "guided":
        problems.add("compat.image_logprobs_unshifted: needs algorithm.image_logprobs conditional")
    if config.compat.text_top_k_50 and config.rollout.top_k not in (0, 50):
        problems.add(
            f"rollout.top_k: {config.rollout.top_k} contradicts compat.text_top_k_50; drop one"
        )


def _check_fine_tuning(config: Config, problems: Problems) -> None:
    chosen = choose_tasks(config.sft.tasks)
    if not {*LONG_TASKS}.isdisjoint(chosen):
        problems.add(
            f"sft.tasks: found {config.sft.tasks}, of which no column of the "
            "data has all parts, so that there is nothing to learn from; choose unified or one "
            f"of {', '.join(task for task in TASKS if task not in LONG_TASKS)}"
        )
    images_alone = not any(TASKS[task].makes_text for task in chosen)
    if STAGE_FACTS[config.stage].block == "sft" and images_alone and config.sft.t2i_weight == 0:
        problems.add(
            f"sft.t2i_weight: found 0, but sft.tasks {config.sft.tasks} trains images alone; "
            "expected a weight above 0; raise it or choose other tasks"
        )


def _check_rewards(config: Config, problems: Problems) -> None:
    if STAGE_FACTS[config.stage].has_rollouts and not config.rewards:
        problems.add(f"rewards: empty; stage {config.stage} needs at least one: {{name: format}}")


def _check_guards(config: Config, problems: Problems) -> None:
    guards = config.guards
    for alarm in guards.fatal:
        if getattr(guards, alarm) is None:
            problems.add(f"guards.fatal: found {alarm}, but guards.{alarm} is null; drop it")
    slow = [reward for reward in config.rewards if reward.use]
    # The rewards are called one after the other, and the watchdog must wait for all of them.
    limit, longest = guards.step_timeout_s, sum(x.timeout_s + REWARD_GRACE_S for x in slow)
    if limit is not None and longest >= limit:
        problems.add(
            f"guards.step_timeout_s: {limit:g} is not above the {longest:g} s that the rewards "
            f"{' and '.join(x.label for x in slow)} may take by their timeout_s; raise the first "
            "or lower these"
        )


def _check_processes(config: Config, problems: Problems) -> None:
    options = config.distributed
    address = options.coordinator_address
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        problems.add(
            f"distributed.coordinator_address: found {address!r}; expected HOST:PORT of process 0, "
            "such as node1:1234"
        )
    index, count = options.process_id, options.num_processes
    if index is not None and count is not None and index >= count:
        problems.add(
            f"distributed.process_id: found {index} of {count} processes; expected 0 to {count - 1}"
        )


def _check_places(config: Config, problems: Problems) -> None:
    """Checks the directories of a run."""
    # In an object store no file can be locked or appended to; orbax writes checkpoints there whole.
    if "://" in config.output_dir:
        problems.add(
            f"output_dir: found {config.output_dir!r}; expected a directory on a disk, which all "
            "processes see; to keep the checkpoints in a bucket set checkpoint.directory to "
            "gs://BUCKET/.."
        )
    directory = config.checkpoint.directory
    if directory is None or "://" not in directory:
        return
    if not directory.startswith("gs://"):
        problems.add(
            f"checkpoint.directory: found {directory!r}; expected a directory or gs://BUCKET/.."
        )
    elif not any(importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow")):
        problems.add(
            f"checkpoint.directory: found {directory!r}, but no installed package lists a bucket; "
            "run `pip install 'corl-jax[gcs]'`"
        )


def _check_trackers(config: Config, problems: Problems) -> None:
    for name in config.log.trackers:
        # tensorboardX is a dependency, and writes the files that TensorBoard reads.
        if name != "tensorboard" and not importlib.util.find_spec(name):
            problems.add(
                f"log.trackers: found {name}, but its package is not installed; run "
                f"`pip install 'corl-jax[{name}]'`, or leave it out"
            )


def _check_adapters(config: Config, problems: Problems) -> None:
    lora, export = config.lora, config.export
    if not lora.rank:
        return
    if not STAGE_FACTS[config.stage].trains_language_model:
        problems.add(
            f"lora.rank: found {lora.rank}, but stage {config.stage} does not use the language "
            "model, which adapters are for; set it to 0"
        )
    elif "trainable" in dict(list_changes(config.train)):
        problems.add(
            f"train.trainable: found {config.train.trainable}, but with lora.rank {lora.rank} only "
            "the adapters are trained; leave it out, or set lora.rank to 0"
        )
    # What auto is depends on the model, and is checked with it.
    if export.lora == "adapter" and export.layout not in ("auto", "transformers"):
        problems.add(
            f"export.lora: adapter, but export.layout {export.layout}; PEFT loads an adapter onto "
            "transformers' model alone: set export.layout to transformers, or export.lora to merged"
        )
