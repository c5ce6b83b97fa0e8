"""Counts the work that the mathematics needs: bytes of a decode step, operations of an update.

In the language model D is the width, F that of its feed-forward, L the layers, H the heads' total
width (K that of the keys), V the text vocabulary, C the image codes and W the inner width of the
image head. A prompt has P tokens, an answer T.

Decode step, bytes that must be read, weights and keys and values in bfloat16:

    2 (L (D H + 2 D K + H D + 3 D F) + head)            every weight once; head = D V or D W + W C
    + 4 L K * rows * (P + T / 2)                        each row's own keys and values, on average
    or 4 L K * (prompts * P + rows * T / 2)             the prompt's read once for its whole group

Training step, operations; the backward pass counts twice the forward, recomputation not at all:

    6 N * tokens read + 6 head * tokens scored          N: weights of the layers
    + 12 L H * pairs of a query and a key that it sees

With A weights of adapters the frozen matrices have no gradient: 4 instead of 6, and
6 A * tokens read in addition.

A pair is two products of the forward pass, 2 H operations each. A prompt has P^2 / 2 pairs, an
answer T P + T^2 / 2. `shared`: each prompt is read once, as in this project; otherwise once for
every answer, as in the reference.
"""

from __future__ import annotations

import dataclasses
import math
import re

from corl_jax.params import leaf_paths
from corl_jax.policies.janus import network
from corl_jax.policies.janus.layout import ADAPTER_PATHS
from corl_jax.policies.janus.network import JanusConfig

BYTES = 2  # of a bfloat16


def count_layer_weights(config: JanusConfig) -> int:
    """Counts the weights of all layers of the language model, without norms."""
    llama = config.llama
    # Queries and output have the heads' total width, keys and values that of their heads.
    queries, keys = (n * llama.head_dim for n in (llama.num_heads, llama.num_kv_heads))
    attention = llama.hidden_size * (2 * queries + 2 * keys)
    return llama.num_layers * (attention + 3 * llama.hidden_size * llama.intermediate_size)


def count_adapter_weights(config: JanusConfig) -> int:
    """Counts the weights of the low-rank adapters of all layers."""
    leaves = leaf_paths(network.abstract(config))
    return sum(math.prod(x.shape) for path, x in leaves if re.fullmatch(ADAPTER_PATHS, path))


def count_head_weights(config: JanusConfig, task: str) -> int:
    """Counts the weights of the head that computes a task's logits, `t2i` or `mm2t`."""
    width = config.llama.hidden_size
    if task == "mm2t":
        return width * config.llama.vocab_size
    # Two layers: from the model's width to the inner one, and from there to the codes.
    return config.image_token_embed * (width + config.vq.num_embeddings)


def count_cache_bytes(config: JanusConfig) -> int:
    """Counts the bytes of one token's keys and values in all layers."""
    llama = config.llama
    return 2 * BYTES * llama.num_layers * llama.num_kv_heads * llama.head_dim


@dataclasses.dataclass(frozen=True)
class Work:
    """The completions of one task: `prompts` times `group`, of `length` tokens."""

    task: str
    prompts: int
    group: int
    prompt: int  # tokens
    length: int
    guided: bool = False  # each completion has a second row without its prompt

    @property
    def rows(self) -> int:
        return self.prompts * self.group * (1 + self.guided)


def count_step_bytes(config: JanusConfig, work: Work, shared: bool) -> int:
    """Counts the bytes of a decode step with a cache of mean length; see the formulas above."""
    weights = BYTES * (count_layer_weights(config) + count_head_weights(config, work.task))
    prompts = work.prompts * (1 + work.guided) if shared else work.rows
    # On average half of an answer is in the cache.
    tokens = prompts * work.prompt + work.rows * work.length / 2
    return round(weights + count_cache_bytes(config) * tokens)


def count_training_operations(config: JanusConfig, works: tuple[Work, ...], shared: bool) -> float:
    """Counts the operations of a forward and a backward pass; see the formulas above."""
    llama = config.llama
    adapters, per_weight = count_adapter_weights(config), 4 if llama.lora else 6
    total = 0.0
    for work in works:
        prompts = work.prompts if shared else work.rows
        read = prompts * work.prompt + work.rows * work.length
        # Causal: a token sees the tokens before it, half of all pairs.
        pairs = prompts * work.prompt**2 / 2
        pairs += work.rows * (work.length * work.prompt + work.length**2 / 2)
        total += (per_weight * count_layer_weights(config) + 6 * adapters) * read
        total += per_weight * count_head_weights(config, work.task) * work.rows * work.length
        total += 12 * llama.num_layers * llama.num_heads * llama.head_dim * pairs
    return total
