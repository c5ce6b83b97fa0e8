"""Finds options without effect: `READERS` says who reads each option, and when it does."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from corl_jax.config.fields import Section
from corl_jax.config.stages import STAGE_FACTS
from corl_jax.tasks import IMAGES, TASKS, TEXTS, choose_tasks, plan_tasks

if TYPE_CHECKING:
    from corl_jax.config.schema import Config

LONG_TASKS = tuple(name for name, task in TASKS.items() if task.has_several_segments)
HTTP_REWARDS = ("http", "http_texts")
"""Rewards of the registry that may fail, because servers compute them."""

REWARD_SUITE = "rewards"
"""The suite that scores the run's own rewards, on what the sampler of its rollouts makes."""

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


def _draws_images(config: Config) -> bool:
    """Returns whether a run draws images: to train on them, to evaluate, or to show them."""
    facts = STAGE_FACTS[config.stage]
    if facts.has_rollouts and _makes(config, IMAGES):
        return True
    return _evaluates(config) or _shows_images(config)


def _draws_as_rollouts(config: Config) -> bool:
    """Returns whether a run draws images with the sampler of its rollouts.

    Suites that score no rewards draw with the model's usual number of steps.
    """
    suites = {config.eval.suite, *(entry.suite for entry in config.eval.suites)}
    draws = STAGE_FACTS[config.stage].has_rollouts and _makes(config, IMAGES)
    return draws or REWARD_SUITE in suites or _shows_images(config)


def _shows_images(config: Config) -> bool:
    """Returns whether a run shows images of fixed prompts."""
    facts = STAGE_FACTS[config.stage]
    makes = _makes if facts.has_rollouts else _fine_tunes
    return bool(config.log.images_every and facts.trains_language_model and makes(config, IMAGES))


READERS = (
    *(
        Reader(rf"{facts.block}\..*", f"stage {stage}", _has_block(facts.block))
        for stage, facts in STAGE_FACTS.items()
        if facts.block
    ),
    Reader(r"sft\.redraw", "self_sft_through", lambda c, _: STAGE_FACTS[c.stage].reaches_images),
    Reader(r"sft\.(tasks|(caption|text)_column|repa_weight|released)", "a stage without rollouts",
           lambda config, _: not STAGE_FACTS[config.stage].has_rollouts),
    Reader(r"sft\.caption_column", "a task that makes texts",
           lambda config, _: config.sft.caption_column is None or _fine_tunes(config, TEXTS)),
    Reader(r"sft\.(t2i|repa)_weight", "a task that makes images",
           lambda config, _: _fine_tunes(config, IMAGES)),
    Reader(r"sft\.repa_weight", "sft.t2i_weight above 0", lambda c, _: c.sft.t2i_weight != 0),
    Reader(
        r"rewards\.\d+\.(timeout_s|max_failures)", "a reward by `use`",
        lambda config, key: config.rewards[int(key.split(".")[1])].use is not None,
    ),
    *(
        Reader(rf"compat\.{switch}", f"the reward {' or '.join(names)}", _has_reward(*names))
        for switch, names in SWITCH_USERS.items()
    ),
    Reader(
        r"compat\.(image_logprobs_unshifted|text_top_k_50)|guards\.(?!max_skipped|step_timeout).*|"
        r"unmasking\.(logprobs|scored_steps)",
        "a stage with rollouts", lambda config, _: STAGE_FACTS[config.stage].has_rollouts,
    ),
    Reader(
        r"compat\.image_logprobs_unshifted|guards\.(duplicates|drift_steps)|"
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
        r"rollout\.cfg_scale", "a task that makes images, or an eval.suite",
        lambda config, _: _makes(config, IMAGES) or _evaluates(config),
    ),
    Reader(
        r"rollout\.image_window|denoising\.(schedule|shift)",
        "a rollout of images, an eval.suite or log.images_every",
        lambda config, _: _draws_images(config),
    ),
    Reader(
        r"unmasking\.steps", f"a rollout of images, the suite {REWARD_SUITE} or log.images_every",
        lambda config, _: _draws_as_rollouts(config),
    ),
    Reader(
        r"denoising\.eval_steps", "an eval.suite or log.images_every with a task that makes images",
        lambda config, _: _evaluates(config) or _shows_images(config),
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
    Reader(r"denoising\.clip_range", "algorithm.num_iterations above 1",
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
        r"train\.ema_decay", "an export.layout other than none, an eval.suite or log.images_every",
        lambda config, _: config.export.layout != "none" or _evaluates(config)
        or bool(config.log.images_every),
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


def has_reader(config: Config, key: str) -> bool:
    """Returns whether the run of a config reads an option."""
    return _find_missing_reader(config, key) is None


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
