"""Builds transformers' Janus with random weights, and times its work."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers import JanusConfig as TorchConfig

from corl_jax.policies.janus.checkpoint import transformers as transformers_layout
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.types import EncodedPrompts
from tools.bench.sizes import Size

DTYPE = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Peer:
    """One run: the sizes, how often, where, and the model."""

    size: Size
    special: Any  # ids of special tokens
    prompts: int
    group: int
    repeats: int
    device: str  # `cuda` or `cpu`
    model: Any
    micro_batch: int | None = None  # prompts of one backward pass of a recipe; None: all
    batch_prompts: int | None = None  # prompts that a recipe samples at once; None: all
    rank: int | None = None  # of a recipe's adapters; None: all parameters are trained
    plan: int = 0  # tokens of the plan before an image of a recipe

    @property
    def completions(self) -> int:
        return self.prompts * self.group

    def to_tensor(self, array: Any) -> torch.Tensor:
        """Moves an array to the device: ids as int64, numbers in bfloat16."""
        # A copy: torch warns about arrays that cannot be written.
        tensor = torch.from_numpy(np.array(array)).to(self.device)
        if tensor.dtype == torch.int32:
            return tensor.long()
        return tensor.to(DTYPE) if tensor.is_floating_point() else tensor

    def time_call(self, call: Callable[[], Any]) -> float:
        """Returns the seconds of a call, until the device has finished it."""
        self._wait()
        began = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def embed_prompts(self, prompts: EncodedPrompts, pixels: Any = None) -> torch.Tensor:
        """Returns embedded prompts [B, P, D], with image features in their places.

        Without `pixels` the prompts are text only.
        """
        ids, model = self.to_tensor(prompts.input_ids), self.model.model
        embeds = model.language_model.embed_tokens(ids)
        if pixels is None:
            return embeds
        features = model.get_image_features(pixels, return_dict=True).pooler_output
        # [B, P] -> [B, P, D]; masked_scatter fills the places in order with the rows of `features`.
        places = (ids == self.special.image)[..., None].expand_as(embeds)
        return embeds.masked_scatter(places, features.to(embeds.dtype))


def build(size: Size, special: SpecialTokens, device: str) -> Any:
    """Makes a random model; its texts never end, its images are sampled from the full softmax."""
    settings = TorchConfig.from_dict(transformers_layout.write(size.policy, "bfloat16", special))
    with torch.device(device):  # made where it is used: on the host it would take minutes
        model = AutoModelForImageTextToText.from_config(
            settings, dtype=DTYPE, attn_implementation="sdpa"
        )
    model.generation_config = GenerationConfig(
        **transformers_layout.write_generation(special) | {"eos_token_id": None}
    )
    return model.eval()
