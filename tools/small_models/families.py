"""`FAMILIES`: how the random start of a small model of each family is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tokenizers import Tokenizer

from corl_jax.policies import Model
from corl_jax.policies.janus import network as janus_network
from corl_jax.policies.janus.checkpoint import KIND as JANUS
from corl_jax.policies.janus_flow import network as janus_flow_network
from corl_jax.policies.janus_flow.checkpoint import KIND as JANUS_FLOW
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.policies.show_o import network as show_o_network
from corl_jax.policies.show_o.checkpoint import KIND as SHOW_O
from corl_jax.types import Params
from corl_jax.weights.kinds import NetworkKind
from tools.small_models import janus_flow_sizes, janus_sizes, show_o_sizes
from tools.small_models import tokenizer as tokenizers
from tools.small_models.sign_tokenizer import make_start

WORLDS = {"mini": "full", "nano": "small"}
"""Size -> the drawn world that it is made for."""
FIRST_LOGVAR = -6.0  # of the latents of a VAE


@dataclasses.dataclass(frozen=True)
class SmallFamily:
    """The functions and names that make the small models of a family."""

    kind: NetworkKind
    init: Callable[[Any, jax.Array], Params]
    layout: str  # of the files
    train_tokenizer: Callable[[int, str], Tokenizer]  # (seed, world)
    write_tokenizer: Callable[[Path, Tokenizer, str], None]  # (folder, tokenizer, size)
    make_sizes: Callable[[Tokenizer, str], Any]  # (tokenizer, size)
    # (trained model, sizes, seed, world) -> the part of the parameters that begins as its image
    # tokenizer
    begin: Callable[[Model, Any, int, str], Params] | None = None


def _write_janus_tokenizer(folder: Path, tokenizer: Tokenizer, size: str) -> None:
    settings = {"model_max_length": janus_sizes.MAX_POSITIONS[size]}
    tokenizers.write_tokenizer(folder, tokenizer, settings)


def _write_show_o_tokenizer(folder: Path, tokenizer: Tokenizer, size: str) -> None:
    settings = {
        "eos_token": tokenizers.show_o_tokens.END,
        "model_max_length": show_o_sizes.MAX_POSITIONS[size],
        "pad_token": tokenizers.show_o_tokens.PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizers.write_tokenizer(folder / "phi-1_5", tokenizer, settings)


def _init_janus_flow(config: JanusFlowConfig, key: jax.Array) -> Params:
    params = janus_flow_network.init(config, key)
    # The second half of the channels are logarithms of variances: with the noise of 0 a decoder
    # first learns that latents tell nothing.
    bias = params["vae"]["quant_conv"]["bias"]
    params["vae"]["quant_conv"]["bias"] = bias.at[config.vae.latent_channels :].set(FIRST_LOGVAR)
    return params


FAMILIES = {
    "janus": SmallFamily(
        kind=JANUS,
        init=janus_network.init,
        layout="transformers",
        train_tokenizer=tokenizers.train_tokenizer,
        write_tokenizer=_write_janus_tokenizer,
        make_sizes=lambda tokenizer, size: janus_sizes.CONFIGS[size](
            tokenizers.count_embedding_rows(tokenizer)
        ),
    ),
    "janus-flow": SmallFamily(
        kind=JANUS_FLOW,
        init=_init_janus_flow,
        layout="original",
        train_tokenizer=tokenizers.train_janus_flow_tokenizer,
        write_tokenizer=_write_janus_tokenizer,
        make_sizes=lambda tokenizer, size: janus_flow_sizes.CONFIGS[size](
            tokenizers.count_embedding_rows(tokenizer)
        ),
        begin=lambda model, config, seed, world: {"vae": janus_flow_sizes.take_vae(model, config)},
    ),
    "show-o": SmallFamily(
        kind=SHOW_O,
        init=show_o_network.init,
        layout="original",
        train_tokenizer=tokenizers.train_show_o_tokenizer,
        write_tokenizer=_write_show_o_tokenizer,
        make_sizes=lambda tokenizer, size: show_o_sizes.CONFIGS[size](
            tokenizers.count_text_tokens(tokenizer)
        ),
        begin=lambda model, config, seed, world: {
            "vqmodel": make_start(model, config.magvit, seed, world)
        },
    ),
}
"""Name of a family on the command line -> how its small models are made."""
