"""The gradient from an answer through its own image, against PyTorch with the same noise."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from corl_jax.algorithms.likelihoods import ROW_LIKELIHOOD
from corl_jax.algorithms.losses import LossConstants
from corl_jax.params import leaf_paths
from corl_jax.policies.family import NOISE_KEYS, LogprobOptions, StraightThrough
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.image_settings import ImageSettings
from corl_jax.policies.soft_choices import choose_vectors, draw_noise, score_codes
from corl_jax.tasks import TASKS
from corl_jax.train import step
from tests.parity import torch_janus
from tests.parity.test_train_step import positions, tensor
from tests.support.tiny_runs import SPECIAL, image_batch, text_batch

pytestmark = pytest.mark.usefixtures("exact_products")

PROMPTS, GROUP = 2, 2
WEIGHTS = {"self_qa/codes": 0.3, "self_qa/text": 1.0}
MEAN, STD, TAU = (0.5, 0.4, 0.3), (0.5, 0.25, 0.4), 0.7
SIZES = {
    "llama": {"num_hidden_layers": 2, "num_key_value_heads": 2},
    "vision": {"num_hidden_layers": 1},
}


@pytest.fixture(scope="module")
def model():
    return torch_janus.tiny_model(**SIZES)


@pytest.fixture(scope="module")
def config(model):
    return torch_janus.jax_config(model.config)


@pytest.fixture(scope="module")
def batch(config) -> step.TaskBatch:
    slots, side = config.num_image_tokens, config.siglip.image_size
    drawing = image_batch(config.vq.num_embeddings, slots, PROMPTS, GROUP)
    asking = text_batch(side, slots, PROMPTS, GROUP)
    (codes,), (text,) = drawing.segments, asking.segments
    keys = jax.random.split(jax.random.key(7), PROMPTS * GROUP)
    mask = np.array(codes.mask) & (np.arange(len(codes.mask)) != 1)[:, None]  # one is wrong
    codes = dataclasses.replace(
        codes, mask=mask, replay={NOISE_KEYS: np.asarray(jax.random.key_data(keys))}
    )
    question = dataclasses.replace(asking.prompts, pixel_values=None)
    prompts = dataclasses.replace(drawing.prompts, next=question)
    return step.TaskBatch(prompts, (codes, text), turns=TASKS["self_qa"].turn_kinds)


def gradients_of(config, params, batch, *, micro_batches=1, redraw=False, through=True):
    side, slots = config.siglip.image_size, config.num_image_tokens
    logprobs = LogprobOptions(
        SPECIAL, remat="full", chunk=20, image=ImageSettings(side, slots, MEAN, STD),
        straight_through=StraightThrough(redraw, TAU) if through else None,
    )  # fmt: skip
    options = step.UpdateOptions(
        loss=ROW_LIKELIHOOD, constants=LossConstants(), logprobs=logprobs,
        weights=tuple(WEIGHTS.items()), dtype=jnp.float32, micro_batches=micro_batches,
    )  # fmt: skip

    @jax.jit
    def compute(params, batch):
        return step.gradients(FAMILY, config, options, params, {}, {"self_qa": batch})

    return compute(params, batch)


def torch_states(model, batch):
    """The states that score the codes, from one pass over prompt and codes."""
    ids, mask = (
        tensor(x).repeat_interleave(GROUP, 0)
        for x in (batch.prompts.input_ids, batch.prompts.attention_mask)
    )
    codes = tensor(batch.segments[0].values).long()
    read = model.prepare_embeddings_for_image_generation(codes)
    embeds = torch.cat([model.get_input_embeddings()(ids.long()), read], dim=1)
    mask = torch.cat([mask, torch.ones_like(codes, dtype=torch.bool)], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions(mask)
    ).last_hidden_state
    return hidden[:, ids.shape[1] - 1 : -1]


def torch_loss(model, batch, noise) -> torch.Tensor:
    codes, text = batch.segments
    values = tensor(codes.values).long()
    logits = model.model.generation_head(torch_states(model, batch))
    logp = torch.log_softmax(logits, -1).gather(-1, values[..., None])[..., 0]
    right = tensor(codes.mask).any(-1)
    image_loss = -(logp.mean(-1) * right).sum() / right.sum()
    # The relaxed choice, given that the drawn code won.
    top_noise, noise = (tensor(x) for x in noise)
    top = torch.logsumexp(logits, -1) + top_noise
    others = -torch.log(torch.exp(-top)[..., None] + torch.exp(-(logits + noise)))
    hot = torch.nn.functional.one_hot(values, logits.shape[-1]).float()
    relaxed = torch.softmax(torch.where(hot.bool(), top[..., None], others) / TAU, -1)
    choice = hot + relaxed - relaxed.detach()
    vq = model.model.vqmodel
    book = torch.nn.functional.normalize(vq.quantize.embedding.weight, dim=-1)
    side = round(values.shape[1] ** 0.5)
    latents = (choice @ book.detach()).reshape(len(values), side, side, -1).permute(0, 3, 1, 2)
    soft = (vq.decoder(vq.post_quant_conv(latents)) + 1) / 2
    hard = (soft.detach() * 255).clamp(0, 255).to(torch.uint8).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    pixels = ((hard + soft - soft.detach()) - mean) / std
    ids, mask = (
        tensor(x).repeat_interleave(GROUP, 0)
        for x in (batch.prompts.next.input_ids, batch.prompts.next.attention_mask)
    )
    tokens, width = tensor(text.values).long(), ids.shape[1]
    mask = torch.cat([mask, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
    scored = model(
        input_ids=torch.cat([ids.long(), tokens], dim=1), pixel_values=pixels,
        attention_mask=mask.long(), position_ids=positions(mask),
    ).logits[:, width - 1 : -1]  # fmt: skip
    nll = -torch.log_softmax(scored, -1).gather(-1, tokens[..., None])[..., 0]
    kept = tensor(text.mask).float()
    rows = kept.any(-1)
    answer_loss = ((nll * kept).sum(-1) / kept.sum(-1).clamp(min=1))[rows].mean()
    return WEIGHTS["self_qa/codes"] * image_loss + WEIGHTS["self_qa/text"] * answer_loss


def assert_same_gradients(found, expected, tolerance) -> None:
    for path, leaf in leaf_paths(expected):
        if path.startswith("vqmodel"):
            continue  # no stage of this loss trains the image tokenizer
        value = dict(leaf_paths(found))[path]
        largest = np.abs(leaf).max()
        error = np.abs(np.asarray(value) - leaf).max()
        assert error <= tolerance * max(largest, 1e-4), f"{path}: {error:.2e} of {largest:.2e}"


@pytest.mark.slow
def test_gradients_equal_those_of_pytorch_with_the_same_noise(model, config, batch):
    params = torch_janus.params_of(model)
    keys = jax.random.wrap_key_data(batch.segments[0].replay[NOISE_KEYS])
    length, num_codes = batch.segments[0].values.shape[1], config.vq.num_embeddings
    noise = draw_noise(keys, jnp.arange(length), num_codes)
    loss = torch_loss(model, batch, noise)
    model.zero_grad()
    loss.backward()
    expected = torch_janus.gradients_of(model)
    found, metrics = gradients_of(config, params, batch)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), abs=1e-4)
    assert_same_gradients(found, expected, 1e-3)
    # The head of the images learns from answers alone only if the gradient passes.
    detached, _ = gradients_of(config, params, batch, through=False)
    head = "generation_head/vision_head/kernel"
    difference = dict(leaf_paths(found))[head] - dict(leaf_paths(detached))[head]
    assert np.abs(difference).max() > 1e-3 * np.abs(dict(leaf_paths(found))[head]).max()


@pytest.mark.slow
def test_micro_batches_change_nothing(model, config, batch):
    params = torch_janus.params_of(model)
    whole, metrics = gradients_of(config, params, batch)
    pieces, of_pieces = gradients_of(config, params, batch, micro_batches=2)
    assert float(metrics["loss"]) == pytest.approx(float(of_pieces["loss"]), abs=1e-5)
    assert_same_gradients(pieces, jax.tree.map(np.asarray, whole), 1e-3)


def test_scores_are_those_of_gumbel_noise_whose_winner_was_drawn():
    """Over many draws the scores are distributed as fresh ones; the drawn code always wins."""
    logits = jnp.asarray([2.0, 0.5, -1.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    noise = draw_noise(keys, jnp.arange(1), 3)
    fresh, drawn = score_codes(jnp.broadcast_to(logits, (20_000, 1, 3)), None, noise, True)
    others = draw_noise(jax.random.split(jax.random.key(1), 20_000), jnp.arange(1), 3)
    scores, same = score_codes(jnp.broadcast_to(logits, (20_000, 1, 3)), drawn, others, False)
    np.testing.assert_array_equal(same, drawn)
    np.testing.assert_array_equal(np.argmax(scores, -1), drawn)
    for quantile in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(
            np.quantile(scores[:, 0], quantile, axis=0), np.quantile(fresh[:, 0], quantile, axis=0),
            atol=0.06,
        )  # fmt: skip
    share = np.asarray([(drawn == code).mean() for code in range(3)])
    np.testing.assert_allclose(share, jax.nn.softmax(logits), atol=0.02)


def test_vectors_are_those_of_the_codes_and_the_code_book_learns_from_the_chosen_ones_alone():
    """Against the definition with one-hots: values to the bit, gradients of states and book."""
    book = jax.random.normal(jax.random.key(0), (5, 3))
    states = jax.random.normal(jax.random.key(1), (2, 7, 4))
    head = jax.random.normal(jax.random.key(2), (4, 5))
    codes = jax.random.randint(jax.random.key(3), (2, 7), 0, 5)
    keys, weights = jax.random.split(jax.random.key(4)), jnp.arange(42.0).reshape(2, 7, 3)
    options = LogprobOptions(SPECIAL, chunk=6, straight_through=StraightThrough(False, TAU))

    def choose(states, book):
        return choose_vectors(lambda x: x @ head, book, states, codes, keys, options)[0]

    def define(states, book):
        noise = draw_noise(keys, jnp.arange(7), 5)
        scores, _ = score_codes(states @ head, codes, noise, False)
        relaxed = jax.nn.softmax(scores / TAU)
        return (jax.nn.one_hot(codes, 5) + relaxed - jax.lax.stop_gradient(relaxed)) @ book

    np.testing.assert_array_equal(choose(states, book), book[codes])
    found, expected = (
        jax.grad(lambda *x: (f(*x) * weights).sum(), (0, 1))(states, book)  # noqa: B023
        for f in (choose, define)
    )
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
