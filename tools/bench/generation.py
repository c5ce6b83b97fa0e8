"""Measures the samplers and the image tokenizer: rollouts of `prompts` x `group` completions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from corl_jax.policies.choices import sample_keys
from corl_jax.policies.family import SamplingOptions, Unmasking
from corl_jax.tasks import TASKS
from corl_jax.types import EncodedPrompts, Segment
from tools.bench import inputs
from tools.bench.cost import Work, count_drawing_operations, count_step_bytes
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record

STREAMS = {"t2i": 0, "mm2t": 1}


def make_keys(setting: Setting, task: str) -> jax.Array:
    """Returns the keys of all completions of a task."""
    keys = sample_keys(0, np.arange(setting.prompts), setting.group, STREAMS[task])
    return setting.place(keys)


def make_prompts(setting: Setting, task: str) -> EncodedPrompts:
    """Returns left-padded prompts on the host."""
    size, special = setting.size, setting.processor.special
    if task == "t2i":
        return inputs.make_image_prompts(size, special, setting.prompts, size.image_prompt)
    return inputs.make_questions(size, special, setting.prompts, size.text_prompt)


def make_codes(setting: Setting) -> jax.Array:
    """Returns random codes [N, T] int32 of all completions, or latents [N, 1, h, w, C] float32."""
    size = setting.size
    if size.family.denoises:
        shape = (setting.completions, 1, *size.policy.latent_shape)
        return setting.place(np.random.default_rng(0).standard_normal(shape, np.float32))
    shape = (setting.completions, size.limits.image_tokens)
    count = size.measured.count_codes(size.policy)
    codes = np.random.default_rng(0).integers(0, count, shape)
    return setting.place(codes.astype(np.int32))


def make_sampling_options(setting: Setting, task: str, **changes: Any) -> SamplingOptions:
    """Returns the options of the paper; answers do not end before they have all their tokens."""
    options = SamplingOptions(
        # The end of text is a part of some prompts of images, and no code.
        special=setting.processor.special if task == "t2i" else setting.endless,
        max_new_tokens=setting.size.new_tokens, cfg_scale=setting.size.cfg_scale, dtype=COMPUTE,
        unmasking=Unmasking(setting.size.steps, "none"), denoising=setting.size.denoising,
    )  # fmt: skip
    return dataclasses.replace(options, **changes)


def make_samplers(setting: Setting, **changes: Any) -> dict[str, Any]:
    """Returns task -> (params, prompts, keys) -> Segment; `changes` are of the options."""
    # Not `policies.turns.sample_turn`, which makes and places keys in each call: here they are made
    # once, so that the time is that of the sampler.
    size = setting.size

    def make(task: str) -> Any:
        program = size.family.turns[TASKS[task].turn_kinds]
        options = make_sampling_options(setting, task, **changes)

        def sample(params: Any, prompts: EncodedPrompts, keys: jax.Array) -> Segment:
            (segment,) = program.sample(size.policy, params, prompts, keys, options)
            return segment

        return sample

    return {task: make(task) for task in STREAMS}


def measure_image(setting: Setting) -> Iterator[Record]:
    """Measures the image rollout: guided tokens alone, and with their pixels on the host.

    Milliseconds a step are of the tokens, prefill included. So are the fraction of the roofline,
    which is the time of a step's bytes (see `cost`) at the measured rate of copying, and for images
    that are drawn in any order or by denoising `mfu`, of the operations that the mathematics needs,
    at the measured rate of products.
    """
    return _measure_images(setting, "image", setting.size.cfg_scale)


def measure_unguided(setting: Setting) -> Iterator[Record]:
    """Measures the image rollout without guidance; see `measure_image`."""
    return _measure_images(setting, "unguided", 1.0)


def _measure_images(setting: Setting, part: str, cfg_scale: float) -> Iterator[Record]:
    size, params = setting.size, setting.make_policy(COMPUTE)
    prompts, keys = setting.place(make_prompts(setting, "t2i")), make_keys(setting, "t2i")
    sampler = make_samplers(setting, cfg_scale=cfg_scale)["t2i"]
    sample = functools.partial(sampler, params, prompts, keys)

    def sample_pixels() -> np.ndarray:
        codes = sample().values
        pixels = size.family.decode_images(size.policy, params, codes, dtype=setting.pixel_dtype)
        # On the host, where rewards read them: the copy is a part of the time.
        return np.asarray(pixels)

    tokens = setting.measure(f"{part}_tokens", sample)
    length, is_guided = size.limits.image_tokens, cfg_scale != 1
    work = Work("t2i", setting.prompts, setting.group, size.image_prompt, length, is_guided)
    if size.limits.caches_codes:
        figures = _describe_decoding(setting, work, tokens.median, length)
    else:
        figures = _describe_drawing(setting, work, tokens.median)
    drawn = "latents" if size.family.denoises else "tokens"
    figures["images_per_s"] = setting.completions / tokens.median
    yield Record(part, drawn, tokens, figures)
    whole = setting.measure(part, sample_pixels)
    rate = {"images_per_s": setting.completions / whole.median}
    yield Record(part, f"{drawn} and pixels", whole, rate)


def measure_text(setting: Setting) -> Iterator[Record]:
    """Measures the text rollout: all of it, and its first token: reading the image, and prefill.

    Milliseconds a step and the fraction of the roofline are of the tokens after the first.
    """
    size, params = setting.size, setting.make_policy(COMPUTE)
    prompts, keys = setting.place(make_prompts(setting, "mm2t")), make_keys(setting, "mm2t")
    sample_first, sample_answers = (
        functools.partial(make_samplers(setting, max_new_tokens=n)["mm2t"], params, prompts, keys)
        for n in (1, size.new_tokens)
    )
    prefill, whole = (
        setting.measure("text_prefill", sample_first),
        setting.measure("text", sample_answers),
    )
    if not bool(sample_answers().mask.all()):
        raise RuntimeError("an answer ended early: the time is that of fewer tokens")
    yield Record("text", "vision, prefill, first token", prefill, {})
    length = size.new_tokens
    work = Work("mm2t", setting.prompts, setting.group, size.text_prompt, length)
    rate = {"tokens_per_s": setting.completions * length / whole.median}
    # Work that is smaller than the noise is measured with its prefill.
    later = whole.median - prefill.median
    spent = (later, length - 1) if later > 0 else (whole.median, length)
    decoding = _describe_decoding(setting, work, *spent)
    yield Record("text", "answers", whole, rate | decoding)


def measure_vq(setting: Setting) -> Iterator[Record]:
    """Measures codes, or latents, to pixels, uint8 on the host."""
    size, params, codes = setting.size, setting.make_policy(COMPUTE), make_codes(setting)

    def decode() -> np.ndarray:
        pixels = size.family.decode_images(size.policy, params, codes, dtype=setting.pixel_dtype)
        return np.asarray(pixels)

    timing = setting.measure("vq", decode)
    rate = setting.completions / timing.median
    name = f"{'latents' if size.family.denoises else 'codes'} to pixels"
    yield Record("vq", name, timing, {"images_per_s": rate})


def _describe_decoding(setting: Setting, work: Work, seconds: float, steps: int) -> dict[str, Any]:
    """Returns the cost of decode steps, against the time of the bytes that one device reads."""
    step = seconds / steps
    # Devices along data and fsdp split the prompts; those along tensor split the bytes.
    device_work = dataclasses.replace(work, prompts=work.prompts // setting.num_batch_shards)
    figures: dict[str, Any] = {"ms_per_step": 1e3 * step}
    for name, shared in (("", False), ("_shared_prompt", True)):
        moved = (
            count_step_bytes(setting.size.costs, device_work, shared) / setting.mesh.shape["tensor"]
        )
        figures[f"gb_per_step{name}"] = moved / 1e9
        figures[f"roofline_fraction{name}"] = moved / setting.ceilings.copy / step
    return figures


def _describe_drawing(setting: Setting, work: Work, seconds: float) -> dict[str, Any]:
    """Returns the cost of drawing images in steps, against the measured rate of products."""
    steps = setting.size.measured.count_steps(setting.size.policy, setting.unmasking)
    needed = count_drawing_operations(setting.size.costs, work, steps)
    return {"steps": steps, "ms_per_step": 1e3 * seconds / steps} | setting.compare_with_products(
        needed, seconds
    )
