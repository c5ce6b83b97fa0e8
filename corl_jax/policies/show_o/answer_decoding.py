"""Reads question prompts of a Show-o once, and decodes answers behind them token by token.

The front of such a prompt, from the task's token to the end of the image, is one block whose tokens
all see each other. The question and the answer behind it are causal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.devices.mesh import constrain
from corl_jax.models.attention import DecodeKernel
from corl_jax.models.phi import Block, KVCache, Phi
from corl_jax.policies.decoding import Decoder, Step, attend_step, read_prompts


def read_question_prompts(
    phi: Phi, embeds: jax.Array, mask: jax.Array, front: int, attention: DecodeKernel
) -> tuple[Decoder, jax.Array]:
    """Reads left-padded prompts [B, P, D]; returns a decoder and their last states [B, D].

    The first `front` real tokens of a prompt see each other; 0 makes the whole prompt causal.
    """
    network = _FrontedPhi(phi, front)
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
class _FrontedPhi:
    """A Phi as `decoding.Network`, whose prompts begin with `front` tokens that see each other."""

    phi: Phi
    front: int

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
        # front 2 of 4: rows [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]. The padding,
        # which `decoding` moves behind the prompt, is later than every real token.
        seen = (places <= places[:, None]) | (places < self.front)
        return self.phi.prefill(embeds, jnp.broadcast_to(seen, (len(mask), *seen.shape)))
