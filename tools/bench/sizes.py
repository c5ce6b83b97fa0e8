"""Lists the sizes of the measured networks, and the lengths of prompts and answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from corl_jax.algorithms.flow.steps import Sde
from corl_jax.algorithms.flow.windows import Window
from corl_jax.models.aesthetic import AestheticConfig
from corl_jax.models.bert import BertConfig
from corl_jax.models.blip import BlipConfig, BlipTextConfig, BlipVisionConfig
from corl_jax.models.clip import ClipConfig, TowerConfig
from corl_jax.models.llama import LlamaConfig
from corl_jax.models.lora import Lora
from corl_jax.models.magvit import MagvitConfig
from corl_jax.models.mask2former import Mask2FormerConfig
from corl_jax.models.phi import PhiConfig
from corl_jax.models.sd_vae import SdVaeConfig
from corl_jax.models.siglip import SiglipConfig
from corl_jax.models.swin import SwinConfig
from corl_jax.models.uvit import UvitConfig
from corl_jax.models.vgg import VggConfig
from corl_jax.policies.family import Denoising, Family, Limits
from corl_jax.policies.janus.network import PRESETS, JanusConfig
from corl_jax.policies.janus_flow.network import PRESETS as JANUS_FLOW_PRESETS
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.policies.show_o.network import PRESETS as SHOW_O_PRESETS
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.sampling_options import choose_cfg_scale
from corl_jax.types import Sizes
from tools.bench.cost import Costs
from tools.bench.families import FAMILIES, MeasuredFamily
from tools.small_models.janus_sizes import make_mini_config

PARTS = ("rewards", "image", "text", "vq", "train", "iteration", "correctness", "gradients")
SHOW_O_PARTS = (
    "forward", "image", "text", "vq", "logprobs", "train", "iteration", "correctness", "gradients",
)  # fmt: skip
JANUS_FLOW_PARTS = (
    "image", "unguided", "text", "vq", "logprobs", "train_image", "iteration", "gradients",
)  # fmt: skip
WINDOW = 2  # steps of denoising that have noise and are trained


@dataclasses.dataclass(frozen=True)
class Size:
    """Networks of one size, and lengths like those of the published training."""

    policy: Sizes
    networks: Mapping[str, Any]  # reward network -> its config
    parts: tuple[str, ...] = PARTS  # measured unless the command names others
    image_prompt: int = 40  # tokens of the longest prompt of an image
    question: int = 100  # tokens of a question without those of its image
    new_tokens: int = 512  # of a sampled answer
    answer: int = 256  # tokens of an answer in the training step
    caption: int = 50  # tokens that BLIP writes
    policy_caption: int = 64  # tokens that the policy writes
    checked: tuple[str, ...] = ("bfloat16", "float32")  # dtypes whose correctness is measured
    answers: int = 512  # texts that the text rewards read
    detected: tuple[int, ...] = (8, 16, 32)  # numbers of images in which objects are detected
    copied: int = 4 << 30  # bytes of the array that is copied
    product: int = 8192  # side of the matrices whose product is timed
    model: str = "janus"  # a key of FAMILIES
    # that draw an image in any order or by denoising; None: as usual for its codes
    steps: int | None = None

    @property
    def measured(self) -> MeasuredFamily:
        """The family of the policy, with what is measured of it."""
        return FAMILIES[self.model]

    @property
    def family(self) -> Family:
        """The family of the policy."""
        return self.measured.family

    @property
    def limits(self) -> Limits:
        """The sizes of the policy that all families have."""
        return self.family.limits(self.policy)

    @property
    def costs(self) -> Costs:
        """What the work of the policy's language model depends on."""
        return self.measured.describe_costs(self.policy)

    @property
    def cfg_scale(self) -> float:
        """The guidance of images."""
        return choose_cfg_scale(None, self.family)

    @property
    def denoising(self) -> Denoising:
        """How images that are made by denoising are drawn and scored, as in the shipped configs."""
        if self.steps is None or not self.family.denoises:
            return Denoising()
        # The window begins in the first half: 10 steps, one of the first 5.
        window = Window(WINDOW, (0, self.steps // 2 - 1))
        return Denoising(self.steps, sde=Sde("flow", 0.7), window=window)

    @property
    def text_prompt(self) -> int:
        """Tokens of the longest question with its image."""
        return self.limits.input_image_tokens + self.question


_L14 = ClipConfig(
    vision=TowerConfig(1024, 4096, 24, 16, "quick_gelu"),
    text=TowerConfig(768, 3072, 12, 12, "quick_gelu"),
    projection_dim=768,
)
_H14 = ClipConfig()
_PUBLISHED = {
    "blip": BlipConfig(),
    "bert": BertConfig(),
    "lpips": VggConfig(),
    "clip": _H14,
    "pickscore": _H14,
    "hpsv2": _H14,
    "clip_l14": _L14,
    "aesthetic": AestheticConfig(),
    "mask2former": Mask2FormerConfig(),
}

_WORDS = 1200
_TINY_CLIP = ClipConfig(
    vision=TowerConfig(24, 32, 2, 3), text=TowerConfig(16, 28, 2, 2), image_size=16, patch_size=8,
    vocab_size=_WORDS, context_length=77, eos_token_id=_WORDS - 1, projection_dim=12,
)  # fmt: skip
_TINY_NETWORKS = {
    "blip": BlipConfig(
        BlipVisionConfig(
            image_size=16, patch_size=4, hidden_size=16, intermediate_size=24, num_layers=2,
            num_heads=2,
        ),
        BlipTextConfig(
            vocab_size=_WORDS + 2, hidden_size=16, intermediate_size=24, num_layers=2,
            num_heads=2, max_position_embeddings=64, bos_token_id=_WORDS,
        ),
    ),
    "bert": BertConfig(
        vocab_size=_WORDS, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
        max_position_embeddings=64,
    ),
    "lpips": VggConfig(channels=(4, 4, 4, 4, 4)),
    "clip": _TINY_CLIP,
    "pickscore": _TINY_CLIP,
    "hpsv2": _TINY_CLIP,
    "clip_l14": _TINY_CLIP,
    "aesthetic": AestheticConfig(sizes=(12, 7, 1)),
    "mask2former": Mask2FormerConfig(
        SwinConfig(width=8, depths=(2, 2, 2, 2), num_heads=(1, 1, 2, 2), window_size=4),
        hidden_size=32, mask_size=16, encoder_intermediate_size=24, decoder_intermediate_size=24,
        encoder_num_layers=1, decoder_num_layers=3, num_heads=4, num_queries=6, shorter_side=40,
        longer_side=64,
    ),
}  # fmt: skip


def _make_tiny_janus() -> JanusConfig:
    """Returns the shipped mini Janus with fewer layers, smaller images and fewer codes.

    It has the positions of the published models, so that their configs fit.
    """
    config = make_mini_config(vocab_size=640)
    positions = PRESETS["janus-pro-1b"].llama.max_position_embeddings
    llama = dataclasses.replace(config.llama, num_layers=2, max_position_embeddings=positions)
    siglip = dataclasses.replace(config.siglip, num_layers=2, image_size=16, patch_size=4)
    vq = dataclasses.replace(config.vq, channel_multiplier=(1, 1, 2))
    return dataclasses.replace(config, llama=llama, siglip=siglip, vq=vq)


def _make_tiny_show_o() -> ShowOConfig:
    """Returns a Show-o for images of 16 pixels: 4 x 4 of 512 codes. Positions are Phi's."""
    words = 600
    phi = PhiConfig(
        vocab_size=words + 10 + 512 + 1, hidden_size=64, intermediate_size=128, num_layers=2,
        num_heads=2, num_kv_heads=2, head_dim=32,
    )  # fmt: skip
    magvit = MagvitConfig(
        z_channels=9, base_channels=32, encoder_channels=(32, 32, 32), encoder_blocks=(1, 1, 1),
        decoder_channels=(32, 32, 32), decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    return ShowOConfig(phi=phi, magvit=magvit, num_vq_tokens=16, llm_vocab_size=words)


def _make_tiny_janus_flow() -> JanusFlowConfig:
    """Returns a JanusFlow for images of 16 pixels: 4 x 4 tokens of 2 x 2 latents.

    It has the positions of the published model, so that its configs fit.
    """
    llama = LlamaConfig(
        vocab_size=640, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2,
        num_kv_heads=2, head_dim=32,
    )  # fmt: skip
    siglip = SiglipConfig(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2
    )
    uvit = UvitConfig(encoder_width=24, encoder_num_layers=1, decoder_width=24)
    vae = SdVaeConfig(block_channels=(16, 16), num_res_blocks=1, norm_groups=4)
    return JanusFlowConfig(llama, siglip, uvit, vae)


def _make_show_o(preset: str) -> Size:
    """Returns a published Show-o with the lengths of UniRL: texts of 64, answers of 100 tokens."""
    return Size(
        SHOW_O_PRESETS[preset], _PUBLISHED, parts=SHOW_O_PARTS, image_prompt=64, question=64,
        new_tokens=100, answer=100, model="show_o",
    )  # fmt: skip


def add_adapters(size: Size, rank: int) -> Size:
    """Returns the size with adapters in all projections of the language model."""
    adapters = size.family.adapters
    assert adapters is not None
    lora = Lora(rank, 2.0 * rank, adapters.targets)
    return dataclasses.replace(size, policy=adapters.add(size.policy, lora))


SIZES = {
    "1b": Size(PRESETS["janus-pro-1b"], _PUBLISHED),
    # Training with AdamW needs more than one device.
    "7b": Size(
        PRESETS["janus-pro-7b"], _PUBLISHED,
        parts=("rewards", "image", "text", "vq", "correctness"),
    ),
    "tiny": Size(
        _make_tiny_janus(), _TINY_NETWORKS, image_prompt=12, question=10, new_tokens=8, answer=8,
        checked=("float32",), caption=5, policy_caption=4, answers=16, detected=(2,),
        copied=1 << 20, product=128,
    ),
    "show-o-256": _make_show_o("show-o"),
    "show-o-512": _make_show_o("show-o-512x512"),
    "show-o-tiny": Size(
        _make_tiny_show_o(), _TINY_NETWORKS, parts=SHOW_O_PARTS, image_prompt=12, question=10,
        new_tokens=8, answer=8, checked=("float32",), detected=(2,), copied=1 << 20, product=128,
        model="show_o", steps=4,
    ),
    "janus-flow-1.3b": Size(
        JANUS_FLOW_PRESETS["janusflow-1.3b"], _PUBLISHED, parts=JANUS_FLOW_PARTS, answer=256,
        new_tokens=256, model="janus_flow", steps=10,
    ),
    "janus-flow-tiny": Size(
        _make_tiny_janus_flow(), _TINY_NETWORKS, parts=JANUS_FLOW_PARTS, image_prompt=12,
        question=10, new_tokens=8, answer=8, checked=("float32",), detected=(2,), copied=1 << 20,
        product=128, model="janus_flow", steps=4,
    ),
}  # fmt: skip
"""Name on the command line -> size."""
