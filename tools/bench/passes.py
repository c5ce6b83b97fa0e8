"""Measures forward passes over whole sequences: of the network alone, and log-probs as scored."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax

from corl_jax.models.attention import AttentionKernel
from corl_jax.policies.decoding import Rows
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.policies.show_o.reading import IMAGE_ORDERS, frame_codes, prepare_texts
from corl_jax.train.step import make_logprob_step
from corl_jax.types import EncodedPrompts, Params
from tools.bench.cost import count_forward_operations
from tools.bench.generation import make_codes, make_prompts
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record
from tools.bench.training import list_works, make_batch, make_update_options


def measure_forward(setting: Setting) -> Iterator[Record]:
    """Measures the network on prompts and images, up to the logits of the codes.

    `mfu` is of the operations that the mathematics needs (see `cost`; each prompt read once) at the
    measured rate of products. A pass reads all codes of an image at once.
    """
    size, params = setting.size, setting.make_policy(COMPUTE)
    prompts, codes = setting.place(make_prompts(setting, "t2i")), make_codes(setting)
    special, kernel = setting.processor.special, setting.attention
    call = functools.partial(
        _compute_logits, size.policy, params, prompts, codes, special=special, kernel=kernel
    )
    timing = setting.measure("forward", call)
    work = list_works(setting)[0]
    needed = count_forward_operations(size.costs, work, shared=True)
    tokens = work.prompts * work.prompt + work.rows * (work.length + size.costs.borders)
    figures: dict[str, Any] = {"tokens_per_s": tokens / timing.median, "attention": kernel}
    figures |= setting.compare_with_products(needed, timing.median)
    yield Record("forward", "texts and images to logits", timing, figures)


@functools.partial(jax.jit, static_argnames=("config", "special", "kernel"))
def _compute_logits(
    config: ShowOConfig, params: Params, prompts: EncodedPrompts, codes: jax.Array, *,
    special: Any, kernel: AttentionKernel,
) -> jax.Array:  # fmt: skip
    """Returns float32 logits [N, M, K] of the codes."""
    model = network.bind(config, params)
    ids, lengths = prepare_texts(prompts, Rows(len(codes) // len(prompts.input_ids)), special)
    _, hidden = model.language_model.read_parts(
        model.embed_text(ids), lengths, model.embed_text(frame_codes(codes, special)), IMAGE_ORDERS,
        attention=kernel,
    )  # fmt: skip
    return model.image_logits(hidden[:, 1:-1])


def measure_logprobs(setting: Setting) -> Iterator[Record]:
    """Measures log-probs of given completions, as of the policy before several updates.

    Codes in any order are scored in one pass. `mfu` is as that of the part forward.
    """
    params, batch = setting.make_policy(COMPUTE), make_batch(setting)
    step = make_logprob_step(setting.size.family, setting.size.policy, make_update_options(setting))
    for work in list_works(setting):
        call = functools.partial(step, params, {}, {work.task: batch[work.task]})
        timing = setting.measure(f"logprobs_{work.task}", call)
        needed = count_forward_operations(setting.size.costs, work, shared=True)
        figures = {"completions_per_s": setting.completions / timing.median}
        figures |= setting.compare_with_products(needed, timing.median)
        yield Record("logprobs", work.task, timing, figures | {"attention": setting.attention})
