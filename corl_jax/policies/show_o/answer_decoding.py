"""Reads question prompts of a Show-o once, and decodes answers behind them token by token.

The image in such a prompt is seen by all tokens, also by those before it. Other tokens are seen by
later ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.devices.mesh import constrain
from corl_jax.models.attention import DecodeKernel
from corl_jax.models.phi import Block, KVCache, Phi
from corl_jax.policies.decode_attention import Step, attend_step
from corl_jax.policies.decoding import Decoder, read_prompts


def read_question_prompts(
    phi: Phi, embeds: jax.Array, mask: jax.Array, is_seen: jax.Array, attention: DecodeKernel
) -> tuple[Decoder, jax.Array]:
    """Reads left-padded prompts [B, P, D]; returns a decoder and their last states [B, D].

    `is_seen` [B or 1, P] marks the tokens that all others see, with the padding behind the prompts.
    """
    network = _SeeingPhi(phi, is_seen)
    return read_prompts(network, embeds, mask, attention, DecodeBlock)


@dataclasses.dataclass(frozen=True)
class DecodeBlock:
    """A block for one token of each row."""

    block: Block

    def __call__(
        self, x: jax.Array, prompt: KVCache | None, cache: KVCache, step: Step
    ) -> tuple[jax.Array, KVCache]:
        """Returns x [rows, D] after this block, and the cache with the token's key and value.

        `prompt` is None if the cache begins with a copy of the prompt.
        """
        attn = self.block.attn
        normed = self.block.input_layernorm(x)
        # [rows, D] -> a sequence of one token, [rows, 1, D], and back
        cos, sin = step.rope
        heads = attn.project(normed[:, None], (cos[:, None], sin[:, None]))
        query, key, value = (x[:, 0] for x in heads)
        attended, cache = attend_step(query, (key, value), prompt, cache, step)
        return constrain(x + attn.dense(attended) + self.block.mlp(normed), "batch", "embed"), cache


@dataclasses.dataclass(frozen=True)
class _SeeingPhi:
    """A Phi as `decoding.Network`, with tokens in prompts that all others see."""

    phi: Phi
    is_seen: jax.Array  # [B or 1, P] bool

    @property
    def layers(self) -> Any:
        return self.phi.layers

    @property
    def norm(self) -> Any:
        return self.phi.norm

    def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.phi.rope(positions)

    def prefill(self, embeds: jax.Array, mask: jax.Array) -> tuple[jax.Array, KVCache]:
        places = jnp.arange(mask.shape[1])
        # is_seen 1100: rows [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]. The padding,
        # which `decoding` moves behind the prompt, is later than every real token.
        seen = (places <= places[:, None]) | self.is_seen[:, None]
        return self.phi.prefill(embeds, jnp.broadcast_to(seen, (len(mask), *seen.shape[1:])))
