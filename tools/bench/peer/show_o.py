"""Times the work of a Show-o in PyTorch as the original code does it, on transformers' Phi.

Every step is a forward pass over whole sequences, with an additive mask: conditional rows with
unconditional ones behind them, and the logits of the whole vocabulary at every place. No keys and
values are kept. Weights are float32, products bfloat16 by autocast or float32. Work that repeats is
timed on a part of the rows, and its seconds are multiplied.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PhiConfig, PhiForCausalLM

from corl_jax.policies.family import Unmasking
from corl_jax.policies.show_o.tokens import SpecialTokens
from corl_jax.train.step import TaskBatch
from corl_jax.types import EncodedPrompts
from tools.bench import inputs
from tools.bench.peer.generation import make_image_prompts, make_questions
from tools.bench.peer.model import Peer
from tools.bench.sizes import Size

Measured = tuple[list[float], dict[str, Any]]  # seconds of the calls, figures
IMAGES_AT_ONCE = 16
ROWS_AT_ONCE = 8  # of a training step, whose layers are not checkpointed
WARM_UP = 2  # steps of the pass that is not timed
HIDDEN = -(2.0**63)  # what the original adds where a token does not see another
HIDDEN_SHARE = 2 / math.pi  # of the codes in training: the mean of the cosine schedule
LEARNING_RATE = 1e-4


def build(size: Size, special: SpecialTokens, device: str) -> Any:
    """Makes a random Phi with the vocabulary of a Show-o, in float32."""
    phi = size.policy.phi
    settings: dict[str, Any] = {
        "vocab_size": phi.vocab_size, "hidden_size": phi.hidden_size,
        "intermediate_size": phi.intermediate_size, "num_hidden_layers": phi.num_layers,
        "num_attention_heads": phi.num_heads, "num_key_value_heads": phi.num_kv_heads,
        "partial_rotary_factor": phi.partial_rotary_factor, "qk_layernorm": True,
        "hidden_act": "gelu_new", "max_position_embeddings": phi.max_position_embeddings,
    }  # fmt: skip
    config = PhiConfig(**settings, attn_implementation="sdpa")  # pyright: ignore[reportCallIssue]
    with torch.device(device):
        return PhiForCausalLM(config).float().eval()


def make_mask(ids: torch.Tensor, special: SpecialTokens, task: str) -> torch.Tensor:
    """Returns what is added to the scores [N, 1, L, L] of left-padded sequences."""
    places = torch.arange(ids.shape[1], device=ids.device)
    causal = places <= places[:, None]
    if task == "t2i":  # an image sees all of itself
        seen = causal | ((ids == special.soi).cumsum(1) > 0)[:, :, None]
    else:  # everything up to the end of the image sees itself
        ends = (ids == special.eoi).int().argmax(1)
        seen = causal | (places <= ends[:, None])[:, None, :]
    seen = seen & (ids != special.pad)[:, None, :]
    return torch.zeros(seen.shape, device=ids.device).masked_fill(~seen, HIDDEN)[:, None]


def compute_logits(
    peer: Peer, ids: torch.Tensor, mask: torch.Tensor, autocast: bool
) -> torch.Tensor:
    """Computes logits [N, L, V]."""
    products = torch.autocast(peer.device, torch.bfloat16) if autocast else contextlib.nullcontext()
    with products:
        return peer.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


# ---- images


def time_images(autocast: bool, peer: Peer) -> Measured:
    """Times images without their pixels, IMAGES_AT_ONCE at a time."""
    ids, blank = (x.repeat_interleave(peer.group, 0) for x in make_texts(peer))
    count, timed = len(ids), min(IMAGES_AT_ONCE, len(ids))
    draw = functools.partial(draw_codes, peer, ids[:timed], blank[:timed], autocast)
    steps = peer.size.measured.count_steps(peer.size.policy, Unmasking(peer.size.steps))
    draw(min(WARM_UP, steps))
    outputs: list[torch.Tensor] = []
    spent = peer.time_call(lambda: outputs.append(draw(steps)))
    if outputs[0].shape != (timed, peer.size.limits.image_tokens):
        raise RuntimeError(f"drew codes {tuple(outputs[0].shape)} for {timed} images")
    figures = {"images_per_s": timed / spent, "ms_per_step": 1e3 * spent / steps}
    return [spent * count / timed], figures | {"images_timed": timed}


def make_texts(peer: Peer) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ids [B, P] of prompts and of prompts without words."""
    ids, special = peer.to_tensor(make_image_prompts(peer).input_ids), peer.special
    blank = torch.full_like(ids, special.pad)
    blank[:, -3:] = torch.tensor([special.t2i, special.eos, special.eos], device=ids.device)
    return ids, blank


def add_image(ids: torch.Tensor, codes: torch.Tensor, special: SpecialTokens) -> torch.Tensor:
    """Returns texts [N, P] with the ids [N, M] of images behind them, [N, P + M + 2]."""
    borders = (torch.full_like(ids[:, :1], x) for x in (special.soi, special.eoi))
    return torch.cat([ids, next(borders), codes, next(borders)], dim=1)


@torch.inference_mode()
def draw_codes(
    peer: Peer, ids: torch.Tensor, blank: torch.Tensor, autocast: bool, steps: int
) -> torch.Tensor:
    """Draws codes [N, M] of prompts [N, P] in `steps` steps with guidance."""
    special, size = peer.special, peer.size
    num_places, num_codes = size.limits.image_tokens, special.mask - special.first_code
    codes = torch.full((len(ids), num_places), special.mask, device=ids.device)
    mask = make_mask(
        torch.cat([add_image(x, codes, special) for x in (ids, blank)]), special, "t2i"
    )
    drawn, temperature, weight = codes, 1.0, size.cfg_scale - 1
    for step in range(steps):
        both = torch.cat([add_image(x, codes, special) for x in (ids, blank)])
        conditional, unconditional = compute_logits(peer, both, mask, autocast).chunk(2)
        # Of the whole vocabulary at all places, and only then of the codes.
        mixed = (1 + weight) * conditional - weight * unconditional
        mixed = mixed[:, -num_places - 1 : -1, special.first_code : special.first_code + num_codes]
        probabilities = mixed.float().softmax(-1)
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1).view(len(ids), num_places)
        unknown = codes == special.mask
        drawn = torch.where(unknown, drawn + special.first_code, codes)
        share = (step + 1) / steps
        temperature *= 1 - share
        places = (drawn - special.first_code)[..., None]
        chosen = probabilities.gather(-1, places)[..., 0]
        chosen = torch.where(unknown, chosen, torch.finfo(chosen.dtype).max)
        count = math.floor(num_places * math.cos(share * math.pi / 2))
        masked = choose_masked(chosen, unknown, count, temperature)
        codes = torch.where(masked, special.mask, drawn)
    return drawn - special.first_code


def choose_masked(
    chosen: torch.Tensor, unknown: torch.Tensor, count: int, temperature: float
) -> torch.Tensor:
    """Returns the places [N, M] bool that are masked again, of probabilities [N, M]."""
    counts = (unknown.sum(1, keepdim=True) - 1).clamp(max=count).clamp(min=1)
    noise = -torch.log(-torch.log(torch.rand_like(chosen).clamp(min=1e-20)).clamp(min=1e-20))
    confidence = torch.log(chosen) + temperature * noise
    cut = confidence.sort(dim=1).values.gather(1, counts)
    return confidence < cut


# ---- answers


def time_answers(peer: Peer) -> Measured:
    """Times one answer, which is all that the original makes at once; codes are read from ids.

    Every token is a pass over the whole sequence. Answers never end.
    """
    ids = place_codes(peer, make_questions(peer))[:1]
    ids, steps, count = ids[ids != peer.special.pad][None], peer.size.new_tokens, peer.completions
    answer = functools.partial(answer_question, peer, ids)
    answer(min(WARM_UP, steps))
    outputs: list[torch.Tensor] = []
    spent = peer.time_call(lambda: outputs.append(answer(steps)))
    if outputs[0].shape != (1, ids.shape[1] + steps):
        raise RuntimeError(f"answered {tuple(outputs[0].shape)}, expected {steps} tokens more")
    figures = {"tokens_per_s": steps / spent, "ms_per_step": 1e3 * spent / steps}
    return [spent * count], figures | {"answers_timed": 1}


def place_codes(peer: Peer, prompts: EncodedPrompts) -> torch.Tensor:
    """Returns questions [B, P] with random codes in the place of their image."""
    ids, special = peer.to_tensor(prompts.input_ids), peer.special
    codes = torch.randint(special.first_code, special.mask, ids.shape, device=ids.device)
    return torch.where(ids == special.mask, codes, ids)


@torch.inference_mode()
def answer_question(peer: Peer, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Returns a question [1, P] with `count` sampled tokens behind it."""
    for _ in range(count):
        logits = compute_logits(peer, ids, make_mask(ids, peer.special, "mm2t"), True)
        token = torch.multinomial(logits[:, -1].float().softmax(-1), 1)
        ids = torch.cat([ids, token.clamp(max=peer.special.pad - 1)], dim=1)
    return ids


# ---- training


def time_steps(peer: Peer) -> Measured:
    """Times optimizer steps on both tasks: float32 parameters, AdamW, ROWS_AT_ONCE rows at a time.

    Every completion is read with its own prompt. Some codes are hidden, and log-probs are of those.
    """
    model, size = peer.model.train(), peer.size
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=peer.device == "cuda"
    )
    image_prompts, questions = make_image_prompts(peer), make_questions(peer)
    batches = [
        inputs.make_task_batch(size, peer.special, prompts, peer.group, length)
        for prompts, length in ((image_prompts, size.limits.image_tokens), (questions, size.answer))
    ]
    pieces = [*make_image_rows(peer, batches[0]), *make_answer_rows(peer, batches[1], questions)]

    def step() -> None:
        for compute_loss in pieces:
            compute_loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    calls = [peer.time_call(step) for _ in range(peer.repeats)]
    shapes = [(len(b.prompts.input_ids[0]), b.segments[0].values.shape[1]) for b in batches]
    tokens = peer.completions * sum(map(sum, shapes))
    model.eval()
    return calls, {"tokens_per_s": tokens / sorted(calls)[len(calls) // 2]}


Loss = Callable[[], torch.Tensor]


def make_image_rows(peer: Peer, batch: TaskBatch) -> list[Loss]:
    """Returns the losses of a few images each."""
    (segment,), special = batch.segments, peer.special
    targets = peer.to_tensor(segment.values) + special.first_code
    hidden = torch.rand(targets.shape, device=targets.device) < HIDDEN_SHARE
    texts = peer.to_tensor(batch.prompts.input_ids).repeat_interleave(peer.group, 0)
    ids = add_image(texts, torch.where(hidden, special.mask, targets), special)
    places = slice(-targets.shape[1] - 1, -1)  # a hidden code is scored at its own place
    return _split(peer, batch, "t2i", (ids, targets, hidden), places)


def make_answer_rows(peer: Peer, batch: TaskBatch, questions: EncodedPrompts) -> list[Loss]:
    """Returns the losses of a few answers each."""
    (segment,) = batch.segments
    targets, mask = peer.to_tensor(segment.values), peer.to_tensor(segment.mask)
    texts = place_codes(peer, questions).repeat_interleave(peer.group, 0)
    places = slice(-targets.shape[1] - 1, -1)  # a token is scored one place before it
    return _split(peer, batch, "mm2t", (torch.cat([texts, targets], 1), targets, mask), places)


def _split(
    peer: Peer, batch: TaskBatch, task: str, rows: tuple[torch.Tensor, ...], places: slice
) -> list[Loss]:
    advantages = peer.to_tensor(batch.advantages).float()

    def compute_loss(
        ids: torch.Tensor, targets: torch.Tensor, scored: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        logits = compute_logits(peer, ids, make_mask(ids, peer.special, task), True)[:, places]
        logprobs = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        # The ratio is 1, but its gradient is that of the log-prob.
        terms = -torch.exp(logprobs - logprobs.detach()) * weights[:, None]
        means = (terms * scored).sum(1) / scored.sum(1).clamp(min=1)
        return means.sum() / peer.completions

    pieces = zip(*(x.split(ROWS_AT_ONCE) for x in (*rows, advantages)), strict=True)
    return [functools.partial(compute_loss, *piece) for piece in pieces]
