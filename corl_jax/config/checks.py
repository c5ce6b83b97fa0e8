"""Checks options against each other: refuses contradictions.

Types and ranges are checked by pydantic, in `schema`; options without effect are found in
`readers`.
"""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING

from corl_jax.config.readers import LONG_TASKS, list_changes
from corl_jax.config.stages import STAGE_FACTS
from corl_jax.errors import Problems
from corl_jax.nearest import nearest_divisors
from corl_jax.tasks import TASKS, choose_tasks

if TYPE_CHECKING:
    from corl_jax.config.schema import Config

REWARD_GRACE_S = 1.0
"""Seconds beyond its timeout_s that a reward by `use` has to end tidily."""


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
