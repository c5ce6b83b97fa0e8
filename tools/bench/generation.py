"""Measures the samplers and the image tokenizer: rollouts of `prompts` x `group` completions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from corl_jax.policies.choices import sample_keys
from corl_jax.policies.janus import sampling
from corl_jax.policies.janus.images import decode_images
from corl_jax.types import EncodedPrompts, Segment
from tools.bench import inputs
from tools.bench.cost import Work, count_step_bytes
from tools.bench.setting import COMPUTE, Setting
from tools.bench.timing import Record

CFG_SCALE = 5.0
STREAMS = {"t2i": 0, "mm2t": 1}


def make_keys(setting: Setting, task: str) -> jax.Array:
    """Returns the keys of all completions of a task."""
    keys = sample_keys(0, np.arange(setting.prompts), setting.group, STREAMS[task])
    return setting.place(keys)


def make_prompts(setting: Setting, task: str) -> EncodedPrompts:
    """Returns left-padded prompts on the host."""
    size, special = setting.size, setting.processor.special
    if task == "t2i":
        return inputs.make_image_prompts(size.janus, special, setting.prompts, size.image_prompt)
    return inputs.make_questions(size.janus, special, setting.prompts, size.text_prompt)


def make_codes(setting: Setting) -> jax.Array:
    """Returns random codes [N, T] int32 of all completions."""
    config = setting.size.janus
    shape = (setting.completions, config.num_image_tokens)
    codes = np.random.default_rng(0).integers(0, config.vq.num_embeddings, shape)
    return setting.place(codes.astype(np.int32))


def make_samplers(setting: Setting) -> dict[str, Any]:
    """Returns task -> (params, prompts, keys) -> Segment, with the options of the paper."""
    # Not `policies.turns.sample_turn`, which makes and places keys in each call: here they are made
    # once, so that the time is that of the sampler.
    images = functools.partial(
        sampling.sample_images, setting.size.janus,
        special=setting.endless, cfg_scale=CFG_SCALE, temperature=1.0, dtype=COMPUTE,
    )  # fmt: skip
    texts = functools.partial(
        sampling.sample_text, setting.size.janus, special=setting.endless,
        max_new_tokens=setting.size.new_tokens, temperature=1.0, dtype=COMPUTE,
    )  # fmt: skip
    return {"t2i": images, "mm2t": texts}


def measure_image(setting: Setting) -> Iterator[Record]:
    """Measures the image rollout: guided tokens alone, and with their pixels on the host.

    Milliseconds a step and the fraction of the roofline are of the tokens, prefill included. The
    roofline is the time of a step's bytes (see `cost`) at the measured rate of copying.
    """
    size, params = setting.size, setting.make_policy(COMPUTE)
    prompts, keys = setting.place(make_prompts(setting, "t2i")), make_keys(setting, "t2i")
    sample = functools.partial(make_samplers(setting)["t2i"], params, prompts, keys)

    def sample_pixels() -> np.ndarray:
        pixels = decode_images(size.janus, params, sample().values, dtype=setting.pixel_dtype)
        # On the host, where rewards read them: the copy is a part of the time.
        return np.asarray(pixels)

    tokens = setting.measure("image_tokens", sample)
    length = size.janus.num_image_tokens
    work = Work("t2i", setting.prompts, setting.group, size.image_prompt, length, guided=True)
    yield Record(
        "image", "tokens", tokens, _describe_decoding(setting, work, tokens.median, length)
    )
    whole = setting.measure("image", sample_pixels)
    yield Record(
        "image", "tokens and pixels", whole, {"images_per_s": setting.completions / whole.median}
    )


def measure_text(setting: Setting) -> Iterator[Record]:
    """Measures the text rollout: all of it, and its first token, which is vision tower and prefill.

    Milliseconds a step and the fraction of the roofline are of the tokens after the first.
    """
    size, params = setting.size, setting.make_policy(COMPUTE)
    prompts, keys = setting.place(make_prompts(setting, "mm2t")), make_keys(setting, "mm2t")
    sample = make_samplers(setting)["mm2t"]

    def sample_first() -> Segment:
        return sample(params, prompts, keys, max_new_tokens=1)

    def sample_answers() -> Segment:
        return sample(params, prompts, keys)

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
    """Measures codes to pixels, uint8 on the host."""
    config, params, codes = setting.size.janus, setting.make_policy(COMPUTE), make_codes(setting)

    def decode() -> np.ndarray:
        return np.asarray(decode_images(config, params, codes, dtype=setting.pixel_dtype))

    timing = setting.measure("vq", decode)
    rate = setting.completions / timing.median
    yield Record("vq", "codes to pixels", timing, {"images_per_s": rate})


def _describe_decoding(setting: Setting, work: Work, seconds: float, steps: int) -> dict[str, Any]:
    """Returns the cost of decode steps, against the time of the bytes that one device reads."""
    step = seconds / steps
    # Devices along data and fsdp split the prompts; those along tensor split the bytes.
    device_work = dataclasses.replace(work, prompts=work.prompts // setting.num_batch_shards)
    figures: dict[str, Any] = {"ms_per_step": 1e3 * step}
    for name, shared in (("", False), ("_shared_prompt", True)):
        moved = (
            count_step_bytes(setting.size.janus, device_work, shared) / setting.mesh.shape["tensor"]
        )
        figures[f"gb_per_step{name}"] = moved / 1e9
        figures[f"roofline_fraction{name}"] = moved / setting.ceilings.copy / step
    return figures
