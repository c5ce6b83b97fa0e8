"""Times a training step in PyTorch, as the reference takes it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch

from corl_jax.train.step import TaskBatch
from tools.bench import inputs
from tools.bench.peer.generation import make_image_prompts, make_questions, make_torch_pixels
from tools.bench.peer.model import Peer

LEARNING_RATE = 4e-6
CLIP = 1.0  # of the gradients' global norm


def time_steps(peer: Peer) -> tuple[list[float], dict[str, Any]]:
    """Times optimizer steps on both tasks: bfloat16 parameters and AdamW, checkpointed layers.

    Every completion is read with its own prompt, and the vision tower reads an image for each, as
    in the reference. Only the language model is trained. Log-probs are of the completions' tokens
    alone, each from the logits before its token, where the reference is off by one.
    """
    model, size = peer.model, peer.size
    model.requires_grad_(False)
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = start_training(peer, trained)
    image_prompts, text_prompts = make_image_prompts(peer), make_questions(peer)
    batches = [
        inputs.make_task_batch(size, peer.special, prompts, peer.group, length)
        for prompts, length in (
            (image_prompts, size.limits.image_tokens),
            (text_prompts, size.answer),
        )
    ]
    pixels = make_torch_pixels(peer, text_prompts).repeat_interleave(peer.group, dim=0)

    def step() -> None:
        loss = compute_task_loss(peer, batches[0], None) + compute_task_loss(
            peer, batches[1], pixels
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    calls = [peer.time_call(step) for _ in range(peer.repeats)]
    rows = peer.prompts * peer.group
    shapes = [(len(b.prompts.input_ids[0]), b.segments[0].values.shape[1]) for b in batches]
    tokens = rows * sum(itertools.chain(*shapes))
    return calls, {"tokens_per_s": tokens / sorted(calls)[len(calls) // 2]}


def start_training(peer: Peer, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Prepares the model for training with checkpointed layers; returns AdamW."""
    for parameter in trained:
        parameter.requires_grad_(True)
    layers = peer.model.model.language_model
    layers.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peer.model.train()
    return torch.optim.AdamW(
        trained, lr=LEARNING_RATE, weight_decay=0.0, fused=peer.device == "cuda"
    )


def compute_task_loss(peer: Peer, batch: TaskBatch, pixels: torch.Tensor | None) -> torch.Tensor:
    """Computes the policy gradient's loss, a mean over rows of means over their tokens."""
    (segment,) = batch.segments
    mask, advantages = peer.to_tensor(segment.mask), peer.to_tensor(batch.advantages).float()
    scores = compute_logprobs(peer, batch, pixels)
    # The ratio is 1, but its gradient is that of the log-prob.
    terms = -torch.exp(scores - scores.detach()) * advantages[:, None]
    return ((terms * mask).sum(1) / mask.sum(1)).mean()


def compute_logprobs(peer: Peer, batch: TaskBatch, pixels: torch.Tensor | None) -> torch.Tensor:
    """Computes log-probs [N, T] float32 of the tokens: of images without pixels, else answers."""
    (segment,) = batch.segments
    model, tokens = peer.model, peer.to_tensor(segment.values)
    prompts = fan_out(peer, batch)
    if pixels is None:
        head = model.model.generation_head
        completion = model.prepare_embeddings_for_image_generation(tokens)
    else:
        head = model.lm_head
        completion = model.model.language_model.embed_tokens(tokens)
    embeds = torch.cat([peer.embed_prompts(prompts, pixels), completion], dim=1)
    mask = torch.cat([peer.to_tensor(prompts.attention_mask), peer.to_tensor(segment.mask)], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False
    ).last_hidden_state
    # The logits of a token come from the place before it: P + T places, T from number P - 1 on.
    return gather_logprobs(head(hidden[:, -tokens.shape[1] - 1 : -1]), tokens)


def gather_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the log-probs [N, T] float32 of tokens."""
    # Row by row, as trl does for bfloat16: a softmax of all rows at once takes twice the memory.
    return torch.stack(
        [
            row.float().log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]
            for row, ids in zip(logits, tokens, strict=True)
        ]
    )


def fan_out(peer: Peer, batch: TaskBatch) -> Any:
    """Repeats the prompts once for each completion."""
    prompts = batch.prompts
    return dataclasses.replace(
        prompts,
        input_ids=prompts.input_ids.repeat(peer.group, axis=0),
        attention_mask=prompts.attention_mask.repeat(peer.group, axis=0),
        pixel_values=None,
    )
