"""Whose rows are whose on a mesh over several processes, and that none change places."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from corl_jax.devices import batches
from corl_jax.devices.mesh import make_mesh
from corl_jax.errors import InputError
from corl_jax.tasks import CODES
from corl_jax.train import iteration
from corl_jax.types import EncodedPrompts, Prompts, Segment


class Device(SimpleNamespace):
    """A device of another process."""

    def __hash__(self) -> int:
        return self.id


def devices(processes: int, each: int) -> list[Device]:
    """In an order that mixes the processes, as TPUs have it."""
    listed = [
        Device(id=i, process_index=i // each, platform="cpu", device_kind="x", client=None)
        for i in range(processes * each)
    ]
    return listed[::2] + listed[1::2]


def mesh_of(monkeypatch, processes: int, each: int, **shape: int):
    monkeypatch.setattr(jax, "devices", lambda: devices(processes, each))
    return make_mesh(**shape)


@pytest.mark.parametrize(
    ("shape", "shares"),
    [
        ({"data": 8}, [0, 1]),
        ({"data": 2, "fsdp": 2, "tensor": 2}, [0, 1]),
        ({"data": 1, "tensor": 8}, [0, 0]),  # both processes hold all rows
        ({"data": 2, "tensor": 4}, [0, 1]),
    ],
)
def test_shares_of_two_processes(monkeypatch, shape, shares):
    assert batches.list_process_shards(mesh_of(monkeypatch, 2, 4, **shape)) == shares


def test_four_processes_hold_two_shares(monkeypatch):
    assert batches.list_process_shards(mesh_of(monkeypatch, 4, 2, data=2, tensor=4)) == [0, 0, 1, 1]


def test_shares_that_do_not_follow_each_other_are_refused(monkeypatch):
    mesh = mesh_of(monkeypatch, 2, 6, data=3, tensor=4)
    with pytest.raises(InputError, match="divisor or a multiple of the devices of a process"):
        batches.list_process_shards(mesh)


def test_rows_come_back_in_order(mesh):
    values = np.arange(24.0).reshape(8, 3)
    placed = batches.put_rows(mesh, values)
    assert placed.sharding.shard_shape(placed.shape) == (2, 3)
    for found in (
        batches.to_host_rows(placed),
        batches.all_gather_array(placed),
        batches.all_gather_rows(mesh, values),
    ):
        np.testing.assert_array_equal(found, values)
    assert batches.take_own_rows(mesh, list(range(8))) == list(range(8)) and batches.process_shard(
        mesh
    ) == (0, 1)


def test_an_array_that_is_there_twice_is_placed_once(mesh):
    values, others = np.zeros((4, 2)), np.ones((4, 2))
    first, second, third = batches.put_rows(mesh, [values, others, values])
    assert first is third and second is not first


@pytest.mark.parametrize("at_once", [4, 8, 12, 16])
def test_pieces_of_a_rollout_are_put_together_in_order(mesh, at_once):
    """Four blocks of four prompts; the last piece may be smaller."""

    def sampler(params, prompts, keys):
        tokens = jnp.repeat(prompts.input_ids, 2, axis=0)
        bits = jax.random.key_data(keys)
        mask = jnp.ones(tokens.shape, bool)
        return (Segment(CODES, tokens, mask, bits.astype(jnp.float32)),)

    run = SimpleNamespace(
        mesh=mesh, rollout_batch=at_once, group_size=2, seed=3, evaluation_samplers={"t2i": sampler}
    )
    ids = np.arange(16)[:, None] * np.ones((1, 5), np.int32)
    prompts = Prompts(np.arange(16), {}, {"t2i": EncodedPrompts(ids, np.ones(ids.shape, bool))})
    with jax.set_mesh(mesh):
        found = iteration.sample(run, "t2i", {}, prompts)
    np.testing.assert_array_equal(found.segments[0].values[:, 0], np.repeat(np.arange(16), 2))
    np.testing.assert_array_equal(found.prompts.input_ids, ids)
    whole = SimpleNamespace(**{**vars(run), "rollout_batch": 16})
    with jax.set_mesh(mesh):
        wanted = iteration.sample(whole, "t2i", {}, prompts)
    np.testing.assert_array_equal(found.segments[0].logprobs, wanted.segments[0].logprobs)


@pytest.mark.parametrize(
    ("rows", "most", "multiple", "sizes"),
    [(7, 64, 1, [7]), (72, 64, 1, [36, 36]), (7, 3, 1, [3, 3, 3]), (6, 64, 4, [8]),
     (9, 4, 4, [4] * 3)],
)  # fmt: skip
def test_pieces_have_one_size_and_hold_every_row(rows, most, multiple, sizes):
    pieces = list(batches.split_rows(rows, most, multiple))
    assert [len(piece) for piece in pieces] == sizes
    np.testing.assert_array_equal(np.concatenate(pieces)[:rows], np.arange(rows))


def test_rows_are_padded_with_the_last_one():
    assert batches.pad_rows(np.array([[1, 2], [3, 4]]), 4).tolist() == [[1, 2]] + 3 * [[3, 4]]
    assert batches.pad_rows([5, 6, 7], 3).tolist() == [5, 6, 7]


@pytest.mark.parametrize("spread", [False, True])
def test_a_program_in_pieces_is_compiled_once_and_keeps_the_rows_in_order(spread):
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(jnp.ones(()), everywhere) if spread else jnp.ones(())
    rows, taken = np.arange(10, dtype=np.float32), []

    def take(index):
        taken.append(len(index))
        return (rows[index],)

    program = jax.jit(lambda x: (2 * x, jnp.stack([x, -x], axis=-1)))
    double, both = batches.run_in_pieces(program, take, 10, 3, params)
    assert taken == ([4, 4, 4] if spread else [3, 3, 3, 3])
    assert program._cache_size() == 1
    np.testing.assert_array_equal(double, 2 * rows)
    np.testing.assert_array_equal(both, np.stack([rows, -rows], axis=-1))


def test_all_pieces_are_started_before_the_first_is_waited_for(monkeypatch):
    events, fetch = [], batches.to_host_rows
    monkeypatch.setattr(batches, "to_host_rows", lambda x: events.append("wait") or fetch(x))

    def program(x):
        events.append("start")
        return 2 * x

    rows = np.arange(5, dtype=np.float32)
    (double,) = batches.run_in_pieces(
        program, lambda index: (jnp.asarray(rows[index]),), 5, 2, None
    )
    shifted = double.then(lambda x: x + 1)
    assert events == ["start"] * 3
    for _ in range(2):
        np.testing.assert_array_equal(shifted, 2 * rows + 1)
        np.testing.assert_array_equal(double, 2 * rows)
    assert events == ["start"] * 3 + ["wait"] * 3
    assert np.asarray(double, np.float16).dtype == np.float16


def test_no_rows_run_no_program():
    assert batches.run_in_pieces(None, None, 0, 3, None) == []
