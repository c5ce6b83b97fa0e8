"""An update that reads several answers in a row, against one that reads each in its own."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS, LossConstants
from corl_jax.devices.batches import num_batch_shards
from corl_jax.devices.mesh import batch_sharding, make_mesh, param_shardings
from corl_jax.params import leaf_paths, partition
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.layout import RULES, TRAINABLE
from corl_jax.policies.packing import PACKED, Blocks
from corl_jax.policies.show_o.family import FAMILY as SHOW_O
from corl_jax.train import answer_rows, step
from corl_jax.train.answer_rows import depends_on_lengths, measure_rows, pack_answers
from tests.support.tiny_models import divisible, two_layers
from tests.support.tiny_runs import SPECIAL, both_tasks, place_params, random_params
from tests.support.tolerances import NETWORK

pytestmark = pytest.mark.usefixtures("exact_products")

PROMPTS, GROUP = 8, 4
OPTIONS = step.UpdateOptions(
    CLIPPED_POLICY_LOSS, LossConstants(kl_coef=0.2, reduction="token_mean"),
    LogprobOptions(SPECIAL, temperature=0.9, remat="none", chunk=10_000),
    (("mm2t", 0.7),), dtype=jnp.float32,
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny_config):
    return divisible(two_layers(tiny_config))


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture(scope="module")
def batch(config):
    """Answers of up to three of six tokens; old, reference and recorded log-probs of anyone."""
    rng = np.random.default_rng(9)
    task = both_tasks(config, PROMPTS, GROUP)["mm2t"]
    (text,) = task.segments
    shape = text.values.shape
    old, ref, drawn = (rng.normal(-4, 0.4, shape).astype(np.float32) for _ in range(3))
    kept = np.arange(shape[1]) < rng.integers(0, 4, (len(drawn), 1))
    text = dataclasses.replace(text, mask=kept, logprobs=drawn)
    return {
        "mm2t": dataclasses.replace(
            task, segments=(text,), old_logprobs=(old,), ref_logprobs=(ref,)
        )
    }


def make_run(mesh=None, micro_batches: int = 1, **changes) -> SimpleNamespace:
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    blocks = Blocks(num_batch_shards(mesh), micro_batches)
    values = {"family": FAMILY, "answer_blocks": blocks, "group_size": GROUP} | changes
    return SimpleNamespace(mesh=mesh, **values)


@pytest.fixture
def always_packed(monkeypatch):
    monkeypatch.setattr(answer_rows, "MIN_SAVED_TOKENS", 1)


def gradients(config, options, params, batch):
    program = jax.jit(lambda *args: step.gradients(FAMILY, config, options, *args))
    return jax.device_get(program(*partition(params, TRAINABLE), batch))


@pytest.fixture(scope="module")
def apart(config, params, batch):
    with jax.default_matmul_precision("highest"):
        return gradients(config, OPTIONS, params, batch)


def assert_same(found, expected) -> None:
    (grads, metrics), (wanted_grads, wanted) = found, expected
    assert metrics.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(
            metrics[name], wanted[name], rtol=NETWORK, atol=NETWORK, err_msg=name
        )
    right = dict(leaf_paths(wanted_grads))
    for path, leaf in leaf_paths(grads):
        error = np.abs(leaf - right[path]).max() / np.abs(right[path]).max()
        assert error < NETWORK, (path, error)


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_packed_answers_train_as_answers_apart(
    config, params, batch, apart, micro_batches, always_packed
):
    run = make_run(micro_batches=micro_batches)
    packed = pack_answers(run, batch)
    rows = packed["mm2t"].segments[0].replay[PACKED]
    assert len(rows) == PROMPTS * GROUP // 2 and measure_rows(run, packed) == {
        "mm2t/update_rows": 0.5
    }
    options = dataclasses.replace(OPTIONS, micro_batches=micro_batches)
    assert_same(gradients(config, options, params, packed), apart)


@pytest.mark.usefixtures("compiled_anew")
def test_packed_answers_stay_on_their_devices(config, params, batch, apart, always_packed, capfd):
    mesh = make_mesh(2, 2, 2)
    trained, frozen = (place_params(part, mesh, RULES) for part in partition(params, TRAINABLE))
    options = dataclasses.replace(OPTIONS, micro_batches=2)
    program = jax.jit(
        lambda *args: step.gradients(FAMILY, config, options, *args),
        out_shardings=(param_shardings(trained, mesh, RULES), None),
    )
    with jax.set_mesh(mesh):
        spread = pack_answers(make_run(mesh, 2), jax.device_put(batch, batch_sharding(mesh)))
        assert PACKED in spread["mm2t"].segments[0].replay
        found = jax.device_get(program(trained, frozen, spread))
    assert_same(found, apart)
    assert "rematerialization" not in capfd.readouterr().err, "XLA found no way between layouts"


def test_log_probs_before_the_update_are_those_of_answers_apart(
    config, params, batch, always_packed
):
    options = dataclasses.replace(OPTIONS, micro_batches=2)
    score = functools.partial(
        step.make_logprob_step(FAMILY, config, options), *partition(params, TRAINABLE)
    )
    answers = {"mm2t": dataclasses.replace(batch["mm2t"], old_logprobs=None, ref_logprobs=None)}
    packed = pack_answers(make_run(micro_batches=2), answers)
    (found,), (wanted,) = score(packed)["mm2t"], score(answers)["mm2t"]
    mask = answers["mm2t"].segments[0].mask
    np.testing.assert_allclose(found, np.where(mask, wanted, 0.0), rtol=NETWORK, atol=NETWORK)


def test_images_are_not_packed(config, always_packed):
    tasks = both_tasks(config, PROMPTS, GROUP)
    assert pack_answers(make_run(), tasks)["t2i"] is tasks["t2i"]


@pytest.mark.parametrize("changes", [{"answer_blocks": None}, {"family": SHOW_O}])
def test_what_cannot_be_packed_stays_as_it_is(batch, always_packed, changes):
    run = make_run(**changes)
    assert pack_answers(run, batch)["mm2t"] is batch["mm2t"] and not measure_rows(run, batch)


def test_few_tokens_are_not_worth_another_program(batch):
    run = make_run()
    assert pack_answers(run, batch)["mm2t"] is batch["mm2t"]
    assert measure_rows(run, batch) == {"mm2t/update_rows": 1.0}


def test_lengths_decide_what_an_update_of_many_answers_reads(config, batch, monkeypatch):
    tasks = both_tasks(config, PROMPTS, GROUP)
    images = {"t2i": SimpleNamespace(segments=tasks["t2i"].segments)}
    answers = {"mm2t": SimpleNamespace(segments=batch["mm2t"].segments)}
    assert not depends_on_lengths(make_run(), answers)  # too few to share rows
    monkeypatch.setattr(answer_rows, "MIN_SAVED_TOKENS", 1)
    assert depends_on_lengths(make_run(), images | answers)
    assert not depends_on_lengths(make_run(), images)
    assert not depends_on_lengths(make_run(answer_blocks=None), answers)
