"""From files onto a mesh: the values of the whole model, and only the bytes that are needed."""

from __future__ import annotations

import dataclasses
import math
import os
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from corl_jax.config import schema
from corl_jax.devices import mesh as device_mesh
from corl_jax.errors import InputError
from corl_jax.params import flatten, map_with_path, partition, unflatten
from corl_jax.policies.janus import network
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.layout import RULES, TRAINABLE
from corl_jax.runs.checkpoints import Checkpoints
from corl_jax.train import states
from corl_jax.train.optimizer import make_optimizer
from corl_jax.train.step import TrainState
from corl_jax.weights import dtypes, sharded_load, sources, storage
from corl_jax.weights.checkpoint import (
    load_config,
    load_params,
    load_sharded,
    open_checkpoint,
    read_stored_dtypes,
)
from corl_jax.weights.export import convert
from corl_jax.weights.sharded_load import read_local_part
from tests.support.weight_files import (
    assert_same_bits,
    carried_state,
    hf_shapes,
    random_state,
    to_original,
    write_checkpoint,
)

LAYOUTS = ("transformers", "original", "jax", "bin")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same tensors, of mixed types, in every layout."""
    root, state = tmp_path_factory.mktemp("layouts"), random_state(hf_shapes(), mixed=True)
    original = {**to_original(state), **carried_state()}
    folders = {
        "transformers": write_checkpoint(root / "hf", state, "transformers"),
        "original": write_checkpoint(root / "original", original, "original"),
    }
    convert(folders["original"], root / "jax", KIND, layout="jax", max_shard_bytes=10**6)
    convert(folders["original"], root / "bin", KIND, layout="transformers", as_bin=True)
    return folders | {"jax": root / "jax", "bin": root / "bin"}


@pytest.fixture(scope="module")
def config(folders):
    return load_config(folders["original"], KIND)


def layouts(config, mesh):
    """The table's, but whole where this odd model does not divide."""

    def one(path, leaf):
        spec = device_mesh._drop_uneven_axes(device_mesh.find_rule(path, RULES), leaf.shape, mesh)
        return NamedSharding(mesh, spec)

    return map_with_path(one, network.abstract(config))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_hold_the_values_of_the_whole(folders, config, mesh, layout):
    shardings = layouts(config, mesh)
    assert sum(bool(any(one.spec)) for one in flatten(shardings).values()) > 10
    found = load_sharded(folders[layout], KIND, config, shardings, lambda path: None)
    assert_same_bits(flatten(jax.device_get(found)), flatten(load_params(folders[layout], KIND)))
    for path, leaf in flatten(found).items():
        assert leaf.sharding == flatten(shardings)[path], path


def test_types_are_by_path_and_a_part_may_be_asked_alone(folders, config, mesh):
    shardings = {"lm_head": layouts(config, mesh)["lm_head"]}
    expected = load_params(folders["original"], KIND, dtype=np.float32)["lm_head"]["kernel"]
    for dtype in (jnp.float32, jnp.bfloat16):
        found = load_sharded(folders["original"], KIND, config, shardings, lambda path: dtype)  # noqa: B023
        assert found.keys() == {"lm_head"}
        np.testing.assert_array_equal(found["lm_head"]["kernel"], expected.astype(dtype))


@pytest.mark.parametrize("layout", ["transformers", "original", "jax"])
def test_stored_types_are_those_of_the_parameters(folders, config, layout):
    expected = {
        path: leaf.dtype for path, leaf in flatten(load_params(folders[layout], KIND)).items()
    }
    assert read_stored_dtypes(folders[layout], KIND, config) == expected


class Counting:
    """Counts the bytes that are read of tensors."""

    def __init__(self, monkeypatch):
        self.count, read = 0, os.preadv

        def preadv(*args):
            done = read(*args)
            self.count += done
            return done

        monkeypatch.setattr(storage.os, "preadv", preadv)

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


def part_of_devices(whole: NamedSharding, devices) -> SimpleNamespace:
    """The sharding as a process sees it to which only some of the devices belong."""

    def addressable(shape):
        return {d: i for d, i in whole.devices_indices_map(shape).items() if d in devices}

    return SimpleNamespace(addressable_devices_indices_map=addressable)


@pytest.mark.parametrize("layout", ["transformers", "original", "jax"])
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_a_process_reads_what_its_devices_hold(folders, config, monkeypatch, layout, axis):
    """Both axes, so that rows and columns of the files' matrices are split."""
    mesh = device_mesh.make_mesh(**{"data": 1, axis: 2}, devices=jax.devices()[:2])
    wanted = flatten(layouts(config, mesh))
    expected = flatten(load_params(folders[layout], KIND))
    split = [path for path, one in wanted.items() if axis in one.spec]
    assert len(split) > 10
    counting = Counting(monkeypatch)
    with open_checkpoint(folders[layout], KIND, config) as opened:
        for path in split:
            leaf, total = expected[path], 0
            for device in mesh.devices.flat:
                mine = part_of_devices(wanted[path], [device])
                box, found = read_local_part(opened.leaves, path, KIND.is_stacked(path), mine, None)
                index = wanted[path].devices_indices_map(leaf.shape)[device]
                np.testing.assert_array_equal(found, leaf[index])
                assert math.prod(stop - start for start, stop in box) == leaf.size // 2
                read = counting.take()
                total += read
            both = part_of_devices(wanted[path], list(mesh.devices.flat))
            read_local_part(opened.leaves, path, KIND.is_stacked(path), both, None)
            assert read == total / 2 and counting.take() == total, path


def test_a_replica_is_read_once(folders, config, monkeypatch):
    """Eight devices of one process: the bytes of the files, whatever the mesh."""
    counting = Counting(monkeypatch)
    load_params(folders["transformers"], KIND)
    once = counting.take()
    for axes in ((8, 1, 1), (2, 2, 2)):
        shardings = layouts(config, device_mesh.make_mesh(*axes))
        load_sharded(folders["transformers"], KIND, config, shardings, lambda path: jnp.float32)
        assert counting.take() == once


def test_one_leaf_is_in_memory_at_a_time(folders, config, mesh, monkeypatch):
    """Of what was read, only a leaf's part is alive when the next one is."""
    alive, most, read = [], 0, sharded_load.read_leaf

    def watched(*args):
        nonlocal most
        alive[:] = [ref for ref in alive if ref() is not None]
        most = max(most, len(alive))
        out = read(*args)
        alive.append(weakref.ref(out))
        return out

    monkeypatch.setattr(sharded_load, "read_leaf", watched)
    shardings = {"language_model": {"layers": layouts(config, mesh)["language_model"]["layers"]}}
    split = {p: s for p, s in flatten(shardings).items() if PartitionSpec() != s.spec}
    load_sharded(folders["original"], KIND, config, unflatten(split), lambda path: jnp.float32)
    assert len(split) > 4 and most <= 1


@pytest.mark.parametrize("layout", ["transformers", "original", "jax"])
def test_threads_and_pieces_change_nothing(folders, config, monkeypatch, layout):
    """Every leaf, whole and a box of it, in the stored type and another."""
    with open_checkpoint(folders[layout], KIND, config) as opened:
        assert opened.leaves.concurrent

        def everything():
            for path, shape in opened.leaves.shapes.items():
                part = tuple((size // 4, size - size // 8) for size in shape)
                for dtype in (None, np.float32):
                    for box in (None, part):
                        yield sources.read_leaf(
                            opened.leaves, path, KIND.is_stacked(path), dtype, box
                        )

        expected = list(everything())
        monkeypatch.setattr(sources, "PIECE", 64)
        monkeypatch.setattr(sources, "COLUMNS", 3)
        for found, whole in zip(everything(), expected, strict=True):
            assert found.dtype == whole.dtype
            np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("source", [dtypes.BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)])
@pytest.mark.parametrize("out", [dtypes.BFLOAT16, np.dtype(np.float32)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_copies_are_numpys(source, out, axes):
    values = np.random.default_rng(0).standard_normal((3, 70, 130)).astype(source)
    values.flat[:4] = [np.nan, np.inf, -np.inf, -0.0]
    found = np.empty(values.transpose(axes).shape, out)
    sources.copy_array(found, values.transpose(axes))
    expected = values.transpose(axes).astype(out)
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))
    assert np.signbit(found.transpose(np.argsort(axes)).flat[3])


def test_layers_of_one_number_each():
    memory = sources.MemoryLeaves({"scale": np.arange(5, dtype=np.float32)})
    np.testing.assert_array_equal(sources.read_leaf(memory, "scale", True), np.arange(5))
    part = sources.read_leaf(memory, "scale", True, box=((1, 3),))
    np.testing.assert_array_equal(part, [1, 2])


def test_an_error_of_a_thread_comes_out(folders, config, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 64)
    folder = folders["transformers"]
    with open_checkpoint(folder, KIND, config) as opened:
        store = opened.store
        ended = {key: dataclasses.replace(info, offset=10**9) for key, info in store.infos.items()}
        monkeypatch.setattr(store, "infos", ended)
        with pytest.raises(InputError, match="ended while being read"):
            sources.read_leaf(opened.leaves, "lm_head/kernel", False)


# ---- checkpoints


@pytest.mark.parametrize("before", [1, 8])
def test_a_state_comes_back_on_another_mesh(tmp_path, tiny_config, before):
    """Of 1, 2, 4 and 8 devices, split as the tables say; the same bits each time."""
    optimizer = make_optimizer(schema.Optimizer(), 10)
    rng = np.random.default_rng(0)
    meshes = {
        1: device_mesh.make_mesh(devices=jax.devices()[:1]),
        2: device_mesh.make_mesh(1, 2, 1, devices=jax.devices()[:2]),
        4: device_mesh.make_mesh(1, 2, 2, devices=jax.devices()[:4]),
        8: device_mesh.make_mesh(2, 2, 2),
    }

    def draw(leaf):
        kind = np.dtype(leaf.dtype)
        values = 100 * rng.standard_normal(leaf.shape)
        return values.astype(kind)

    shapes, _ = partition(network.abstract(tiny_config), TRAINABLE)
    abstract = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(optimizer.init, shapes)
    )
    state = jax.tree.map(draw, abstract)
    places = {
        n: states.state_shardings(optimizer, shapes, mesh, RULES) for n, mesh in meshes.items()
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, jax.device_put(state, places[before]), {})
        for count in meshes:
            wanted = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                abstract, places[count],
            )  # fmt: skip
            found, *_ = checkpoints.restore(3, wanted)
            for (path, leaf), expected in zip(
                jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(state), strict=True
            ):
                assert np.asarray(leaf).tobytes() == expected.tobytes(), path
                assert len(leaf.sharding.device_set) == count
