"""The sampler's mathematics against an eager loop in numpy, with the same noise."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.policies.show_o.unmasking import (
    GIVEN,
    Unmasker,
    give_noise,
    list_masked_counts,
    list_temperatures,
    make_noise,
)

CODES = 8
# Masked places after each step of 50, of 1,024.
COUNTS = [
    1023, 1021, 1019, 1015, 1011, 1005, 999, 991, 983, 973, 963, 952, 939, 926, 912, 897, 881,
    864, 846, 828, 809, 789, 768, 746, 724, 700, 677, 652, 627, 601, 575, 548, 521, 493, 464,
    435, 406, 376, 346, 316, 285, 254, 223, 191, 160, 128, 96, 64, 32, 1,
]  # fmt: skip


class Network:
    """Logits that depend on the codes of all places, with and without a prompt."""

    def __init__(self, places: int, seed: int = 0):
        draw = np.random.default_rng(seed).standard_normal
        self.table = draw((CODES + 1, 6)).astype(np.float32)
        self.mix = draw((places, places)).astype(np.float32) / math.sqrt(places)
        self.heads = draw((2, 6, CODES)).astype(np.float32)

    def read(self, codes):
        return self.mix @ self.table[codes]

    def logits(self, states):
        return states @ self.heads[0], states @ self.heads[1]


def make_unmasker(network: Network, weight: float, **options) -> Unmasker:
    table, mix, heads = (jnp.asarray(x) for x in (network.table, network.mix, network.heads))

    def logits_of(states):
        conditional, other = states @ heads[0], states @ heads[1]
        guided = (1 + weight) * conditional - weight * other if weight else conditional
        return conditional, guided

    return Unmasker(lambda codes: mix @ table[codes], logits_of, num_codes=CODES, **options)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def draw_slowly(network, codes, known, weight, steps, gumbels, uniforms):
    """One row after the other, one place after the other, from the specification."""
    codes, known = codes.copy(), known.copy()
    rows, places = codes.shape
    committed = np.where(known, GIVEN, steps - 1)
    tau, states = 1.0, []
    for s in range(steps):
        before = np.where(known, codes, CODES)
        states.append((before, known.copy()))
        conditional, other = network.logits(network.read(before))
        z = (1 + weight) * conditional - weight * other if weight else conditional
        logp = log_softmax(z)
        tau *= 1 - (s + 1) / steps
        for n in range(rows):
            unknown = int((~known[n]).sum())
            share = np.float32(math.cos(math.pi / 2 * (s + 1) / steps))
            m = max(1, min(unknown - 1, math.floor(places * share)))
            confidence = np.zeros(places)
            for place in range(places):
                if not known[n, place]:
                    codes[n, place] = np.argmax(logp[n, place] + gumbels[s, n, place])
                of_code = logp[n, place, codes[n, place]]
                base = math.log(np.finfo(np.float32).max) if known[n, place] else of_code
                noise = -math.log(max(uniforms[s, n, place], 1e-20))
                confidence[place] = base - tau * math.log(max(noise, 1e-20))
            cut = sorted(confidence)[m]
            for place in range(places):
                keep = confidence[place] >= cut
                if keep and not known[n, place]:
                    committed[n, place] = s
                known[n, place] = keep
    return codes, committed, states


def noise_arrays(rows, places, steps, seed=1):
    draw = np.random.default_rng(seed)
    gumbels = draw.gumbel(size=(steps, rows, places, CODES)).astype(np.float32)
    return gumbels, draw.random((steps, rows, places), np.float32)


@pytest.mark.parametrize(
    ("places", "steps", "weight", "given"),
    [(16, 8, 2.0, 0), (16, 8, 0.0, 0), (6, 10, 1.0, 0), (16, 8, 2.0, 9), (16, 1, 1.0, 0)],
    ids=["guided", "unguided", "more steps than places", "in-painting", "one step"],
)
def test_draws_equal_an_eager_loop(places, steps, weight, given):
    rows, network = 3, Network(places)
    draw = np.random.default_rng(5)
    codes = draw.integers(0, CODES, (rows, places)).astype(np.int32)
    known = np.argsort(draw.random((rows, places))) < given
    noise = noise_arrays(rows, places, steps)
    expected, committed, states = draw_slowly(network, codes, known, weight, steps, *noise)
    unmasker = make_unmasker(
        network, weight, noise=give_noise(*map(jnp.asarray, noise)), steps=steps, record=True,
        chunk=rows * 5,
    )  # fmt: skip
    drawn = jax.jit(unmasker.draw)(codes, known)
    np.testing.assert_array_equal(drawn.codes, expected)
    np.testing.assert_array_equal(drawn.committed_at, committed)
    np.testing.assert_array_equal(np.asarray(drawn.codes)[known], codes[known])
    for s, (before, of_step) in enumerate(states):
        np.testing.assert_array_equal(drawn.steps.codes[s], before)
        np.testing.assert_array_equal(drawn.steps.known[s], of_step)
        # The numbers of steps and the finished codes give the same states.
        restored = np.where(committed < s, expected, CODES)
        np.testing.assert_array_equal(restored, before)


def test_recorded_log_probs_are_those_of_the_step_that_commits():
    places, steps, weight = 16, 6, 1.5
    network, noise = Network(places), noise_arrays(2, places, 6)
    unmasker = make_unmasker(
        network, weight, noise=give_noise(*map(jnp.asarray, noise)), steps=steps, record=True
    )
    drawn = unmasker.draw(jnp.zeros((2, places), jnp.int32), jnp.zeros((2, places), bool))
    codes, committed = np.asarray(drawn.codes), np.asarray(drawn.committed_at)
    for s in range(steps):
        conditional, other = network.logits(network.read(np.where(committed < s, codes, CODES)))
        guided = (1 + weight) * conditional - weight * other
        for logits, of_all, record in (
            (conditional, drawn.conditional, drawn.steps.conditional),
            (guided, drawn.guided, drawn.steps.guided),
        ):
            logp = log_softmax(logits)
            picked = np.take_along_axis(logp, codes[..., None], axis=-1)[..., 0]
            is_new = committed == s
            np.testing.assert_allclose(np.asarray(of_all)[is_new], picked[is_new], atol=1e-5)
            np.testing.assert_allclose(np.asarray(record)[s][is_new], picked[is_new], atol=1e-5)


def test_every_place_is_committed_once_and_the_counts_are_the_schedule():
    places, steps = 64, 12
    noise = make_noise(jax.random.split(jax.random.key(0), 4), places, CODES)
    start = jnp.zeros((4, places), jnp.int32)
    unmasker = make_unmasker(Network(places), 1.0, noise=noise, steps=steps)
    drawn = unmasker.draw(start, start > 0)
    committed = np.asarray(drawn.committed_at)
    assert committed.min() >= 0 and committed.max() == steps - 1
    counts = np.maximum(list_masked_counts(places, steps), 1)
    for s in range(1, steps):
        np.testing.assert_array_equal((committed >= s).sum(axis=-1), counts[s - 1])


def test_counts_and_temperatures_of_the_released_settings():
    assert np.maximum(list_masked_counts(1024, 50), 1).tolist() == COUNTS
    assert list_masked_counts(1024, 50)[-1] == -1
    np.testing.assert_allclose(
        list_temperatures(8), [0.875, 0.65625, 0.41, 0.205, 0.0769, 0.0192, 0.0024, 0], atol=2e-4
    )


def test_counts_round_as_torch_does():
    torch = pytest.importorskip("torch")
    for places in (16, 64, 256, 1024):
        for steps in (*range(1, 25), 50, 64):
            expected = [
                int(
                    (
                        places * torch.cos(torch.tensor(1.0 * (s + 1) / steps) * math.pi * 0.5)
                    ).floor()
                )
                for s in range(steps)
            ]
            assert list_masked_counts(places, steps).tolist() == expected, (places, steps)


def test_in_painting_reveals_one_place_a_step_at_first():
    # 27 unknown of 64: the schedule counts all places.
    places, steps = 64, 8
    known = np.arange(places)[None] >= 27
    keys = jax.random.split(jax.random.key(1), 1)
    unmasker = make_unmasker(
        Network(places), 0.0, noise=make_noise(keys, places, CODES), steps=steps
    )
    codes = jnp.zeros((1, places), jnp.int32)

    def count_unknown(drawn):
        committed = np.asarray(drawn.committed_at)
        return [int((committed >= s).sum()) for s in range(1, steps)]

    assert count_unknown(unmasker.draw(codes, known)) == [26, 25, 24, 23, 22, 21, 12]
    of_unknown = dataclasses.replace(unmasker, count_unknown=True).draw(codes, known)
    assert count_unknown(of_unknown) == list_masked_counts(27, steps)[:-1].tolist()


def test_a_finished_image_stays():
    keys = jax.random.split(jax.random.key(1), 2)
    unmasker = make_unmasker(Network(16), 1.0, noise=make_noise(keys, 16, CODES), steps=4)
    codes = jnp.arange(32).reshape(2, 16) % CODES
    drawn = unmasker.draw(codes, jnp.ones((2, 16), bool))
    np.testing.assert_array_equal(drawn.codes, codes)
    assert (np.asarray(drawn.committed_at) == GIVEN).all()


def test_a_row_depends_on_its_key_alone():
    network, keys = Network(16), jax.random.split(jax.random.key(3), 4)

    def draw(keys, **options):
        unmasker = make_unmasker(
            network, 1.0, noise=make_noise(keys, 16, CODES), steps=5, **options
        )
        start = jnp.zeros((len(keys), 16), jnp.int32)
        return np.asarray(unmasker.draw(start, start.astype(bool)).codes)

    whole = draw(keys)
    assert len({tuple(row) for row in whole}) == 4
    np.testing.assert_array_equal(draw(keys[1:3], chunk=10), whole[1:3])


def test_greedy_rows_take_the_most_likely_codes():
    network, keys = Network(16), jax.random.split(jax.random.key(3), 2)
    noise = make_noise(keys, 16, CODES)
    start = jnp.zeros((2, 16), jnp.int32)
    zeros = give_noise(jnp.zeros((5, 2, 16, CODES)), jnp.full((5, 2, 16), math.exp(-1.0)))
    without = make_unmasker(network, 1.0, noise=zeros, steps=5).draw(start, start > 0)
    one = make_unmasker(network, 1.0, noise=noise, steps=5, greedy=jnp.array([False, True]))
    drawn = one.draw(start, start > 0)
    np.testing.assert_array_equal(drawn.codes[1], without.codes[1])
    assert (np.asarray(drawn.codes[0]) != without.codes[0]).any()


def test_codes_are_drawn_from_the_softmax():
    # One step and one place: the code has the probabilities of the logits.
    rows = 4000
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    unmasker = Unmasker(
        lambda codes: codes, lambda codes: (jnp.broadcast_to(logits, (*codes.shape, 4)),) * 2,
        make_noise(jax.random.split(jax.random.key(0), rows), 1, 4), num_codes=4, steps=1,
    )  # fmt: skip
    codes = unmasker.draw(jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows, 1), bool)).codes
    shares = np.bincount(np.asarray(codes).ravel(), minlength=4) / rows
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)
