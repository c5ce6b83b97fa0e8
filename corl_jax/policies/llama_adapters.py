"""Adds low-rank adapters to the sizes of a model whose language model is a Llama; removes them."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from corl_jax.models.llama import AdaptedLlamaConfig, LlamaConfig
from corl_jax.models.lora import Lora

# A dataclass with a field `llama` of type LlamaConfig.
Config = TypeVar("Config", bound=Any)


def add_adapters(config: Config, lora: Lora) -> Config:
    """Returns the sizes with adapters in the layers of the language model."""
    sizes = dataclasses.asdict(remove_adapters(config).llama)
    return dataclasses.replace(config, llama=AdaptedLlamaConfig(**sizes, lora=lora))


def remove_adapters(config: Config) -> Config:
    """Returns the sizes without adapters, as in checkpoints and for the reference."""
    if config.llama.lora is None:
        return config
    # The plain class again, so that these sizes equal those of a model that never had adapters.
    sizes = {f.name: getattr(config.llama, f.name) for f in dataclasses.fields(LlamaConfig)}
    return dataclasses.replace(config, llama=LlamaConfig(**sizes))
