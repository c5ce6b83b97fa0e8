"""Times rollouts in PyTorch: transformers' `generate`, and the reference's loop over tokens."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from corl_jax.types import EncodedPrompts
from tools.bench import inputs
from tools.bench.peer.model import Peer

WARM_UP = 4  # tokens of the pass that is not timed
TOP_K = 50  # transformers' default, which the reference samples answers with


def make_image_prompts(peer: Peer) -> EncodedPrompts:
    """Returns the image prompts of the benchmark."""
    size = peer.size
    return inputs.make_image_prompts(size, peer.special, peer.prompts, size.image_prompt)


def make_questions(peer: Peer) -> EncodedPrompts:
    """Returns the questions of the benchmark."""
    size = peer.size
    return inputs.make_questions(size, peer.special, peer.prompts, size.text_prompt)


def time_generated_images(peer: Peer) -> tuple[list[float], dict[str, Any]]:
    """Times `generate(generation_mode="image")` with its static cache, and pixels on the host."""
    model, prompts = peer.model, make_image_prompts(peer)
    ids, mask = peer.to_tensor(prompts.input_ids), peer.to_tensor(prompts.attention_mask).long()

    def sample(steps: int) -> torch.Tensor:
        with set_image_tokens(model, steps), patch_static_cache(model):
            return model.generate(
                ids, attention_mask=mask, generation_mode="image", num_return_sequences=peer.group
            )

    return _time_images(peer, sample)


@contextlib.contextmanager
def set_image_tokens(model: Any, count: int) -> Iterator[None]:
    """Sets the tokens of an image, which `generate` reads from the vision tower's config."""
    config = model.model.vision_model.config
    full, config.num_image_tokens = config.num_image_tokens, count
    try:
        yield
    finally:
        config.num_image_tokens = full


@contextlib.contextmanager
def patch_static_cache(model: Any) -> Iterator[None]:
    """Patches image generation so that it can make its cache in transformers 5.17."""
    # There `_prepare_static_cache` has an argument that Janus's `generate` does not give:
    # "TypeError: ... missing 1 required positional argument: 'prefill_chunk_size'". 5.23 gives
    # None; there the patch changes nothing.
    prepare = model._prepare_static_cache
    if "prefill_chunk_size" not in inspect.signature(prepare).parameters:
        yield
        return
    model._prepare_static_cache = functools.partial(prepare, prefill_chunk_size=None)
    try:
        yield
    finally:
        del model._prepare_static_cache


def time_looped_images(peer: Peer) -> tuple[list[float], dict[str, Any]]:
    """Times the reference's loop, whose cache grows by a token a step, and pixels on the host."""
    ids, mask = make_guided_rows(peer, make_image_prompts(peer))
    return _time_images(peer, functools.partial(sample_codes, peer, ids, mask))


def make_guided_rows(
    peer: Peer, prompts: EncodedPrompts, group: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and mask [2 N, P]: two rows for each completion, each with its own prompt.

    `group` is the number of completions of a prompt, if it is not the peer's.
    """
    copies = 2 * (group or peer.group)
    # G = 2: [p0, p1] -> [p0, p0, p0, p0, p1, ..]: a conditional and an unconditional row for each
    # completion.
    ids, mask = (
        peer.to_tensor(x).repeat_interleave(copies, dim=0)
        for x in (prompts.input_ids, prompts.attention_mask)
    )
    structure = torch.tensor([peer.special.bos, peer.special.boi], device=ids.device)
    # Unconditional rows keep BOS and BOI; their words become padding.
    ids[1::2] = torch.where(torch.isin(ids[1::2], structure), ids[1::2], peer.special.pad)
    return ids, mask.long()


@torch.inference_mode()
def sample_codes(peer: Peer, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> torch.Tensor:
    """Samples codes [N, steps] of prompts [2 N, P]; the first row of a pair is conditional."""
    model = peer.model
    embeds, outputs = model.model.language_model.embed_tokens(ids), []
    cache = DynamicCache()
    for _ in range(steps):
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = model.model.generation_head(hidden)
        conditional, unconditional = logits[0::2], logits[1::2]
        mixed = unconditional + peer.size.cfg_scale * (conditional - unconditional)
        token = torch.multinomial(torch.softmax(mixed, dim=-1), 1)
        outputs.append(token)
        # Both rows of a pair go on with the token that was sampled from their mix: [a, b] -> [a, a,
        # b, b].
        embeds = model.prepare_embeddings_for_image_generation(token.repeat(1, 2).view(-1, 1))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.cat(outputs, dim=1)


def _time_images(
    peer: Peer, sample: Callable[[int], torch.Tensor]
) -> tuple[list[float], dict[str, Any]]:
    """Times `sample`, steps -> codes [N, steps], and the pixels of its codes."""
    steps, count = peer.size.limits.image_tokens, peer.prompts * peer.group
    # A few tokens, repeated to the length of an image, also warm up the decoder.
    codes = sample(WARM_UP).repeat(1, steps)[:, :steps]
    decode_pixels(peer.model, codes)

    def sample_tokens() -> None:
        nonlocal codes
        codes = sample(steps)

    sampling_seconds = peer.time_call(sample_tokens)
    if codes.shape != (count, steps):
        raise RuntimeError(f"sampled codes {tuple(codes.shape)}, expected {(count, steps)}")
    whole = sampling_seconds + peer.time_call(lambda: decode_pixels(peer.model, codes))
    return [whole], {"images_per_s": count / whole, "ms_per_step": 1e3 * sampling_seconds / steps}


@torch.inference_mode()
def decode_pixels(model: Any, codes: torch.Tensor) -> np.ndarray:
    """Returns uint8 [N, S, S, 3] on the host."""
    pixels = model.decode_image_tokens(codes).float()
    return ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()


def time_generated_texts(peer: Peer) -> tuple[list[float], dict[str, Any]]:
    """Times `generate` as in the reference, on embedded prompts; images are read once a prompt.

    Answers never end and are sampled with top-k 50; their cache grows by a token a step.
    """
    prompts, steps = make_questions(peer), peer.size.new_tokens
    mask, pixels = peer.to_tensor(prompts.attention_mask).long(), make_torch_pixels(peer, prompts)

    @torch.inference_mode()
    def answer(count: int) -> torch.Tensor:
        return peer.model.generate(
            inputs_embeds=peer.embed_prompts(prompts, pixels), attention_mask=mask, do_sample=True,
            top_k=TOP_K, max_new_tokens=count, num_return_sequences=peer.group,
        )  # fmt: skip

    answer(WARM_UP)
    outputs: list[torch.Tensor] = []
    spent = peer.time_call(lambda: outputs.append(answer(steps)))
    expected = (peer.prompts * peer.group, steps)
    if outputs[0].shape != expected:
        raise RuntimeError(f"sampled tokens {tuple(outputs[0].shape)}, expected {expected}")
    return [spent], {"tokens_per_s": outputs[0].numel() / spent, "ms_per_step": 1e3 * spent / steps}


def make_torch_pixels(peer: Peer, prompts: EncodedPrompts) -> torch.Tensor:
    """Returns pixels [B, 3, S, S]."""
    return peer.to_tensor(prompts.pixel_values).permute(0, 3, 1, 2).contiguous()
