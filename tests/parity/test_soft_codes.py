"""The gradient of an answer through the codes of a Show-o's own image, against PyTorch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from corl_jax.algorithms.likelihoods import ROW_LIKELIHOOD
from corl_jax.algorithms.losses import LossConstants
from corl_jax.params import flatten, leaf_paths, unflatten
from corl_jax.policies.family import NOISE_KEYS, LogprobOptions, StraightThrough, Unmasking
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.family import FAMILY
from corl_jax.policies.show_o.hiding import HIDDEN_SHARES, list_passes
from corl_jax.policies.show_o.own_images import RELAXED_KEYS
from corl_jax.policies.show_o.tokens import make_special_tokens
from corl_jax.policies.soft_choices import draw_noise
from corl_jax.tasks import CODES, TASKS, TEXT
from corl_jax.train import step
from corl_jax.types import EncodedPrompts, Segment
from tests.parity import torch_show_o
from tests.parity.test_soft_images import assert_same_gradients
from tests.parity.test_train_step import tensor
from tests.parity.torch_janus import gradients_of
from tests.parity.torch_show_o import RENAMES, Z_CHANNELS

pytestmark = pytest.mark.usefixtures("exact_products")

PROMPTS, GROUP, PLACES, CODE_COUNT, LENGTH = 2, 2, 16, 2**Z_CHANNELS, 5
WEIGHTS = {"self_qa/codes": 0.3, "self_qa/text": 1.0}
TAU = 0.7
SPECIAL = dataclasses.replace(make_special_tokens(torch_show_o.TEXT, CODE_COUNT), eos=0)
ONE_SHOT, COMPLEMENT = Unmasking(), Unmasking(logprobs="complement")


@pytest.fixture(scope="module")
def model():
    return torch_show_o.tiny_phi(num_hidden_layers=2, num_key_value_heads=2)


@pytest.fixture(scope="module")
def config(model):
    return torch_show_o.jax_config(model.config)


@pytest.fixture(scope="module")
def params(model, config):
    shapes = flatten(network.abstract(config)["vqmodel"])
    zeros = unflatten({path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()})
    return {**torch_show_o.phi_params(model), "vqmodel": zeros}


def pad_left(rows: list[list[int]]) -> EncodedPrompts:
    width = max(map(len, rows)) + 1
    ids = np.asarray([[SPECIAL.pad] * (width - len(row)) + row for row in rows], np.int32)
    return EncodedPrompts(ids, ids != SPECIAL.pad)


@pytest.fixture(scope="module")
def batch() -> step.TaskBatch:
    """Two prompts with two images each, of which one is wrong; answers of several lengths."""
    rng = np.random.default_rng(0)
    words = [rng.integers(1, torch_show_o.TEXT, 3 + 2 * i).tolist() for i in range(PROMPTS)]
    image = [SPECIAL.soi, *[SPECIAL.mask] * PLACES, SPECIAL.eoi]
    drawing = pad_left([[SPECIAL.t2i, SPECIAL.eos, *text, SPECIAL.eos] for text in words])
    asking = pad_left([[SPECIAL.mmu, *image, SPECIAL.eos, *text[1:]] for text in words])
    rows = PROMPTS * GROUP
    codes = rng.integers(0, CODE_COUNT, (rows, PLACES)).astype(np.int32)
    right = np.broadcast_to((np.arange(rows) != 1)[:, None], codes.shape)
    keys = jax.random.key_data(jax.random.split(jax.random.key(7), rows))
    shares = np.repeat(np.float32([0.8, 0.4]), GROUP)
    drawn = Segment(
        CODES, codes, right, replay={NOISE_KEYS: np.asarray(keys), HIDDEN_SHARES: shares}
    )
    answers = rng.integers(1, torch_show_o.TEXT, (rows, LENGTH)).astype(np.int32)
    kept = np.arange(LENGTH) < np.asarray([5, 2, 3, 1])[:, None]
    return step.TaskBatch(
        dataclasses.replace(drawing, next=asking), (drawn, Segment(TEXT, answers, kept)),
        turns=TASKS["self_qa"].turn_kinds,
    )  # fmt: skip


def compute_gradients(config, params, batch, *, unmasking=ONE_SHOT, redraw=False, through=True):
    logprobs = LogprobOptions(
        SPECIAL, remat="full", chunk=20, unmasking=unmasking,
        straight_through=StraightThrough(redraw, TAU) if through else None,
    )  # fmt: skip
    options = step.UpdateOptions(
        loss=ROW_LIKELIHOOD, constants=LossConstants(), logprobs=logprobs,
        weights=tuple(WEIGHTS.items()), dtype=jnp.float32,
    )  # fmt: skip

    @jax.jit
    def compute(params, batch):
        return step.gradients(FAMILY, config, options, params, {}, {"self_qa": batch})

    return compute(params, batch)


def read_torch(model, embeds: torch.Tensor, see) -> torch.Tensor:
    """Logits [L, V] of one sequence [L, D] under the mask `see(i, j)`."""
    size = len(embeds)
    mask = np.asarray([[[see(i, j) for j in range(size)] for i in range(size)]])
    return model(inputs_embeds=embeds[None], attention_mask=torch_show_o.additive(mask)).logits[0]


def sees_all_before(border: int, from_row: bool = False):
    """Causal, but columns before `border` are seen by all rows, or rows from it on see all."""
    return lambda i, j: j <= i or (i >= border if from_row else j < border)


def compute_torch_loss(model, batch, passes, noise, redraw) -> torch.Tensor:
    """The loss of sequence after sequence, as it is defined, with one-hots of the codes."""
    codes, text = batch.segments
    table = model.get_input_embeddings().weight
    book = table[SPECIAL.first_code : SPECIAL.first_code + CODE_COUNT]
    image_losses, answer_losses = [], []
    for row in range(len(codes.values)):
        ids, question = (
            tensor(x.input_ids[row // GROUP]).long() for x in (batch.prompts, batch.prompts.next)
        )
        ids, question = ids[ids != SPECIAL.pad], question[question != SPECIAL.pad]
        value, start = tensor(codes.values[row]).long(), len(ids) + 1
        logits = torch.zeros(PLACES, CODE_COUNT)
        scored = torch.zeros(PLACES, dtype=torch.bool)
        for known, of_pass in passes:
            known, of_pass = tensor(known[row]), tensor(of_pass[row])
            shown = torch.where(known, value + SPECIAL.first_code, SPECIAL.mask)
            borders = torch.tensor([[SPECIAL.soi], [SPECIAL.eoi]])
            whole = torch.cat([ids, borders[0], shown, borders[1]])
            out = read_torch(model, table[whole], sees_all_before(start - 1, from_row=True))
            out = out[start : start + PLACES, SPECIAL.first_code :][:, :CODE_COUNT]
            logits = torch.where(of_pass[:, None], out, logits)
            scored |= of_pass
        logp = torch.log_softmax(logits, -1).gather(-1, value[:, None])[:, 0]
        if codes.mask[row].any():
            image_losses.append(-logp[scored].mean())
        of_winner, of_all = (tensor(x[row]) for x in noise)
        fresh = logits + of_all
        top = torch.logsumexp(logits, -1) + of_winner
        others = -torch.log(torch.exp(-top)[:, None] + torch.exp(-fresh))
        chosen = torch.where(scored, fresh.argmax(-1), value) if redraw else value
        hot = torch.nn.functional.one_hot(chosen, CODE_COUNT).float()
        scores = fresh if redraw else torch.where(hot.bool(), top[:, None], others)
        relaxed = torch.softmax(scores / TAU, -1)
        choice = torch.where(scored[:, None], hot + relaxed - relaxed.detach(), hot)
        # h + y - sg(y) is h, whose rows of the book learn; y reaches the logits alone.
        vectors = hot @ book + (choice - hot) @ book.detach()
        answer, count = tensor(text.values[row]).long(), int(text.mask[row].sum())
        before = table[question[: 2 + PLACES + 1]]
        front = torch.cat([before[:2], vectors, before[-1:]])
        behind = table[torch.cat([question[3 + PLACES :], answer])]
        last, first = 3 + PLACES, len(question)
        out = read_torch(model, torch.cat([front, behind]), sees_all_before(last))
        nll = -torch.log_softmax(out[first - 1 : -1], -1).gather(-1, answer[:, None])[:, 0]
        answer_losses.append(nll[:count].mean())
    images, answers = (torch.stack(x).mean() for x in (image_losses, answer_losses))
    return WEIGHTS["self_qa/codes"] * images + WEIGHTS["self_qa/text"] * answers


@pytest.mark.parametrize(
    ("unmasking", "redraw"),
    [
        (ONE_SHOT, False),
        pytest.param(COMPLEMENT, False, marks=pytest.mark.slow),
        pytest.param(ONE_SHOT, True, marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_those_of_pytorch_with_the_same_noise(
    model, config, params, batch, unmasking, redraw
):
    codes = batch.segments[0]
    keys = jax.random.wrap_key_data(codes.replay[NOISE_KEYS])
    relaxed_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, RELAXED_KEYS)
    noise = draw_noise(relaxed_keys, jnp.arange(PLACES), CODE_COUNT)
    passes = [*zip(*(np.asarray(x) for x in list_passes(codes, unmasking)), strict=True)]
    hidden = passes[0][1].sum(axis=-1)
    assert hidden.tolist() == [13, 13, 6, 6], "one share for the images of a prompt"
    loss = compute_torch_loss(model, batch, passes, noise, redraw)
    model.zero_grad()
    loss.backward()
    expected = gradients_of(model, RENAMES)
    found, metrics = compute_gradients(config, params, batch, unmasking=unmasking, redraw=redraw)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), abs=1e-4)
    assert_same_gradients(found, expected, 1e-3)


def test_the_gradient_reaches_the_image_only_through_relaxed_codes(config, params, batch):
    """Values are those of the sampled image; the head of the codes learns from the answer too."""
    soft, metrics = compute_gradients(config, params, batch)
    detached, of_detached = compute_gradients(config, params, batch, through=False)
    assert float(metrics["loss"]) == float(of_detached["loss"])
    heads = [dict(leaf_paths(x))["lm_head/kernel"] for x in (soft, detached)]
    columns = slice(SPECIAL.first_code, SPECIAL.first_code + CODE_COUNT)
    difference = np.abs(heads[0] - heads[1])
    assert difference[:, columns].max() > 1e-3 * np.abs(heads[0]).max()
