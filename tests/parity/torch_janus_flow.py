"""Tiny random JanusFlows in torch: transformers' Llama and SigLIP, the rest from the architecture.

Modules have the names of the original code, except in SigLIP. Maps are NCHW. One row is computed
at a time, its prompt without padding, and times are the original's: u is 0 for noise and 1 for
data, and velocities point to the data.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig as TorchLlama
from transformers import LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from corl_jax.models.llama import LlamaConfig
from corl_jax.models.sd_vae import SdVaeConfig
from corl_jax.models.siglip import SiglipConfig
from corl_jax.models.uvit import UvitConfig
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from tests.parity.torch_janus import LLAMA, params_of, randomise
from tests.support import tiny_vae

torch.set_num_threads(1)

VISION = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}  # fmt: skip
SIZES = {"channels": 4, "patch": 2, "encoder": 20, "blocks": 2, "decoder": 12, "last_blocks": 3}
# A patch of 2 latents has 4 pixels, as a patch in a prompt.
VAE = SdVaeConfig(block_channels=(8, 16), num_res_blocks=1, norm_groups=4)
RENAMES = (
    (r"^language_model\.lm_head", "lm_head"),
    (r"^language_model\.model\.", "language_model."),
    (r"\.self_attn\.", ".attn."),
    (r"^vision_und_enc_model\.(vision_model\.)?", "vision_model."),
    (r"^vision_model\.(embeddings|encoder)\.", "vision_model."),
    (r"^vision_und_enc_aligner", "aligner"),
    (r"^vision_gen_enc_aligner", "generation_aligner"),
    (r"^vision_gen_dec_aligner_norm", "generation_norm"),
    (r"^vision_gen_dec_aligner", "generation_projection"),
    (r"^vision_gen_(enc|dec)_model\.mid_block\.res_blocks\.", r"generation_\1oder.layers."),
    (r"^vision_gen_(enc|dec)_model\.", r"generation_\1oder."),
    (r"time_embed\.linear_", "time_embedding.fc"),
    (r"in_conv", "patch_embedding"),
    (r"channelwise_linear_", "fc"),
    (r"channelwise_norm", "response_norm"),
    (r"cond_embeds_mapper", "film"),
    (r"out_convs\.0\.norm", "output_norm"),
    (r"out_convs\.0\.unpatch_conv", "output"),
)


class Rms(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def on_channels(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Applies a layer for the last axis to the channels of maps [N, C, H, W]."""
    return layer(x.movedim(1, -1)).movedim(-1, 1)


class Grn(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x):  # [N, H, W, C]
        sizes = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        relative = sizes / (sizes.mean(-1, keepdim=True) + 1e-6)
        return self.bias + (self.weight * relative + 1) * x


class Block(nn.Module):
    def __init__(self, width: int, condition: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = Rms(width, 1e-6)
        self.channelwise_linear_1 = nn.Linear(width, 4 * width)
        self.channelwise_norm = Grn(4 * width)
        self.channelwise_linear_2 = nn.Linear(4 * width, width)
        self.cond_embeds_mapper = nn.Linear(condition, 2 * width)

    def forward(self, x, condition):
        h = self.norm(self.depthwise(x).movedim(1, -1))
        h = self.channelwise_norm(functional.gelu(self.channelwise_linear_1(h)))
        x = x + self.channelwise_linear_2(h).movedim(-1, 1)
        mapped = self.cond_embeds_mapper(functional.silu(condition))[..., None, None]
        width = x.shape[1]
        return x * (1 + mapped[:, :width]) + mapped[:, width:]


def blocks(count: int, width: int, condition: int) -> nn.Module:
    middle = nn.Module()
    middle.res_blocks = nn.ModuleList(Block(width, condition) for _ in range(count))
    return middle


class Encoder(nn.Module):
    def __init__(self, condition: int):
        super().__init__()
        width, patch = SIZES["encoder"], SIZES["patch"]
        self.time_embed = nn.Module()
        self.time_embed.linear_1 = nn.Linear(width, condition)
        self.time_embed.linear_2 = nn.Linear(condition, condition)
        self.in_conv = nn.Conv2d(SIZES["channels"], width, patch, stride=patch)
        self.mid_block: Any = blocks(SIZES["blocks"], width, condition)

    def forward(self, z, time: float):
        half = SIZES["encoder"] // 2
        angles = [1000 * time * 10000 ** (-i / half) for i in range(half)]
        features = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])[None]
        embed: Any = self.time_embed
        condition = embed.linear_2(functional.silu(embed.linear_1(features)))
        x = self.in_conv(z)
        for block in self.mid_block.res_blocks:
            x = block(x, condition)
        return x, condition


class Decoder(nn.Module):
    def __init__(self, condition: int):
        super().__init__()
        width = SIZES["decoder"] + SIZES["encoder"]
        self.input_norm = Rms(SIZES["decoder"], 1e-6)
        self.mid_block: Any = blocks(SIZES["last_blocks"], width, condition)
        last: Any = nn.Module()
        last.norm = Rms(width, 1e-6)
        last.unpatch_conv = nn.Conv2d(width, SIZES["channels"] * SIZES["patch"] ** 2, 1)
        self.out_convs = nn.ModuleList([last])

    def forward(self, y, skip, condition):
        y = torch.cat([on_channels(self.input_norm, y), skip], dim=1)
        for block in self.mid_block.res_blocks:
            y = block(y, condition)
        last: Any = self.out_convs[0]
        y = last.unpatch_conv(on_channels(last.norm, y))
        return functional.pixel_shuffle(y, SIZES["patch"])


class Flow(nn.Module):
    """The whole network; `velocity` and `logits` take one row."""

    def __init__(self, llama: dict[str, Any]):
        super().__init__()
        config = TorchLlama(**LLAMA | llama, attn_implementation="eager")
        width = config.hidden_size
        self.language_model = LlamaForCausalLM(config)
        self.vision_und_enc_model = SiglipVisionModel(
            SiglipVisionConfig(**VISION, attn_implementation="eager")
        )
        self.vision_und_enc_aligner = nn.Linear(VISION["hidden_size"], width)
        self.beg_of_und_embed = nn.Parameter(torch.zeros(1, width))
        self.vision_gen_enc_model = Encoder(width)
        self.vision_gen_enc_aligner = nn.Linear(SIZES["encoder"], width)
        self.vision_gen_dec_aligner_norm = Rms(width, config.rms_norm_eps)
        self.vision_gen_dec_aligner = nn.Linear(width, SIZES["decoder"])
        self.vision_gen_dec_model = Decoder(width)

    def embed(self, ids: list[int]) -> torch.Tensor:
        return self.language_model.get_input_embeddings()(torch.tensor([ids]))

    def velocity(
        self, z: torch.Tensor, time: float, ids: list[int], hidden: bool = False
    ) -> torch.Tensor:
        """The velocity [1, C, h, w] behind a prompt; `hidden` masks all its tokens but the first.

        Hidden tokens keep their positions.
        """
        x, condition = self.vision_gen_enc_model(z, time)
        tokens = self.vision_gen_enc_aligner(x.flatten(2).transpose(1, 2))
        sequence = torch.cat([self.embed(ids), condition[:, None], tokens], dim=1)
        mask = torch.ones(1, sequence.shape[1], dtype=torch.long)
        if hidden:
            mask[:, 1 : len(ids)] = 0
        states = self.language_model.model(
            inputs_embeds=sequence,
            attention_mask=mask,
            position_ids=torch.arange(sequence.shape[1])[None],
        ).last_hidden_state
        y = self.vision_gen_dec_aligner(
            self.vision_gen_dec_aligner_norm(states[:, -tokens.shape[1] :])
        )
        y = y.transpose(1, 2).reshape(1, -1, *x.shape[2:])
        return self.vision_gen_dec_model(y, x, condition)

    def logits(self, ids: list[int], places: list[int], images: torch.Tensor) -> torch.Tensor:
        """Logits [1, T, V]; `places` are those of BOI and the image tokens of all images."""
        features = self.vision_und_enc_model(images).last_hidden_state
        features = self.vision_und_enc_aligner(features)
        begin = self.beg_of_und_embed.expand(len(features), 1, -1)
        filling = torch.cat([begin, features], dim=1).flatten(0, 1)
        embeds = self.embed(ids).clone()
        embeds[0, places] = filling
        return self.language_model(inputs_embeds=embeds).logits


def tiny_flow(seed: int = 0, **llama: Any) -> Flow:
    """A float32 model in evaluation mode; arguments override the sizes of the language model."""
    model = Flow(llama).float().eval()
    generator = randomise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "channelwise_norm" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            # Linear layers, which `randomise` takes for tables of embeddings by their names: so
            # large, the condition would drown the prompt.
            elif "time_embed" in name or "cond_embeds_mapper" in name:
                parameter.mul_(parameter[0].numel() ** -0.5)
    return model


def jax_config(model: Flow) -> JanusFlowConfig:
    text = model.language_model.config
    return JanusFlowConfig(
        llama=LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            max_position_embeddings=text.max_position_embeddings,
        ),
        siglip=SiglipConfig(
            image_size=VISION["image_size"],
            patch_size=VISION["patch_size"],
            hidden_size=VISION["hidden_size"],
            intermediate_size=VISION["intermediate_size"],
            num_layers=VISION["num_hidden_layers"],
            num_heads=VISION["num_attention_heads"],
            layer_norm_eps=VISION["layer_norm_eps"],
        ),
        uvit=UvitConfig(
            latent_channels=SIZES["channels"],
            patch_size=SIZES["patch"],
            encoder_width=SIZES["encoder"],
            encoder_num_layers=SIZES["blocks"],
            decoder_width=SIZES["decoder"],
            decoder_num_layers=SIZES["last_blocks"],
        ),
        vae=VAE,
    )


def flow_params(model: Flow) -> dict:
    """The weights as our nested dict of float32 NumPy arrays, with a random VAE."""
    params = params_of(model, RENAMES)
    # A parameter of the model itself has no path.
    params.pop("", None)
    begin = model.beg_of_und_embed.detach().numpy().copy()
    return params | {"begin_embedding": begin, "vae": tiny_vae.make_params(VAE)}
