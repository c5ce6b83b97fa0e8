"""Times the work of a JanusFlow in PyTorch as the original's demo does it, on transformers' Llama.

Every step reads the whole sequences anew, prompts too, conditional rows with unconditional ones
behind them: the demo means to keep the prompts' keys and values, but keeps none. All is bfloat16,
latents and times too. The VAE is left out. Nobody has trained a JanusFlow by steps: the optimizer
step is written in the same way, with every image behind its own prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from corl_jax.algorithms.flow.schedules import make_sigmas
from corl_jax.models.uvit import EXPANSION, KERNEL_SIZE, MAX_PERIOD, UvitConfig
from corl_jax.policies.denoising import STEPS, take_step_transitions
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.train.step import TaskBatch
from tools.bench import inputs
from tools.bench.peer.generation import make_image_prompts
from tools.bench.peer.model import DTYPE, Peer
from tools.bench.peer.training import CLIP, LEARNING_RATE
from tools.bench.sizes import Size

Measured = tuple[list[float], dict[str, Any]]  # seconds of the calls, figures
ROWS_AT_ONCE = 16  # steps of images in one backward pass; each is two rows with guidance
WARM_UP = 2  # steps of the pass that is not timed


class ResponseNorm(nn.Module):
    """Scales the channels of maps [N, H, W, C] by their share in the response."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return self.bias + (self.weight * (norms / (norms.mean(-1, keepdim=True) + 1e-6)) + 1) * x


class Block(nn.Module):
    """A ConvNeXt block on maps [N, C, H, W], then scale and shift by the condition."""

    def __init__(self, width: int, condition: int, eps: float):
        super().__init__()
        margin = KERNEL_SIZE // 2
        self.depthwise = nn.Conv2d(width, width, KERNEL_SIZE, padding=margin, groups=width)
        self.norm = nn.RMSNorm(width, eps)
        self.fc1, self.fc2 = (
            nn.Linear(width, EXPANSION * width),
            nn.Linear(EXPANSION * width, width),
        )
        self.response_norm = ResponseNorm(EXPANSION * width)
        self.film = nn.Linear(condition, 2 * width)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.fc2(self.response_norm(functional.gelu(self.fc1(h))))
        x = x + h.permute(0, 3, 1, 2)
        scale, shift = self.film(functional.silu(condition))[..., None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class Flow(nn.Module):
    """A JanusFlow without eyes and VAE; names of parameters are ours."""

    def __init__(self, config: Any, settings: LlamaConfig):
        super().__init__()
        uvit: UvitConfig = config.uvit
        width, first = settings.hidden_size, uvit.encoder_width
        last, outputs = uvit.decoder_width + first, uvit.latent_channels * uvit.patch_size**2
        make_block = functools.partial(Block, condition=width, eps=uvit.norm_eps)
        self.uvit = uvit
        self.language_model = LlamaForCausalLM(settings)
        self.time_embedding = nn.Sequential(
            nn.Linear(first, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.patches = nn.Conv2d(
            uvit.latent_channels, first, uvit.patch_size, stride=uvit.patch_size
        )
        self.first_blocks = nn.ModuleList(make_block(first) for _ in range(uvit.encoder_num_layers))
        self.aligner = nn.Linear(first, width)
        self.norm = nn.RMSNorm(width, config.llama.rms_norm_eps)
        self.projection = nn.Linear(width, uvit.decoder_width)
        self.input_norm = nn.RMSNorm(uvit.decoder_width, uvit.norm_eps)
        self.last_blocks = nn.ModuleList(make_block(last) for _ in range(uvit.decoder_num_layers))
        self.output_norm, self.output = nn.RMSNorm(last, uvit.norm_eps), nn.Conv2d(last, outputs, 1)

    def forward(
        self, prompts: torch.Tensor, mask: torch.Tensor, latents: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """Computes velocities [N, C, h, w] to the data of latents behind embedded prompts.

        `prompts` are [N, P, D], `mask` [N, P], `times` [N] 0 for noise and 1000 for data.
        """
        half = self.uvit.encoder_width // 2
        steps = torch.arange(half, device=times.device, dtype=torch.float32)
        angles = times.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(latents.dtype)
        condition, x = self.time_embedding(features), self.patches(latents)
        for block in self.first_blocks:
            x = block(x, condition)
        tokens = self.aligner(x.flatten(2).transpose(1, 2))
        embeds = torch.cat([prompts, condition[:, None], tokens], dim=1)
        seen = torch.cat([mask, mask.new_ones(len(mask), 1 + tokens.shape[1])], dim=1)
        hidden = self.language_model.model(
            inputs_embeds=embeds, attention_mask=seen, use_cache=not self.training
        ).last_hidden_state[:, -tokens.shape[1] :]
        hidden = self.input_norm(self.projection(self.norm(hidden)))
        y = torch.cat([hidden.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]), x], dim=1)
        for block in self.last_blocks:
            y = block(y, condition)
        y = self.output(self.output_norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return functional.pixel_shuffle(y, self.uvit.patch_size)


def build(size: Size, special: SpecialTokens, device: str) -> Flow:
    """Makes a random model in bfloat16."""
    llama = size.policy.llama
    settings: dict[str, Any] = {
        "vocab_size": llama.vocab_size, "hidden_size": llama.hidden_size,
        "intermediate_size": llama.intermediate_size, "num_hidden_layers": llama.num_layers,
        "num_attention_heads": llama.num_heads, "num_key_value_heads": llama.num_kv_heads,
        "head_dim": llama.head_dim, "rms_norm_eps": llama.rms_norm_eps,
        "max_position_embeddings": llama.max_position_embeddings,
    }  # fmt: skip
    config = LlamaConfig(**settings, attn_implementation="sdpa")  # pyright: ignore[reportCallIssue]
    with torch.device(device):
        return Flow(size.policy, config).to(DTYPE).eval()


# ---- prompts and images


@dataclasses.dataclass(frozen=True)
class Rows:
    """Embedded prompts of images and what is seen of them: [N, P, D] and [N, P]."""

    prompts: torch.Tensor
    mask: torch.Tensor


def make_rows(peer: Peer, repeats: int, guided: bool) -> Rows:
    """Returns each prompt `repeats` times, with guidance blank ones behind them."""
    encoded = make_image_prompts(peer)
    ids, mask = (
        peer.to_tensor(x).repeat_interleave(repeats, 0)
        for x in (encoded.input_ids, encoded.attention_mask)
    )
    mask = mask.long()
    if guided:  # the whole prompt, of which BOS alone is seen
        ids, mask = torch.cat([ids, ids]), torch.cat([mask, (ids == peer.special.bos).long()])
    with torch.no_grad():
        return Rows(peer.model.language_model.get_input_embeddings()(ids), mask)


def make_velocity(
    peer: Peer, rows: Rows, latents: torch.Tensor, times: torch.Tensor
) -> torch.Tensor:
    """Computes the velocity of latents; with twice as many rows it is guided."""
    if len(rows.prompts) == len(latents):
        return peer.model(rows.prompts, rows.mask, latents, times)
    both = torch.cat([latents, latents]), torch.cat([times, times])
    conditional, other = peer.model(rows.prompts, rows.mask, *both).chunk(2)
    scale = peer.size.cfg_scale
    return scale * conditional - (scale - 1) * other


def make_shape(peer: Peer) -> tuple[int, int, int]:
    """Returns channels, height and width of the latents of an image."""
    height, width, channels = peer.size.policy.latent_shape
    return channels, height, width


def time_images(guided: bool, peer: Peer) -> Measured:
    """Times images without their pixels, all at once."""
    rows, steps = make_rows(peer, peer.group, guided), peer.size.denoising.steps

    @torch.inference_mode()
    def draw(taken: int) -> torch.Tensor:
        start = torch.randn(peer.completions, *make_shape(peer), device=peer.device, dtype=DTYPE)
        latents = start
        for step in range(taken):
            times = torch.full((len(latents),), 1000 * step / steps, device=peer.device)
            latents = latents + make_velocity(peer, rows, latents, times.to(DTYPE)) / steps
        return latents

    draw(min(WARM_UP, steps))
    spent = peer.time_call(lambda: draw(steps))
    return [spent], {
        "images_per_s": peer.completions / spent, "ms_per_step": 1e3 * spent / steps,
    }  # fmt: skip


# ---- training


def time_steps(peer: Peer) -> Measured:
    """Times optimizer steps on images: bfloat16 parameters and AdamW, checkpointed layers.

    Each image is read at the steps of its window, with guidance, ROWS_AT_ONCE steps at a time.
    """
    model = peer.model.train()
    model.language_model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(
        trained, lr=LEARNING_RATE, weight_decay=0.0, fused=peer.device == "cuda"
    )
    prompts = make_image_prompts(peer)
    batch = inputs.make_task_batch(
        peer.size, peer.special, prompts, peer.group, peer.size.limits.image_tokens
    )
    pieces = split_steps(peer, batch)

    def step() -> None:
        for compute_loss in pieces:
            compute_loss().backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    calls = [peer.time_call(step) for _ in range(peer.repeats)]
    model.eval()
    return calls, {"images_per_s": peer.completions / sorted(calls)[len(calls) // 2]}


def split_steps(peer: Peer, batch: TaskBatch) -> list[Callable[[], torch.Tensor]]:
    """Returns the losses of a few steps of images each."""
    (segment,), denoising = batch.segments, peer.size.denoising
    numbers, samples = segment.replay[STEPS], range(peer.completions)
    sigmas = make_sigmas(denoising.schedule, denoising.steps, denoising.shift)
    of_steps = take_step_transitions(numbers, denoising)
    per_image = numbers.shape[1]
    keep, drift, std = (
        torch.tensor([*map(float, x)], device=peer.device).reshape(-1, 1, 1, 1)
        for x in (of_steps.keep, of_steps.drift, of_steps.std)
    )
    before, after = (  # [N * W, C, h, w]
        torch.cat([torch.from_numpy(segment.values[i, numbers[i] + ahead]) for i in samples])
        .permute(0, 3, 1, 2)
        .to(peer.device)
        for ahead in (0, 1)
    )
    times = torch.tensor(1000 * (1 - sigmas[numbers.reshape(-1)]), device=peer.device)
    advantages = peer.to_tensor(batch.advantages).float().repeat_interleave(per_image)
    rows = make_rows(peer, peer.group * per_image, peer.size.cfg_scale != 1)

    def compute_loss(places: torch.Tensor) -> torch.Tensor:
        chosen = torch.cat([places + n for n in range(0, len(rows.prompts), len(before))])
        read = Rows(rows.prompts[chosen], rows.mask[chosen])
        x, moved, deviation = before[places], after[places], std[places]
        toward_data = make_velocity(peer, read, x.to(DTYPE), times[places].to(DTYPE))
        mean = keep[places] * x - drift[places] * toward_data.float()
        logprobs = (-((moved - mean) ** 2) / (2 * deviation**2)).mean((1, 2, 3))
        # The ratio is 1, but its gradient is that of the log-prob.
        ratios = torch.exp(logprobs - logprobs.detach())
        return -(ratios * advantages[places]).sum() / len(before)

    everything = torch.arange(len(before), device=peer.device)
    return [functools.partial(compute_loss, x) for x in everything.split(ROWS_AT_ONCE)]
