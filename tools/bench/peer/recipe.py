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
    make_encoded_prompts,
    make_texts,
)
from tools.bench.sizes import add_adapters as add_to_size
from tools.bench.vocabularies import write_network

CLIP_RANGE, ADVANTAGE_EPS = 0.2, 1e-4


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The completions of prompts, on the host; rows of a prompt follow each other."""

    prompts: EncodedPrompts  # B rows
    codes: np.ndarray  # [N, T]
    plans: np.ndarray | None  # [N, L]; None: images without plans


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
    reference: Any  # (language model, lm_head) at the start; None without a KL penalty
    scorers: list[Scorer]


def time_steps(peer: Peer) -> tuple[list[float], dict[str, Any]]:
    """Times whole steps; see `tools.bench.recipe` for what they do.

    Parameters and moments are bfloat16, those of adapters float32. The layers are checkpointed. The
    warm-up draws a few codes, and makes the rest of a step.
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
    parts = model.model.language_model, model.lm_head
    reference = copy.deepcopy(parts) if recipe.kl_coef else None
    if peer.rank is None:
        trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    else:
        lora = add_to_size(peer.size, peer.rank)
        scale = lora.family.lora_of(lora.policy).scale
        trained = add_adapters(model.model.language_model, peer.rank, scale)
    optimizer = training.start_training(peer, trained)
    texts = [text for text in make_texts(peer.prompts) for _ in range(peer.group)]
    scorers = [make_scorer(peer, name, texts, folder) for name in list_networks(recipe)]
    prompts = make_encoded_prompts(peer.size, peer.special, peer.prompts, peer.plan)
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
        rows = torch.from_numpy(np.array(pixels)).to(peer.device).permute(0, 3, 1, 2).float()
        shape = (config.image_size, config.image_size)
        levels = torch.nn.functional.interpolate(rows, shape, mode="bicubic", antialias=True)
        levels = levels.round().clamp(0, 255)
        outputs = model(input_ids=peer.to_tensor(ids), pixel_values=(levels / 255 - mean) / std)
        return (outputs.image_embeds * outputs.text_embeds).sum(-1)

    def score(images: np.ndarray) -> torch.Tensor:
        ids = clip_scores.tokenize_prompts(network, texts)
        size = clip_scores.IMAGES_AT_ONCE
        pieces = [slice(first, first + size) for first in range(0, len(images), size)]
        with use_tf32():
            return torch.cat([score_piece(images[rows], ids[rows]) for rows in pieces])

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


def take_step(run: Training, codes: int) -> dict[str, float]:
    """Makes a step of images of so many codes, the others repeated; returns seconds by phase."""
    peer, results = run.peer, dict[str, Any]()

    def roll_out() -> None:
        results["drawn"] = draw(run, codes)

    def compare() -> None:
        results["advantages"] = score_codes(run, results["drawn"].codes)

    def update() -> None:
        update_policy(run, results["drawn"], results["advantages"])

    return {
        "rollout": peer.time_call(roll_out),
        "reward": peer.time_call(compare),
        "update": peer.time_call(update),
    }


def draw(run: Training, count: int) -> Drawn:
    """Draws plans and codes of all images, `batch_prompts` prompts at a time."""
    peer, length = run.peer, run.peer.size.limits.image_tokens
    peer.model.eval()  # with checkpoints a layer in training keeps no cache
    codes, plans = [], []
    for prompts in split_prompts(run.prompts, peer.batch_prompts or peer.prompts):
        rows = prompts, peer.group
        if peer.plan:
            plans.append(draw_plans(peer, prompts))
            rows = add_plans(peer, prompts, plans[-1]), 1
        codes.append(
            generation.sample_codes(peer, *generation.make_guided_rows(peer, *rows), count)
        )
    repeated = torch.cat(codes).repeat(1, -(-length // count))[:, :length]
    return Drawn(run.prompts, repeated.cpu().numpy(), np.concatenate(plans) if plans else None)


@torch.inference_mode()
def draw_plans(peer: Peer, prompts: EncodedPrompts) -> np.ndarray:
    """Returns tokens [N, L] sampled from the full softmax; no plan ends early."""
    plans = peer.model.generate(
        inputs_embeds=peer.embed_prompts(prompts),
        attention_mask=peer.to_tensor(prompts.attention_mask).long(), do_sample=True, top_k=0,
        max_new_tokens=peer.plan, num_return_sequences=peer.group,
    )  # fmt: skip
    if plans.shape != (len(prompts.input_ids) * peer.group, peer.plan):
        raise RuntimeError(f"sampled plans {tuple(plans.shape)}, expected {peer.plan} tokens each")
    return plans.cpu().numpy()


def add_plans(peer: Peer, prompts: EncodedPrompts, plans: np.ndarray) -> EncodedPrompts:
    """Returns a prompt [N, P + L + 1] for each plan: prompt, plan, and the start of an image."""
    first, shown = (x.repeat(peer.group, 0) for x in (prompts.input_ids, prompts.attention_mask))
    last = np.full((len(plans), 1), peer.special.boi)
    ids = np.concatenate([first, plans, last], axis=1).astype(np.int32)
    ones = np.ones((len(plans), plans.shape[1] + 1), bool)
    return EncodedPrompts(ids, np.concatenate([shown, ones], axis=1))


def score_codes(run: Training, codes: np.ndarray) -> torch.Tensor:
    """Returns the advantages [N] float32 of images, from the sum of the scores."""
    size = (run.peer.batch_prompts or run.peer.prompts) * run.peer.group
    pieces = run.peer.to_tensor(codes).split(size)
    images = [generation.decode_pixels(run.peer.model, piece) for piece in pieces]
    scores = torch.stack([score(np.concatenate(images)) for score in run.scorers]).sum(0)
    groups = scores.float().view(-1, run.peer.group)
    spread = groups.std(dim=1, keepdim=True)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (spread + ADVANTAGE_EPS)).flatten()


def update_policy(run: Training, drawn: Drawn, advantages: torch.Tensor) -> None:
    """Makes an optimizer step, with gradients summed over micro-batches."""
    peer = run.peer
    peer.model.train()
    size = peer.micro_batch or peer.prompts
    pieces = zip(split_drawn(drawn, size), advantages.split(size * peer.group), strict=True)
    for piece, of_piece in pieces:
        share = len(piece.codes) / len(drawn.codes)
        (compute_loss(run, piece, of_piece) * share).backward()
    torch.nn.utils.clip_grad_norm_(run.trained, training.CLIP)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def compute_loss(run: Training, drawn: Drawn, advantages: torch.Tensor) -> torch.Tensor:
    """Computes the clipped loss with its KL penalty: the means of plans and of codes, added."""
    references = compute_reference_logprobs(run, drawn)
    losses = []
    for scores, reference in zip(compute_logprobs(run.peer, drawn), references, strict=True):
        ratio = torch.exp(scores - scores.detach())  # the policy that drew the images
        clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
        terms = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
        if reference is not None:
            distance = reference - scores
            terms = terms + run.recipe.kl_coef * (torch.exp(distance) - distance - 1)
        losses.append(terms.mean())
    return torch.stack(losses).sum()


def compute_logprobs(peer: Peer, drawn: Drawn) -> list[torch.Tensor]:
    """Computes log-probs [N, T] float32 of codes; of plans and codes in one pass."""
    if drawn.plans is None:
        segment = Segment(CODES, drawn.codes, np.ones(drawn.codes.shape, bool))
        return [training.compute_logprobs(peer, TaskBatch(drawn.prompts, (segment,)), None)]
    model, length = peer.model, drawn.prompts.input_ids.shape[1]
    plans, codes = peer.to_tensor(drawn.plans), peer.to_tensor(drawn.codes)
    context = add_plans(peer, drawn.prompts, drawn.plans)
    images = model.prepare_embeddings_for_image_generation(codes)
    mask = peer.to_tensor(context.attention_mask).long()
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([peer.embed_prompts(context), images], dim=1),
        attention_mask=torch.cat([mask, torch.ones_like(codes)], dim=1), use_cache=False,
    ).last_hidden_state  # fmt: skip
    # The logits of a token come from the place before it.
    texts = model.lm_head(hidden[:, length - 1 : length - 1 + plans.shape[1]])
    logits = model.model.generation_head(hidden[:, -codes.shape[1] - 1 : -1])
    return [training.gather_logprobs(texts, plans), training.gather_logprobs(logits, codes)]


@torch.no_grad()
def compute_reference_logprobs(run: Training, drawn: Drawn) -> list[torch.Tensor | None]:
    """Computes log-probs by the language model at the start; None for each segment without one."""
    if run.reference is None:
        return [None] * (1 if drawn.plans is None else 2)
    model = run.peer.model
    trained = model.model.language_model, model.lm_head
    model.model.language_model, model.lm_head = run.reference
    try:
        return [*compute_logprobs(run.peer, drawn)]
    finally:
        model.model.language_model, model.lm_head = trained


def split_prompts(prompts: EncodedPrompts, size: int) -> Iterator[EncodedPrompts]:
    """Yields the prompts in pieces of `size`."""
    for first in range(0, len(prompts.input_ids), size):
        rows = slice(first, first + size)
        yield EncodedPrompts(prompts.input_ids[rows], prompts.attention_mask[rows])


def split_drawn(drawn: Drawn, size: int) -> Iterator[Drawn]:
    """Yields the completions of `size` prompts at a time."""
    group = len(drawn.codes) // len(drawn.prompts.input_ids)
    for number, prompts in enumerate(split_prompts(drawn.prompts, size)):
        rows = slice(number * size * group, (number + 1) * size * group)
        plans = None if drawn.plans is None else drawn.plans[rows]
        yield Drawn(prompts, drawn.codes[rows], plans)
