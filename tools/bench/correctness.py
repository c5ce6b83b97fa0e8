"""Checks whether samplers and trainer agree at full size: their log-probs of the same tokens.

Hidden states are compared through these log-probs, because samplers do not return them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS, LossConstants
from corl_jax.models.attention import AttentionKernel
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus import sampling
from corl_jax.policies.janus.family import FAMILY
from corl_jax.tasks import TASKS
from corl_jax.train.step import TaskBatch, UpdateOptions, make_logprob_step
from corl_jax.types import EncodedPrompts, Params, Segment
from tools.bench import inputs
from tools.bench.generation import CFG_SCALE, STREAMS
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record

PROMPTS, GROUP = 2, 2
COMPARED = 64  # tokens that greedy decoding is compared over

Scorer = Callable[[str, EncodedPrompts, Any], np.ndarray]
"""(task, prompts, tokens) -> log-probs [N, T] by the trainer."""


def measure_correctness(setting: Setting) -> Iterator[Record]:
    """Measures two prompts of different length with two completions each.

    At tiny size only float32 is measured. Differences are absolute, in nats. Float32 products have
    full precision.

    `cached`: log-probs that the samplers recorded against the trainer's of the same tokens.
    `padded`: the shorter prompt in the batch against the same prompt alone, without padding.
    Log-probs of the trainer for the same tokens, and greedy decoding. Greedy tokens may differ from
    the first near tie on, so their log-probs are compared up to the first that differs. `repeated`:
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
        del params


def compare_task(setting: Setting, task: str, params: Params, dtype: Any) -> Iterator[Record]:
    """Yields the records of one task."""
    prompts, sample = make_prompts(setting, task), make_sampler(setting, task, params, dtype)
    score = make_scorer(setting, params, dtype)
    keys = sample_keys(0, np.arange(PROMPTS), GROUP, STREAMS[task])
    name = f"{task}, {dtype.name}"
    rollout = sample(prompts, keys)
    trainer_logprobs = score(task, prompts, rollout.values)
    figures = measure_difference(rollout.logprobs, trainer_logprobs)
    figures["logp_mean"] = float(np.mean(trainer_logprobs))
    yield Record("correctness", f"{name}: cached", None, figures)
    figures = compare_tokens(rollout, sample(prompts, keys))
    yield Record("correctness", f"{name}: repeated", None, figures)

    # The shorter prompt is the last.
    alone, tokens = remove_padding(prompts, -1), rollout.values[-GROUP:]
    figures = measure_difference(trainer_logprobs[-GROUP:], score(task, alone, tokens))
    # G = 2: one key for each prompt, of its first completion. Greedy decoding does not use it.
    batched = sample(prompts, keys[::GROUP], greedy=True)
    single = sample(alone, keys[::GROUP][-1:], greedy=True)
    yield Record("correctness", f"{name}: padded", None, figures | compare_greedy(batched, single))


def make_prompts(setting: Setting, task: str) -> EncodedPrompts:
    """Returns PROMPTS prompts, the first without padding and the last with some."""
    size, special = setting.size, setting.processor.special
    make, length = {
        "t2i": (inputs.make_image_prompts, size.image_prompt),
        "mm2t": (inputs.make_questions, size.text_prompt),
    }[task]
    made = (make(size.janus, special, PROMPTS, length, seed) for seed in itertools.count())
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


def make_sampler(setting: Setting, task: str, params: Params, dtype: Any) -> Callable[..., Segment]:
    """Returns (prompts, keys, greedy=) -> Segment; greedy answers have COMPARED tokens."""
    config, special, most = setting.size.janus, setting.endless, setting.size.new_tokens

    def sample(prompts: EncodedPrompts, keys: jax.Array, greedy: bool = False) -> Segment:
        placed, options = setting.place(prompts), {"greedy": greedy, "dtype": dtype}
        if task == "t2i":
            return sampling.sample_images(
                config, params, placed, keys, special=special, cfg_scale=CFG_SCALE, **options
            )
        length = min(COMPARED, most) if greedy else most
        return sampling.sample_text(
            config, params, placed, keys, special=special, max_new_tokens=length, **options
        )

    return sample


def make_scorer(setting: Setting, params: Params, dtype: Any) -> Scorer:
    """Returns the trainer's log-prob step."""
    # Float32 is scored by XLA: cuDNN attends in half precision only.
    kernel = setting.attention if dtype == COMPUTE else "xla"
    step = _make_logprob_step(setting.size.janus, setting.processor.special, dtype, kernel)

    def score(task: str, prompts: EncodedPrompts, tokens: Any) -> np.ndarray:
        (kind,) = TASKS[task].turn.segments
        batch = TaskBatch(prompts, (Segment(kind, tokens, np.ones(tokens.shape, bool)),))
        return np.asarray(step(params, {}, setting.place({task: batch}))[task][0])

    return score


@functools.lru_cache(maxsize=4)
def _make_logprob_step(config: Any, special: Any, dtype: Any, kernel: AttentionKernel) -> Callable:
    scoring = LogprobOptions(special, remat="none", attention=kernel)
    options = UpdateOptions(CLIPPED_POLICY_LOSS, LossConstants(), scoring, (), dtype=dtype)
    return make_logprob_step(FAMILY, config, options)


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
