"""The families of unified models that are measured, with what their `Family` does not say."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corl_jax.models.llama import LlamaConfig
from corl_jax.models.uvit import EXPANSION
from corl_jax.params import leaf_paths
from corl_jax.policies.family import Family, Unmasking
from corl_jax.policies.janus import sampling as janus_sampling
from corl_jax.policies.janus.family import FAMILY as JANUS
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.janus_flow import sampling as janus_flow_sampling
from corl_jax.policies.janus_flow.family import FAMILY as JANUS_FLOW
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.policies.show_o import sampling as show_o_sampling
from corl_jax.policies.show_o.family import FAMILY as SHOW_O
from corl_jax.policies.show_o.hiding import count_steps
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.policies.show_o.tokens import SpecialTokens as ShowOTokens
from corl_jax.types import Sizes
from tools.bench.cost import Costs
from tools.bench.vocabularies import (
    write_janus_flow_processor,
    write_processor,
    write_show_o_processor,
)

Frame = tuple[list[int], list[int]]
"""The tokens of a prompt before its words, and those behind them."""
SHOW_O_BORDERS = 2  # soi and eoi, which are read with the codes in each step


@dataclasses.dataclass(frozen=True)
class MeasuredFamily:
    """A family, and how its random inputs are made and its work is counted."""

    family: Family
    make_frame: Callable[[str, Any, int], Frame]  # (task, special tokens, tokens of an image)
    count_words: Callable[[Any], int]  # sizes -> ids of text, with those of special tokens or not
    count_codes: Callable[[Any], int]  # sizes -> different image codes; 0 if there are none
    describe_costs: Callable[[Any], Costs]
    write_processor: Callable[[Path, Any], Any]  # (folder, sizes) -> Processor
    sampling: Any  # the module with `image_program`
    count_steps: Callable[[Any, Unmasking], int]  # (sizes, unmasking) -> steps that draw an image
    lacks: tuple[str, ...] = ()  # parts that measure what it does not have


def _make_janus_frame(task: str, special: SpecialTokens, image_tokens: int) -> Frame:
    if task == "t2i":
        return [special.bos], [special.boi]
    return [special.bos, special.boi, *[special.image] * image_tokens, special.eoi], []


def _make_show_o_frame(task: str, special: ShowOTokens, image_tokens: int) -> Frame:
    if task == "t2i":
        return [special.t2i, special.eos], [special.eos]
    image = [special.soi, *[special.mask] * image_tokens, special.eoi]
    return [special.mmu, *image, special.eos], []


def _make_janus_flow_frame(task: str, special: SpecialTokens, image_tokens: int) -> Frame:
    if task == "t2i":
        return [special.bos], []  # the time stands in the place of BOI
    # BOI is one of the tokens of an image: a learned embedding takes its place.
    return [special.bos, special.boi, *[special.image] * (image_tokens - 1), special.eoi], []


def describe_janus(config: JanusConfig) -> Costs:
    """Returns the costs of a Janus."""
    # Two layers: from the model's width to the inner one, and from there to the codes.
    head = config.image_token_embed * (config.llama.hidden_size + config.vq.num_embeddings)
    return _describe_llama(config.llama, head, count_adapter_weights(JANUS, config))


def describe_janus_flow(config: JanusFlowConfig) -> Costs:
    """Returns the costs of a JanusFlow; the head of an image are its encoder and its decoder."""
    uvit, width = config.uvit, config.llama.hidden_size
    last = uvit.encoder_width + uvit.decoder_width
    # Of each block two layers to the inner width and back; what is computed once an image, and the
    # convolutions of single channels, are too small to count.
    head = 2 * EXPANSION * (
        uvit.encoder_num_layers * uvit.encoder_width**2 + uvit.decoder_num_layers * last**2
    ) + width * (uvit.encoder_width + uvit.decoder_width)  # and to the model's width and back
    return _describe_llama(config.llama, head, count_adapter_weights(JANUS_FLOW, config))


def _describe_llama(llama: LlamaConfig, image_head: int, adapter_weights: int) -> Costs:
    """Returns the costs of a model with this language model."""
    width = llama.hidden_size
    # Queries and output have the heads' total width, keys and values that of their heads.
    queries, keys = (n * llama.head_dim for n in (llama.num_heads, llama.num_kv_heads))
    weights = width * (2 * queries + 2 * keys) + 3 * width * llama.intermediate_size
    return Costs(
        layers=llama.num_layers, layer_weights=llama.num_layers * weights,
        query_width=queries, key_width=keys,
        heads={"t2i": image_head, "mm2t": width * llama.vocab_size},
        adapter_weights=adapter_weights,
    )  # fmt: skip


def describe_show_o(config: ShowOConfig) -> Costs:
    """Returns the costs of a Show-o."""
    phi, width = config.phi, config.phi.hidden_size
    queries, keys = (n * phi.head_dim for n in (phi.num_heads, phi.num_kv_heads))
    weights = width * (2 * queries + 2 * keys) + 2 * width * phi.intermediate_size
    return Costs(
        layers=phi.num_layers, layer_weights=phi.num_layers * weights,
        query_width=queries, key_width=keys,
        heads={"t2i": width * config.num_codes, "mm2t": width * phi.vocab_size},
        adapter_weights=count_adapter_weights(SHOW_O, config),
        any_order=True, borders=SHOW_O_BORDERS,
        front=1 + SHOW_O_BORDERS + config.num_image_tokens,
    )  # fmt: skip


def count_adapter_weights(family: Family, sizes: Sizes) -> int:
    """Counts the weights of the low-rank adapters of all layers."""
    if family.adapters is None or not family.lora_of(sizes):
        return 0
    paths = re.compile(family.adapters.paths)
    leaves = leaf_paths(family.abstract(sizes))
    return sum(math.prod(x.shape) for path, x in leaves if paths.fullmatch(path))


def _count_janus_words(config: JanusConfig | JanusFlowConfig) -> int:
    return config.llama.vocab_size


def _count_janus_codes(config: JanusConfig) -> int:
    return config.vq.num_embeddings


def _count_show_o_words(config: ShowOConfig) -> int:
    return config.llm_vocab_size


def _count_show_o_codes(config: ShowOConfig) -> int:
    return config.num_codes


def _count_janus_steps(config: JanusConfig, unmasking: Unmasking) -> int:
    return config.num_image_tokens  # one after another


def _count_show_o_steps(config: ShowOConfig, unmasking: Unmasking) -> int:
    return count_steps(unmasking, config.num_image_tokens)


def _count_no_codes(config: JanusFlowConfig) -> int:
    return 0


def _count_janus_flow_steps(config: JanusFlowConfig, unmasking: Unmasking) -> int:
    assert unmasking.steps is not None, "sizes state the steps of denoising"
    return unmasking.steps


FAMILIES = {
    "janus": MeasuredFamily(
        JANUS, _make_janus_frame, _count_janus_words, _count_janus_codes, describe_janus,
        write_processor, janus_sampling, _count_janus_steps,
        lacks=("forward",),
    ),
    # Its rewards cost what they cost a Janus.
    "show_o": MeasuredFamily(
        SHOW_O, _make_show_o_frame, _count_show_o_words, _count_show_o_codes, describe_show_o,
        write_show_o_processor, show_o_sampling, _count_show_o_steps,
        lacks=("rewards", "windows", "acceptance", "recipe", "lengths"),
    ),
    # Its rewards cost what they cost a Janus; its choices are no tokens that can be compared.
    "janus_flow": MeasuredFamily(
        JANUS_FLOW, _make_janus_flow_frame, _count_janus_words, _count_no_codes,
        describe_janus_flow, write_janus_flow_processor, janus_flow_sampling,
        _count_janus_flow_steps,
        lacks=(
            "rewards", "forward", "correctness", "recipe", "lengths", "windows", "self_qa",
            "self_sft", "self_sft_through",
        ),
    ),
}  # fmt: skip
"""Name of a family -> how it is measured."""
