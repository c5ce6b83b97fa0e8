"""The supervised stage and the image tokenizer's recipe: targets, losses, what learns."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from corl_jax.algorithms.likelihoods import NEGATIVE_LOG_LIKELIHOOD
from corl_jax.algorithms.losses import LossConstants
from corl_jax.config import schema
from corl_jax.data.images import fit_pixels
from corl_jax.params import partition
from corl_jax.policies.causal_answers import score_text
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus import network
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.logprobs import image_logprobs
from corl_jax.policies.janus.prompts import Processor
from corl_jax.policies.janus.tokenizer_training import assignment_entropy, vq_loss
from corl_jax.train import sft, step
from corl_jax.train.stages import STAGES
from corl_jax.types import Prompts
from tests.support import tiny_runs
from tests.support.tiny_models import (
    encode_prompts,
    encode_questions,
    tiny_image,
    tiny_tokenizer_dir,
)
from tests.support.tolerances import NETWORK

BATCH = 400


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_dir(
        tiny_tokenizer_dir(tmp_path_factory.mktemp("words"), image_size=16, patch_size=4)
    )


@pytest.fixture(scope="module")
def params(tiny_config):
    return tiny_runs.random_params(tiny_config)


def run_of(processor, **options):
    block, stage = schema.Sft(**options), STAGES["sft"]
    return SimpleNamespace(
        family=FAMILY, processor=processor, sft=block, seed=0, image_side=16,
        tasks=stage.tasks(SimpleNamespace(sft=block)),
        loss_weights=tuple(stage.loss_weights(SimpleNamespace(stage="sft", sft=block)).items()),
        train_loader=SimpleNamespace(batch_size=BATCH),
    )  # fmt: skip


def prompts_of(processor, rows: int) -> Prompts:
    texts = [f"a red circle and {i} squares" for i in range(rows)]
    images = [tiny_image(i) for i in range(rows)]
    columns = {
        "real_image": images, "sft_answer": ["<answer>two</answer>", "no"] * (rows // 2),
        "caption": texts,
    }  # fmt: skip
    encoded = {
        "t2i": encode_prompts(processor, texts), "mm2t": encode_questions(processor, texts, images)
    }  # fmt: skip
    return Prompts(np.arange(rows), columns, encoded)


# ---- targets


def test_targets_end_with_eos_and_are_padded_to_the_right(processor):
    targets = sft.make_targets(run_of(processor), ["two", "a red circle", ""])
    tokens, mask = targets.values, targets.mask
    assert tokens.shape[1] % processor.bucket_size == 0
    for row, kept, text in zip(tokens, mask, ["two", "a red circle", ""], strict=True):
        ids = row[kept]
        assert ids[-1] == processor.special.eos and processor.decode(ids) == text
        assert kept[: len(ids)].all() and (row[~kept] == processor.special.eos).all()


def test_targets_cannot_smuggle_structure_in(processor):
    """The string of a special token in an answer is plain text."""
    targets = sft.make_targets(run_of(processor), ["<｜end▁of▁sentence｜>"])
    assert (targets.values[targets.mask] == processor.special.eos).sum() == 1


def test_the_batch_has_the_kinds_that_are_trained(processor):
    prompts = prompts_of(processor, 4)
    batch = sft.make_supervised_batch(run_of(processor), prompts, 0)
    assert set(batch) == {"t2i", "mm2t", "caption"}
    assert batch["t2i"].segments[0].values.shape == (4, 16, 16, 3)
    assert all(part.advantages is None for part in batch.values())
    np.testing.assert_array_equal(
        batch["caption"].prompts.pixel_values, prompts.encoded["mm2t"].pixel_values
    )
    assert "t2i" not in sft.make_supervised_batch(run_of(processor, t2i_weight=0.0), prompts, 0)
    assert "caption" not in sft.make_supervised_batch(
        run_of(processor, caption_column=None), prompts, 0
    )


@pytest.mark.parametrize(
    ("tasks", "kinds", "columns"),
    [
        ("unified", {"t2i", "mm2t", "caption"}, ["real_image", "sft_answer", "caption"]),
        ("mm2t", {"mm2t", "caption"}, ["real_image", "sft_answer", "caption"]),
        ("t2i", {"t2i"}, ["real_image"]),
    ],
)
def test_only_the_chosen_tasks_need_columns(processor, tasks, kinds, columns):
    run = run_of(processor, tasks=tasks)
    prompts = prompts_of(processor, 4)
    if tasks == "t2i":
        del prompts.columns["sft_answer"], prompts.columns["caption"], prompts.encoded["mm2t"]
    assert set(sft.make_supervised_batch(run, prompts, 0)) == kinds
    assert STAGES["sft"].target_columns(SimpleNamespace(sft=run.sft)) == columns


def test_dropped_prompts_are_guidances_unconditional_rows(processor, monkeypatch):
    prompts = prompts_of(processor, 8)

    def ids(dropout, step=0):
        monkeypatch.setattr(sft, "CFG_DROPOUT", dropout)
        run = run_of(processor)
        later = dataclasses.replace(prompts, index=prompts.index + step * BATCH)
        return sft.make_supervised_batch(run, later, step)["t2i"].prompts.input_ids

    np.testing.assert_array_equal(ids(0.0), prompts.encoded["t2i"].input_ids)
    special, whole = processor.special, prompts.encoded["t2i"].input_ids
    structure = (whole == special.bos) | (whole == special.boi)
    np.testing.assert_array_equal(ids(1.0), np.where(structure, whole, special.pad))
    some = ids(0.5)
    dropped = (some != whole).any(axis=1)
    assert 0 < dropped.sum() < 8
    np.testing.assert_array_equal(ids(0.5), some)  # a function of seed, step and rows
    assert any((ids(0.5, step) != some).any() for step in range(1, 5))


def test_pixels_of_a_drawing():
    (side,) = fit_pixels([Image.new("RGB", (16, 16), (255, 0, 127))], 16)
    assert side.shape == (16, 16, 3)
    np.testing.assert_allclose(side[3, 5], [1, -1, 127 / 127.5 - 1], atol=1e-6)
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    wide.paste((0, 255, 0), (16, 0, 48, 32))  # the middle square
    assert (fit_pixels([wide], 8)[0, 2:6, 2:6] == [-1, 1, -1]).all()


# ---- losses


def test_the_loss_is_the_mean_over_tokens(tiny_config, params):
    """Of all rows together: a long answer has more to say than a short one."""
    batch = {
        name: step.TaskBatch(part.prompts, part.segments)
        for name, part in tiny_runs.both_tasks(tiny_config, 2, 1).items()
    }
    batch["caption"] = tiny_runs.text_batch(16, 16, 2, 1, seed=4)
    batch["caption"] = step.TaskBatch(batch["caption"].prompts, batch["caption"].segments)
    weights = {"t2i": 1.0, "mm2t": 0.5, "caption": 0.25}
    logprob_options = LogprobOptions(tiny_runs.SPECIAL, remat="none")
    options = step.UpdateOptions(
        NEGATIVE_LOG_LIKELIHOOD, LossConstants(), logprob_options, tuple(weights.items()),
        dtype=jnp.float32,
    )  # fmt: skip
    trained, frozen = partition(params, ["lm_head/.*"])
    compute = jax.jit(lambda *args: step.gradients(FAMILY, tiny_config, options, *args)[1])
    metrics, total = compute(trained, frozen, batch), 0.0

    @jax.jit
    def logprobs(params):
        model = network.bind(tiny_config, params)
        functions = {"t2i": image_logprobs, "mm2t": score_text, "caption": score_text}
        return {
            name: functions[name](model, part.prompts, part.segments[0].values, logprob_options)[0]
            for name, part in batch.items()
        }

    for name, logp in logprobs(params).items():
        nll = -np.asarray(logp)[batch[name].segments[0].mask].mean()
        assert metrics[f"{name}/nll"] == pytest.approx(nll, rel=NETWORK)
        total += weights[name] * nll
    assert metrics["loss"] == pytest.approx(total, rel=NETWORK)


@pytest.fixture(scope="module")
def tokenizer_loss(tiny_config, params):
    """weights -> (loss, metrics, gradients) of the image tokenizer on two pictures."""
    pixels = jnp.asarray(fit_pixels([tiny_image(i) for i in range(2)], 16))

    @jax.jit
    def compute(part, weights):
        def loss(part):
            model = network.bind(tiny_config, params | {"vqmodel": part}).vqmodel
            return vq_loss(model, pixels, *weights)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(part)
        return value, metrics, grads

    return lambda *weights: jax.device_get(compute(params["vqmodel"], weights))


def test_every_part_of_the_tokenizer_learns(tokenizer_loss):
    """The encoder through the quantiser, the codebook, the decoder."""
    _, _, grads = tokenizer_loss(0.5, 0.0, 0.0)  # nothing else pulls at the encoder
    for part in ("encoder", "quant_conv", "quantize", "post_quant_conv", "decoder"):
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads[part])) > 1e-6, part


def test_the_tokenizers_loss_adds_up(tokenizer_loss):
    value, metrics, _ = tokenizer_loss()  # with the weights of the stage
    expected = (  # the codes' move and the latents' commitment have one value
        metrics["vq/l1"] + 0.5 * metrics["vq/edges"] + 1.25 * metrics["vq/commitment"]
        + 0.02 * metrics["vq/entropy"]
    )  # fmt: skip
    assert value == pytest.approx(float(expected), rel=NETWORK)
    assert 0 < metrics["vq/code_usage"] <= 1 and 0 < metrics["vq/rmse"] < 1


def test_entropy_wants_clear_choices_of_all_codes():
    clear = jnp.eye(6) * 2 - 1  # each latent sure of a code of its own
    same = jnp.tile(clear[:1], (6, 1))  # sure, but all of one
    vague = jnp.zeros((6, 6))
    values = [float(assignment_entropy(x)) for x in (clear, same, vague)]
    assert values[0] == pytest.approx(-np.log(6), abs=1e-4)
    assert values[1] == pytest.approx(0, abs=1e-4) and values[2] == pytest.approx(0, abs=1e-4)
