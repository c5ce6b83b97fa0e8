"""Tiny random Show-os: transformers' Phi, and MAGVIT-v2 written from the table of its layers.

The weights become our parameters by torch module types and a few renames, which share nothing with
the conversion tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PhiConfig as TorchConfig
from transformers import PhiForCausalLM

from corl_jax.models.magvit import MagvitConfig
from corl_jax.models.phi import PhiConfig
from corl_jax.policies.show_o.network import ShowOConfig
from tests.parity.torch_janus import params_of, randomise

torch.set_num_threads(1)

TEXT = 40  # tokens of the tiny text tokenizer
Z_CHANNELS = 5
SIZES = {
    "vocab_size": TEXT + 10 + 2**Z_CHANNELS + 1, "hidden_size": 32, "intermediate_size": 56,
    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256,
    "partial_rotary_factor": 0.5, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0, "qk_layernorm": True,
}  # fmt: skip
MAGVIT = MagvitConfig(
    z_channels=Z_CHANNELS,
    base_channels=32,
    encoder_channels=(32, 64, 64),
    encoder_blocks=(2, 1, 2),
    decoder_channels=(32, 32, 64),
    decoder_blocks=(2, 1, 2),
)
RENAMES = (
    (r"^model\.", "language_model."),
    (r"\.self_attn\.", ".attn."),
    (r"\.final_layernorm", ".norm"),
)


def tiny_phi(seed: int = 0, **sizes: Any) -> PhiForCausalLM:
    """A float32 model in evaluation mode; arguments override the sizes above."""
    config = TorchConfig(**{**SIZES, "attn_implementation": "eager"} | sizes)
    model = PhiForCausalLM(config).float().eval()
    randomise(model, seed)
    return model


def jax_config(config: TorchConfig) -> ShowOConfig:
    heads = config.num_attention_heads
    phi = PhiConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=config.hidden_size // heads,
        max_position_embeddings=config.max_position_embeddings,
    )
    return ShowOConfig(phi=phi, magvit=MAGVIT, num_vq_tokens=16, llm_vocab_size=TEXT)


def phi_params(model: PhiForCausalLM) -> dict:
    """The weights of `language_model` and `lm_head` as our nested dict."""
    return params_of(model, RENAMES)


def additive(mask: np.ndarray) -> torch.Tensor:
    """A mask [B, L, L] as the original adds it: 0 where a column is seen, else -2^63."""
    # Not a boolean mask: eager attention of transformers adds it as 0 and 1, without a word.
    hidden = torch.zeros(mask.shape).masked_fill(~torch.from_numpy(mask), -(2.0**63))
    return hidden[:, None]


# ---- MAGVIT-v2


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))  # [N, C, positions]
        weights = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1 = Residual(channels, channels), Attention(channels)
        self.block_2 = Residual(channels, channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nn.Module):
    def __init__(self, channels: int, down: bool):
        super().__init__()
        self.down = down
        stride, padding = (2, 0) if down else (1, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)

    def forward(self, x):
        if self.down:
            return self.conv(functional.pad(x, (0, 1, 0, 1)))
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(widths: list[int]) -> Any:
    """A level whose blocks have these widths, the first of which is its input's."""
    made = nn.Module()
    made.block = nn.ModuleList(Residual(*widths[i : i + 2]) for i in range(len(widths) - 1))
    return made


class Encoder(nn.Module):
    """`levels`: the widths of each level's blocks, from the full resolution down."""

    def __init__(self, levels: list[list[int]], bits: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, levels[0][0], 3, padding=1)
        self.down = nn.ModuleList(level(widths) for widths in levels)
        for made, widths in zip(self.down[:-1], levels, strict=False):
            made.downsample = Resample(widths[-1], down=True)
        last = levels[-1][-1]
        self.mid, self.norm_out = Middle(last), norm(last)
        self.conv_out = nn.Conv2d(last, bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, x):
        x = self.conv_in(x)
        made: Any
        for made in self.down:
            for block in made.block:
                x = block(x)
            x = made.downsample(x) if hasattr(made, "downsample") else x
        return self.quant_conv(self.conv_out(functional.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    """`levels`: the widths of each level's blocks, from the full resolution down: up.0 to up.n."""

    def __init__(self, levels: list[list[int]], bits: int):
        super().__init__()
        first = levels[-1][0]
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in, self.mid = nn.Conv2d(bits, first, 3, padding=1), Middle(first)
        self.up = nn.ModuleList(level(widths) for widths in levels)
        for made, widths in zip(self.up[1:], levels[1:], strict=True):
            made.upsample = Resample(widths[-1], down=False)
        self.norm_out = norm(levels[0][-1])
        self.conv_out = nn.Conv2d(levels[0][-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        made: Any
        for number in range(len(self.up) - 1, -1, -1):
            made = self.up[number]
            for block in made.block:
                x = block(x)
            x = made.upsample(x) if number else x
        return self.conv_out(functional.silu(self.norm_out(x)))


class Tokenizer(nn.Module):
    def __init__(self, encoder: list[list[int]], decoder: list[list[int]], bits: int):
        super().__init__()
        self.bits = bits
        self.encoder, self.decoder = Encoder(encoder, bits), Decoder(decoder, bits)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Codes [N, h * w] of pixels [N, 3, H, W]."""
        z = self.encoder(pixels)
        codes = torch.zeros(z[:, 0].shape, dtype=torch.long)
        for k in range(self.bits):
            codes = 2 * codes + (z[:, k] > 0)
        return codes.flatten(1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Pixels [N, 3, H, W] of codes [N, h, w]."""
        signs = [(codes // 2 ** (self.bits - 1 - k)) % 2 * 2.0 - 1 for k in range(self.bits)]
        return self.decoder(torch.stack(signs, dim=1))


RELEASED = {
    "encoder": [
        [128] * 5, [128, 256, 256, 256], [256] * 5, [256, 512, 512, 512], [512] * 5,
    ],
    "decoder": [
        [128] * 5, [256, 128, 128, 128, 128], [256] * 4, [512, 256, 256, 256, 256], [512] * 4,
    ],
    "bits": 13,
}  # fmt: skip
"""The levels of showlab/magvitv2."""
TINY = {
    "encoder": [[32, 32, 32], [32, 64], [64, 64, 64]],
    "decoder": [[32, 32, 32], [64, 32], [64, 64, 64]],
    "bits": Z_CHANNELS,
}


def tiny_tokenizer(seed: int = 0) -> Tokenizer:
    model = Tokenizer(**TINY).float().eval()
    randomise(model, seed)
    return model


def tokenizer_params(model: Tokenizer) -> dict:
    """The weights of `vqmodel` as our nested dict."""
    return params_of(model, ())
