"""What is wrong with a config as a whole: options that contradict or idle beside others.

Types and ranges are pydantic's part, in `schema`.
"""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

from corl_jax.nearest import nearest_divisors

if TYPE_CHECKING:
    from corl_jax.config.fields import Section
    from corl_jax.config.schema import Config

SWITCH_USERS = {
    "mc_as_open_ended": ("qa_accuracy",),
    "answer_single_line": ("qa_accuracy", "oc_accuracy"),
    "answer_in_thoughts": ("qa_accuracy", "oc_accuracy"),
    "compare_by_letters": ("qa_accuracy", "oc_accuracy", "t2i_oc"),
    "format_without_strip": ("format",),
    "format_repeated_blocks": ("format",),
    "ti_sim_fixed_spans": ("t2i_ti_sim",),
}
"""Switches of `compat` that act on rewards -> those rewards."""

STAGE_BLOCKS = {"rl": "algorithm", "sft": "sft", "vq": "vq"}
"""Stage -> the block of options that it alone reads."""

UNUSED_MOMENTS = {"adafactor": ("b1", "b2", "eps"), "lion": ("eps",), "sgd": ("b2", "eps")}
"""Optimizer -> what it does not read."""


REWARD_GRACE_S = 1.0
"""Seconds beyond its timeout_s that a reward by `use` has to end tidily."""


def problems(config: Config) -> list[str]:
    """A line for each option that does not fit the others."""
    return [
        *_batches(config),
        *_contradictions(config),
        *_unused_blocks(config),
        *_unused_switches(config),
        *_unused_moments(config),
        *(warmup_problems(config, config.train.max_steps) if config.train.max_steps else []),
        *_guards(config),
        *_processes(config),
        *_places(config),
        *_adapters(config),
    ]


def _batches(config: Config) -> list[str]:
    problems = []
    batch = config.train.prompts_per_step
    for name, part in (
        ("train.micro_batch", config.train.micro_batch),
        ("rollout.batch_prompts", config.rollout.batch_prompts),
    ):
        if part is not None and batch % part:
            problems.append(
                f"{name}: {part} does not divide train.prompts_per_step {batch}; "
                f"nearest: {nearest_divisors(batch, part)}"
            )
    return problems


def _contradictions(config: Config) -> list[str]:
    problems = []
    if config.stage == "vq" and config.train.micro_batch not in (
        None,
        config.train.prompts_per_step,
    ):
        problems.append("train.micro_batch: stage vq has no micro-batches; leave it out")
    if config.eval.suite == "rewards" and (config.stage == "vq" or not config.rewards):
        problems.append(
            "eval.suite: rewards, but there are none to score, or stage vq, which "
            "samples nothing; list rewards or choose another suite"
        )
    if config.eval.every and config.eval.suite == "none":
        problems.append(
            f"eval.every: {config.eval.every} has no use with eval.suite none; choose a suite "
            "or drop it"
        )
    if config.stage == "rl" and not config.rewards:
        problems.append("rewards: empty; stage rl needs at least one: {name: format}")
    if (
        config.stage == "rl"
        and config.algorithm.reference != "device"
        and not config.algorithm.kl_coef
    ):
        problems.append(
            f"algorithm.reference: found {config.algorithm.reference}, but with "
            "algorithm.kl_coef 0 there is no reference; leave it out, or set algorithm.kl_coef"
        )
    if config.compat.image_logprobs_unshifted and config.algorithm.image_logprobs == "guided":
        problems.append(
            "compat.image_logprobs_unshifted: needs algorithm.image_logprobs conditional"
        )
    if config.compat.text_top_k_50 and config.rollout.top_k not in (0, 50):
        problems.append(
            f"rollout.top_k: {config.rollout.top_k} contradicts compat.text_top_k_50; drop one"
        )
    return problems


def changed(section: Section) -> dict[str, tuple[Any, Any]]:
    """name -> (value, default) of the options with another value than the default.

    Not `model_fields_set`: a written-out config sets every option, and a `base` those of others.
    """
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in type(section).model_fields.items()
    }
    return {name: (value, defaults[name]) for name, value in section if value != defaults[name]}


def _unused_blocks(config: Config) -> list[str]:
    """Options in blocks of another stage, and rewards that nothing scores."""
    stage = config.stage
    problems = [
        f"{block}.{name}: found {value!r}, but stage {stage} does not read the block {block}; "
        f"leave it at {default!r} or set stage to {reader}"
        for reader, block in STAGE_BLOCKS.items()
        if reader != stage
        for name, (value, default) in changed(getattr(config, block)).items()
    ]
    scored = stage == "rl" or config.eval.suite == "rewards"
    if config.rewards and not scored:
        names = ", ".join(reward.label for reward in config.rewards)
        problems.append(
            f"rewards: found {names}, but stage {stage} learns from none; set rewards to []"
            + (", or eval.suite to rewards" if stage == "sft" else "")
        )
    return problems


def _unused_switches(config: Config) -> list[str]:
    """Switches of `compat` that nothing in the run asks."""
    listed = {reward.label for reward in config.rewards}
    tasks = config.algorithm.tasks
    problems = []
    for switch in changed(config.compat):
        users = SWITCH_USERS.get(switch, ())
        if users and listed.isdisjoint(users):
            why = f"none of its rewards is listed ({' or '.join(users)})"
        elif not users and switch != "bfloat16_master" and config.stage != "rl":
            why = f"stage {config.stage} has no rollouts; it acts on those of rl alone"
        elif (switch, tasks) in (("text_top_k_50", "t2i"), ("image_logprobs_unshifted", "mm2t")):
            why = f"algorithm.tasks {tasks} leaves out the task that it acts on"
        else:
            continue
        problems.append(f"compat.{switch}: found True, but {why}; leave it out")
    return problems


def _unused_moments(config: Config) -> list[str]:
    options = config.optimizer
    unused = UNUSED_MOMENTS.get(options.name, ())
    return [
        f"optimizer.{name}: found {value}, but {options.name} does not use it; leave it at "
        f"{default} or choose another optimizer.name"
        for name, (value, default) in changed(options).items()
        if name in unused
    ]


def warmup_problems(config: Config, steps: int) -> list[str]:
    """Returns a problem if a run of `steps` ends before its learning rate is reached."""
    warmup = config.optimizer.warmup_steps
    iterations = config.algorithm.num_iterations if config.stage == "rl" else 1
    updates = steps * iterations
    if warmup < max(updates, 1):  # update number `warmup`, from 0, is the first at the full rate
        return []
    counted = f"{steps} steps" + (f" with {iterations} updates each" if iterations > 1 else "")
    return [
        f"optimizer.warmup_steps: found {warmup}, but the run has {counted}, so that it never "
        f"reaches optimizer.learning_rate; expected less than {updates}; lower it or train longer"
    ]


def _guards(config: Config) -> list[str]:
    """Guards of what the run does not do, and a watchdog that would not wait for a reward."""
    guards = config.guards
    problems = [
        f"guards.{name}: found {value!r}, but {why}; leave it at {default!r}"
        for name, (value, default) in changed(guards).items()
        if value is not None and (why := _blind(config, name))
    ]
    problems += [
        f"guards.fatal: found {name}, but {why}; drop it"
        for name in guards.fatal
        if (why := _blind(config, name) or _off(config, name))
    ]
    # One is called after the other.
    slow = [one for one in config.rewards if one.use]
    limit, longest = guards.step_timeout_s, sum(one.timeout_s + REWARD_GRACE_S for one in slow)
    if limit is not None and longest >= limit:
        problems.append(
            f"guards.step_timeout_s: {limit:g} is not above the {longest:g} s that the rewards "
            f"{' and '.join(one.label for one in slow)} may take by their "
            "timeout_s; raise the first or lower these"
        )
    return problems


def _off(config: Config, alarm: str) -> str:
    return "" if getattr(config.guards, alarm) is not None else f"guards.{alarm} is null"


def _blind(config: Config, guard: str) -> str:
    """Why a guard of a rollout or an evaluation has nothing to look at."""
    if guard in ("max_skipped_updates", "step_timeout_s", "fatal"):
        return ""
    if config.stage != "rl":
        return f"stage {config.stage} has no rollouts and rewards"
    reasons = {
        "kl": not config.algorithm.kl_coef and "algorithm.kl_coef 0 measures none",
        "duplicates": config.algorithm.tasks == "mm2t" and "algorithm.tasks mm2t draws nothing",
        "held_out": config.eval.suite == "none" and "eval.suite none evaluates nothing",
        "max_failed_reward_fraction": not any(reward.use for reward in config.rewards)
        and "no reward by use is listed",
    }
    return str(reasons.get(guard) or "")


def _processes(config: Config) -> list[str]:
    options = config.distributed
    problems = []
    if options.initialize == "never":
        problems += [
            f"distributed.{name}: found {value!r}, but distributed.initialize never starts nothing "
            "that reads it; leave it out"
            for name, (value, _) in changed(options).items()
            if name != "initialize"
        ]
    address = options.coordinator_address
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        problems.append(
            f"distributed.coordinator_address: found {address!r}; expected HOST:PORT of process 0, "
            "such as node1:1234"
        )
    index, count = options.process_id, options.num_processes
    if index is not None and count is not None and index >= count:
        problems.append(
            f"distributed.process_id: found {index} of {count} processes; expected 0 to {count - 1}"
        )
    return problems


def _places(config: Config) -> list[str]:
    """Where files go; in an object store no file can be locked or appended to."""
    problems = []
    if "://" in config.output_dir:
        problems.append(
            f"output_dir: found {config.output_dir!r}; expected a directory on a disk, which all "
            "processes see; to keep the checkpoints in a bucket set checkpoint.directory to "
            "gs://BUCKET/.."
        )
    directory = config.checkpoint.directory
    if directory is None or "://" not in directory:
        return problems
    if not directory.startswith("gs://"):
        problems.append(
            f"checkpoint.directory: found {directory!r}; expected a directory or gs://BUCKET/.."
        )
    elif not any(importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow")):
        problems.append(
            f"checkpoint.directory: found {directory!r}, but nothing here lists a bucket; run "
            "`pip install 'corl-jax[gcs]'`"
        )
    return problems


def _adapters(config: Config) -> list[str]:
    """What contradicts adapters, and what has no use without them."""
    lora, export = config.lora, config.export
    if not lora.rank:
        idle = {f"lora.{name}": values for name, values in changed(lora).items()}
        if export.lora != "merged":
            idle["export.lora"] = (export.lora, "merged")
        return [
            f"{key}: found {value!r}, but lora.rank 0 makes no adapters; set lora.rank or leave "
            f"it at {default!r}"
            for key, (value, default) in idle.items()
        ]
    problems = []
    if config.stage == "vq":
        problems.append(
            f"lora.rank: found {lora.rank}, but stage vq does not use the language model, "
            "which adapters are for; set it to 0"
        )
    elif "trainable" in changed(config.train):
        problems.append(
            f"train.trainable: found {config.train.trainable}, but with lora.rank {lora.rank} the "
            "adapters alone are trained; leave it out, or set lora.rank to 0"
        )
    if config.algorithm.reference == "host":
        problems.append(
            f"algorithm.reference: host, but with lora.rank {lora.rank} the reference is what is "
            "frozen and takes no memory of its own; leave it at 'device'"
        )
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        problems.append(
            f"lora.targets: found {lora.targets}, expected one projection or more, each once"
        )
    if export.lora == "adapter" and export.layout != "transformers":
        problems.append(
            f"export.lora: adapter, but export.layout {export.layout}; PEFT loads an adapter onto "
            "transformers' model alone: set export.layout to transformers, or export.lora to merged"
        )
    return problems
