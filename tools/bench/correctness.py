"""Checks whether samplers and trainer agree at full size: their log-probs of the same tokens.

Hidden states are compared through these log-probs, because samplers do not return them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS, LossConstants
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.family import Family, LogprobOptions, Unmasking
from corl_jax.tasks import TASKS
from corl_jax.train.step import TaskBatch, UpdateOptions, make_logprob_step
from corl_jax.types import EncodedPrompts, Params, Segment
from tools.bench import inputs
from tools.bench.generation import STREAMS, make_sampling_options
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record

PROMPTS, GROUP = 2, 2
COMPARED = 64  # tokens that greedy decoding is compared over

Scorer = Callable[[str, EncodedPrompts, Segment], np.ndarray]
"""(task, prompts, completions) -> log-probs [N, T] by the trainer."""


def measure_correctness(setting: Setting) -> Iterator[Record]:
    """Measures two prompts of different length with two completions each.

    At tiny size only float32 is measured. Differences are absolute, in nats. Float32 products have
    full precision.

    `cached`: log-probs that the samplers recorded against the trainer's of the same tokens. Codes
    that are drawn in any order are scored under the codes that were known when they were drawn, in
    a pass for each step, and a second time in one pass (`one_shot`) that hides a share of them.
    `padded`: the shorter prompt in the batch against the same prompt alone, without padding.
    Log-probs of the trainer for the same tokens, and greedy decoding. Greedy tokens may differ from
    the first near tie on, so their log-probs are compared up to the first that differs, of codes in
    any order not at all. `repeated`:
    the fraction of tokens that a second call with the same keys gives again, and the number of
    tokens before the first that differs. GPUs may sum in another order.
    """
    for dtype in map(jnp.dtype, setting.size.checked):
        params = setting.make_policy(dtype)
        # TPUs and GPUs otherwise compute float32 products with fewer bits.
        precision = "highest" if dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision):
            for task in STREAMS:
                yield from compare_task(setting, task, params, dtype)
            if is_any_order(setting, "t2i"):
                yield compare_one_shot(setting, params, dtype)
        del params


def is_any_order(setting: Setting, task: str) -> bool:
    """Returns whether the choices of a task are drawn in any order."""
    return setting.size.family.turns[TASKS[task].turn_kinds].choose_scored is not None


def compare_one_shot(setting: Setting, params: Params, dtype: Any) -> Record:
    """Returns the record of images whose codes are scored in one pass."""
    prompts, unmasking = make_prompts(setting, "t2i"), setting.unmasking
    keys = sample_keys(0, np.arange(PROMPTS), GROUP, STREAMS["t2i"])
    rollout = make_sampler(setting, "t2i", params, dtype, unmasking)(prompts, keys)
    trainer_logprobs = make_scorer(setting, params, dtype, unmasking)("t2i", prompts, rollout)
    figures = measure_difference(rollout.logprobs, trainer_logprobs)
    return Record("correctness", f"t2i, {dtype.name}: one_shot", None, figures)


def compare_task(setting: Setting, task: str, params: Params, dtype: Any) -> Iterator[Record]:
    """Yields the records of one task."""
    prompts, sample = make_prompts(setting, task), make_sampler(setting, task, params, dtype)
    score = make_scorer(setting, params, dtype)
    keys = sample_keys(0, np.arange(PROMPTS), GROUP, STREAMS[task])
    name = f"{task}, {dtype.name}"
    rollout = sample(prompts, keys)
    trainer_logprobs = score(task, prompts, rollout)
    figures = measure_difference(rollout.logprobs, trainer_logprobs)
    figures["logp_mean"] = float(np.mean(trainer_logprobs))
    yield Record("correctness", f"{name}: cached", None, figures)
    figures = compare_tokens(rollout, sample(prompts, keys))
    yield Record("correctness", f"{name}: repeated", None, figures)

    # The shorter prompt is the last.
    alone, last = remove_padding(prompts, -1), jax.tree.map(lambda x: x[-GROUP:], rollout)
    figures = measure_difference(trainer_logprobs[-GROUP:], score(task, alone, last))
    # G = 2: one key for each prompt, of its first completion. Greedy decoding does not use it.
    batched = sample(prompts, keys[::GROUP], greedy=True)
    single = sample(alone, keys[::GROUP][-1:], greedy=True)
    greedy = compare_greedy(batched, single)
    if is_any_order(setting, task):  # the first place that differs is not the first in time
        greedy = {"greedy_agreement": greedy["greedy_agreement"]}
    yield Record("correctness", f"{name}: padded", None, figures | greedy)


def make_prompts(setting: Setting, task: str) -> EncodedPrompts:
    """Returns PROMPTS prompts, the first without padding and the last with some."""
    size, special = setting.size, setting.processor.special
    make, length = {
        "t2i": (inputs.make_image_prompts, size.image_prompt),
        "mm2t": (inputs.make_questions, size.text_prompt),
    }[task]
    made = (make(size, special, PROMPTS, length, seed) for seed in itertools.count())
    # A seed may give all prompts the full length; then the next one is tried.
    return next(prompts for prompts in made if not prompts.attention_mask[-1].all())


def remove_padding(prompts: EncodedPrompts, row: int) -> EncodedPrompts:
    """Returns one prompt alone, without its padding."""
    real = prompts.attention_mask[row]
    pixels = prompts.pixel_values
    return EncodedPrompts(
        prompts.input_ids[row][real][None],
        real[real][None],
        None if pixels is None else pixels[row][None],
    )


def make_sampler(
    setting: Setting, task: str, params: Params, dtype: Any, unmasking: Unmasking | None = None
) -> Callable[..., Segment]:
    """Returns (prompts, keys, greedy=) -> Segment; greedy answers have COMPARED tokens."""
    size, most = setting.size, setting.size.new_tokens
    program = size.family.turns[TASKS[task].turn_kinds]

    def sample(prompts: EncodedPrompts, keys: jax.Array, greedy: bool = False) -> Segment:
        options = make_sampling_options(
            setting, task, dtype=dtype, greedy=greedy,
            max_new_tokens=min(COMPARED, most) if greedy else most,
            unmasking=unmasking or make_trajectory(setting),
        )  # fmt: skip
        (segment,) = program.sample(size.policy, params, setting.place(prompts), keys, options)
        return segment

    return sample


def make_trajectory(setting: Setting) -> Unmasking:
    """Returns the form in which each code is scored as it was drawn."""
    return dataclasses.replace(setting.unmasking, logprobs="trajectory")


def make_scorer(
    setting: Setting, params: Params, dtype: Any, unmasking: Unmasking | None = None
) -> Scorer:
    """Returns the trainer's log-prob step."""
    # Float32 is scored by XLA: cuDNN attends in half precision only.
    scoring = LogprobOptions(
        setting.processor.special, remat="none",
        attention=setting.attention if dtype == COMPUTE else "xla",
        unmasking=unmasking or make_trajectory(setting),
    )  # fmt: skip
    step = _make_logprob_step(setting.size.family, setting.size.policy, scoring, dtype)

    def score(task: str, prompts: EncodedPrompts, segment: Segment) -> np.ndarray:
        given = dataclasses.replace(
            segment, mask=np.ones(segment.values.shape, bool), logprobs=None
        )
        batch = TaskBatch(prompts, (given,))
        return np.asarray(step(params, {}, setting.place({task: batch}))[task][0])

    return score


@functools.lru_cache(maxsize=4)
def _make_logprob_step(family: Family, sizes: Any, scoring: LogprobOptions, dtype: Any) -> Callable:
    options = UpdateOptions(CLIPPED_POLICY_LOSS, LossConstants(), scoring, (), dtype=dtype)
    return make_logprob_step(family, sizes, options)


def measure_difference(first: Any, second: Any) -> dict[str, float]:
    """Returns the mean and the largest absolute difference of log-probs."""
    apart = np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64))
    return {"difference_mean": float(apart.mean()), "difference_max": float(apart.max())}


def compare_tokens(first: Segment, second: Segment) -> dict[str, float]:
    """Returns the fraction of equal tokens, and the number of first steps with all tokens equal."""
    same = np.asarray(first.values) == np.asarray(second.values)
    # The added False ends the prefix if all are equal: argmin finds the first False.
    prefix = int(np.argmin([*same.all(axis=0), False]))
    return {"repeated_agreement": float(same.mean()), "repeated_prefix": prefix}


def compare_greedy(batched: Segment, single: Segment) -> dict[str, float]:
    """Compares the last row of a batch with the same prompt alone, up to the first other token."""
    first, second = (
        (np.asarray(x.values)[-1, :COMPARED], np.asarray(x.logprobs)[-1, :COMPARED])
        for x in (batched, single)
    )
    same = first[0] == second[0]
    prefix = int(np.argmin([*same, False]))
    # With the first token that differs: both log-probs come from the same context.
    shown = slice(0, min(prefix + 1, len(same)))
    together = measure_difference(first[1][shown], second[1][shown])
    return {
        "greedy_agreement": float(same.mean()),
        "greedy_prefix": prefix,
        **{f"greedy_{name}": value for name, value in together.items()},
    }
