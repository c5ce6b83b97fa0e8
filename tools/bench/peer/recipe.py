"""Times whole steps of a recipe in PyTorch: rollout, pixels, rewards, update.

The loops are those of the other parts. Reward networks are transformers' CLIP.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from corl_jax.models.clip import ClipConfig, TowerConfig
from corl_jax.rewards import clip_scores
from corl_jax.rewards.samples import Network
from corl_jax.tasks import CODES
from corl_jax.train.step import TaskBatch
from corl_jax.types import EncodedPrompts, Segment
from tools.bench.peer import generation, training
from tools.bench.peer.adapters import add_adapters
from tools.bench.peer.model import Peer
from tools.bench.recipe import (
    Recipe,
    announce_step,
    choose_recipe,
    describe_steps,
    list_networks,
    make_texts,
)
from tools.bench.sizes import add_adapters as add_to_size
from tools.bench.vocabularies import write_network

CLIP_RANGE, ADVANTAGE_EPS = 0.2, 1e-4
Scorer = Callable[[np.ndarray], torch.Tensor]
"""Images [N, S, S, 3] uint8 -> scores [N]."""


@dataclasses.dataclass(frozen=True)
class Training:
    """What the steps of a recipe share."""

    peer: Peer
    recipe: Recipe
    prompts: EncodedPrompts
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    reference: Any  # the language model at the start; None without a KL penalty
    scorers: list[Scorer]


def time_steps(peer: Peer) -> tuple[list[float], dict[str, Any]]:
    """Times whole steps; see `tools.bench.recipe` for what they do.

    Parameters and moments are bfloat16, those of adapters float32. The layers are checkpointed. The
    warm-up draws a few tokens, and makes the rest of a step.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = start(peer, Path(folder))
        take_step(run, generation.WARM_UP)
        if peer.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps = []
        for number in range(peer.repeats):
            steps.append(take_step(run, peer.size.limits.image_tokens))
            announce_step("PyTorch", number + 1, steps[-1])
    return [sum(step.values()) for step in steps], describe_steps(steps, peer.completions)


def start(peer: Peer, folder: Path) -> Training:
    """Returns the training of the recipe: its parameters, its optimizer and its networks."""
    recipe, model = choose_recipe(peer.rank is not None), peer.model
    model.requires_grad_(False)
    reference = copy.deepcopy(model.model.language_model) if recipe.kl_coef else None
    if peer.rank is None:
        trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    else:
        lora = add_to_size(peer.size, peer.rank)
        scale = lora.family.lora_of(lora.policy).scale
        trained = add_adapters(model.model.language_model, peer.rank, scale)
    optimizer = training.start_training(peer, trained)
    texts = [text for text in make_texts(peer.prompts) for _ in range(peer.group)]
    scorers = [make_scorer(peer, name, texts, folder) for name in list_networks(recipe)]
    prompts = generation.make_image_prompts(peer)
    return Training(peer, recipe, prompts, trained, optimizer, reference, scorers)


def make_scorer(peer: Peer, name: str, texts: list[str], folder: Path) -> Scorer:
    """Returns the cosines of images and texts by a random CLIP in float32."""
    config: ClipConfig = peer.size.networks[name]
    network = Network(config, {}, write_network(folder / name, "clip", config), np.float32)
    with torch.device(peer.device):
        model = CLIPModel(write_clip_config(config)).eval().requires_grad_(False)
    mean, std = (
        torch.tensor(values, device=peer.device)[:, None, None]
        for values in (config.image_mean, config.image_std)
    )

    @torch.inference_mode()
    def score_piece(pixels: np.ndarray, ids: np.ndarray) -> torch.Tensor:
        rows = torch.from_numpy(np.array(pixels)).to(peer.device).permute(0, 3, 1, 2)
        outputs = model(
            input_ids=peer.to_tensor(ids), pixel_values=(rows.float() / 255 - mean) / std
        )
        return (outputs.image_embeds * outputs.text_embeds).sum(-1)

    def score(images: np.ndarray) -> torch.Tensor:
        pixels = clip_scores.resize_images(images, config.image_size)
        ids = clip_scores.tokenize_prompts(network, texts)
        size = clip_scores.IMAGES_AT_ONCE
        pieces = [slice(first, first + size) for first in range(0, len(pixels), size)]
        with use_tf32():
            return torch.cat([score_piece(pixels[rows], ids[rows]) for rows in pieces])

    return score


@contextlib.contextmanager
def use_tf32() -> Iterator[None]:
    """Computes products of float32 in TF32, as XLA does; PyTorch's convolutions do so anyway."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def write_clip_config(config: ClipConfig) -> CLIPConfig:
    """Returns transformers' config of a CLIP."""

    def describe(tower: TowerConfig) -> dict[str, Any]:
        return {
            "hidden_size": tower.hidden_size, "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.num_layers, "num_attention_heads": tower.num_heads,
            "hidden_act": tower.activation, "layer_norm_eps": tower.layer_norm_eps,
            "projection_dim": config.projection_dim,
        }  # fmt: skip

    text = {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.context_length,
        "bos_token_id": config.eos_token_id - 1, "eos_token_id": config.eos_token_id,
    }  # fmt: skip
    vision = {"image_size": config.image_size, "patch_size": config.patch_size}
    return CLIPConfig(
        text_config=describe(config.text) | text, vision_config=describe(config.vision) | vision,
        projection_dim=config.projection_dim,
    )  # fmt: skip


def take_step(run: Training, tokens: int) -> dict[str, float]:
    """Makes one step of images of so many tokens, the others repeated; returns seconds by phase."""
    peer, results = run.peer, dict[str, Any]()

    def roll_out() -> None:
        results["codes"] = draw_codes(run, tokens)

    def compare() -> None:
        results["advantages"] = score_codes(run, results["codes"])

    def update() -> None:
        update_policy(run, results["codes"], results["advantages"])

    return {
        "rollout": peer.time_call(roll_out),
        "reward": peer.time_call(compare),
        "update": peer.time_call(update),
    }


def draw_codes(run: Training, tokens: int) -> torch.Tensor:
    """Draws the codes [N, T] of all images, `batch_prompts` prompts at a time."""
    peer, length = run.peer, run.peer.size.limits.image_tokens
    peer.model.eval()  # with checkpoints a layer in training keeps no cache
    pieces = []
    for prompts in split_prompts(run.prompts, peer.batch_prompts or peer.prompts):
        rows = generation.make_guided_rows(peer, prompts)
        pieces.append(generation.sample_codes(peer, *rows, tokens))
    return torch.cat(pieces).repeat(1, -(-length // tokens))[:, :length]


def score_codes(run: Training, codes: torch.Tensor) -> torch.Tensor:
    """Returns the advantages [N] float32 of images, from the sum of the scores."""
    size = (run.peer.batch_prompts or run.peer.prompts) * run.peer.group
    images = [generation.decode_pixels(run.peer.model, piece) for piece in codes.split(size)]
    scores = torch.stack([score(np.concatenate(images)) for score in run.scorers]).sum(0)
    groups = scores.float().view(-1, run.peer.group)
    spread = groups.std(dim=1, keepdim=True)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (spread + ADVANTAGE_EPS)).flatten()


def update_policy(run: Training, codes: torch.Tensor, advantages: torch.Tensor) -> None:
    """Makes an optimizer step, with gradients summed over micro-batches."""
    peer = run.peer
    peer.model.train()
    size = peer.micro_batch or peer.prompts
    rows = size * peer.group
    pieces = zip(
        split_prompts(run.prompts, size), codes.split(rows), advantages.split(rows), strict=True
    )
    for prompts, values, of_piece in pieces:
        segment = Segment(CODES, values.cpu().numpy(), np.ones(values.shape, bool))
        batch = TaskBatch(prompts, (segment,), of_piece.cpu().numpy())
        (compute_loss(run, batch) * len(values) / len(codes)).backward()
    torch.nn.utils.clip_grad_norm_(run.trained, training.CLIP)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def compute_loss(run: Training, batch: TaskBatch) -> torch.Tensor:
    """Computes the clipped loss with its KL penalty, a mean over rows and tokens."""
    peer = run.peer
    reference = compute_reference_logprobs(run, batch)
    scores = training.compute_logprobs(peer, batch, None)
    advantages = peer.to_tensor(batch.advantages).float()[:, None]
    ratio = torch.exp(scores - scores.detach())  # the policy that drew the images
    clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    terms = -torch.minimum(ratio * advantages, clipped * advantages)
    if reference is not None:
        distance = reference - scores
        terms = terms + run.recipe.kl_coef * (torch.exp(distance) - distance - 1)
    return terms.mean()


@torch.no_grad()
def compute_reference_logprobs(run: Training, batch: TaskBatch) -> torch.Tensor | None:
    """Computes log-probs [N, T] by the language model at the start; None without one."""
    if run.reference is None:
        return None
    inner = run.peer.model.model
    trained, inner.language_model = inner.language_model, run.reference
    try:
        return training.compute_logprobs(run.peer, batch, None)
    finally:
        inner.language_model = trained


def split_prompts(prompts: EncodedPrompts, size: int) -> Iterator[EncodedPrompts]:
    """Yields the prompts in pieces of `size`."""
    for first in range(0, len(prompts.input_ids), size):
        rows = slice(first, first + size)
        yield EncodedPrompts(prompts.input_ids[rows], prompts.attention_mask[rows])
