"""LPIPS as a reward: resizing, absent images, pieces and devices; and the files that it asks."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from corl_jax.errors import Problems
from corl_jax.models import modules, vgg
from corl_jax.models.vgg import Lpips, VggConfig
from corl_jax.params import flatten, map_with_path
from corl_jax.rewards import image
from corl_jax.rewards.image import lpips_distance
from corl_jax.rewards.samples import Network
from corl_jax.weights.layouts.vgg import TABLES, parse
from tests.support.tiny_models import tiny_image
from tests.support.tolerances import NETWORK

TINY = VggConfig(channels=(4, 6, 5, 3, 7))
SIZE = 32


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        return jnp.asarray(np.abs(noise) if path.startswith("heads") else 0.4 * noise)

    params = map_with_path(draw, modules.make_abstract(Lpips, TINY))
    return Network(TINY, params, Path(), jnp.float32)


@pytest.fixture(scope="module")
def drawings():
    return np.stack([np.asarray(tiny_image(seed, (48, 48))) for seed in range(5)])


def distance(network, drawings, real, **options) -> np.ndarray:
    return np.asarray(lpips_distance(network, drawings, real, size=SIZE, **options))


@functools.partial(jax.jit, static_argnames="config")
def direct(config, params, first, second):
    return modules.bind(Lpips, config, params)(first, second)


def test_pooling_takes_the_maximum_and_leaves_out_odd_ends():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    assert vgg.max_pool(x)[0, :, :, 0].tolist() == [[6, 8]]


def test_equal_images_are_at_distance_zero(network, drawings):
    real = [Image.fromarray(x) for x in drawings]
    found = distance(network, drawings, real)
    assert found.tolist() == [0] * 5
    assert (distance(network, drawings, real[1:] + real[:1]) > 0.01).all()


def test_a_known_distance():
    """One feature per stage that is 1 or 0 wherever the picture is white or black."""
    config = VggConfig(channels=(2, 2, 2, 2, 2))

    def middle(path, leaf):
        kernel = np.zeros(leaf.shape, np.float32)
        if path.startswith("heads"):
            kernel[:] = 0.25
        elif path.endswith("kernel"):  # only the centre, only from the first channel to the first
            kernel[1, 1, 0, 0] = 1
        return jnp.asarray(kernel)

    params = map_with_path(middle, modules.make_abstract(Lpips, config))
    white, black = jnp.ones((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 3))
    found = direct(config, params, white, black)
    # White is (1, 0) in every stage and black (0, 0): 5 stages x 0.25 x 1.
    assert found == pytest.approx(1.25, abs=1e-6)


def test_without_a_real_image_there_is_no_distance(network, drawings):
    real = [tiny_image(9), None, tiny_image(8), None, None]
    found = distance(network, drawings, real)
    assert np.isnan(found).tolist() == [False, True, False, True, True]
    alone = distance(network, drawings[2:3], real[2:3])
    assert found[2] == pytest.approx(alone[0], abs=NETWORK)


def test_both_are_resized_and_fitted(network, drawings):
    wide = tiny_image(3, (90, 40))
    by_hand = {
        "squash": wide.resize((SIZE, SIZE), Image.Resampling.BILINEAR),
        "centre_crop": wide.crop((25, 0, 65, 40)).resize((SIZE, SIZE), Image.Resampling.BILINEAR),
    }
    drawn = Image.fromarray(drawings[0]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    found = {}
    for fit, picture in by_hand.items():
        arrays = (np.asarray(x, np.float32)[None] / 255 for x in (drawn, picture))
        (found[fit],) = distance(network, drawings[:1], [wide], fit=fit)
        assert found[fit] == pytest.approx(
            float(direct(TINY, network.params, *arrays)[0]), abs=NETWORK
        )
    assert abs(found["squash"] - found["centre_crop"]) > 1e-2


def test_a_picture_that_a_group_shares_is_resized_once(network, drawings, monkeypatch):
    seen = []
    resize = image.fit_image
    monkeypatch.setattr(image, "fit_image", lambda *args: seen.append(args[0]) or resize(*args))
    first, second = tiny_image(5), tiny_image(6)
    distance(network, drawings, [first, first, first, second, second])
    assert sum(x is first for x in seen) == sum(x is second for x in seen) == 1


def test_pieces_and_devices_change_nothing(network, drawings, mesh, monkeypatch):
    real = [tiny_image(seed, (40, 40)) for seed in (1, 2, 3, 4, 5)]
    expected = distance(network, drawings, real)
    monkeypatch.setattr(image, "LPIPS_IMAGES_AT_ONCE", 2)
    assert np.allclose(distance(network, drawings, real), expected, atol=NETWORK)
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = Network(TINY, jax.device_put(network.params, everywhere), Path(), jnp.float32)
    assert np.allclose(distance(spread, drawings, real), expected, atol=NETWORK)


@pytest.mark.parametrize(
    ("runs", "devices", "shared"),
    [
        ((4, 4, 8), 1, 4), ((4, 8, 4), 8, 2), ((8, 8), 2, 8), ((3, 6), 1, 3), ((2, 3), 1, 1),
        ((37,), 1, 1), ((48, 48), 1, 24), ((16,) * 4, 8, 8),
    ],
)  # fmt: skip
def test_rows_share_a_real_image_where_devices_compute_less(
    mesh, monkeypatch, runs, devices, shared
):
    monkeypatch.setattr(image, "find_mesh", lambda params: None if devices == 1 else mesh)
    monkeypatch.setattr(image, "num_batch_shards", lambda mesh: devices)
    pictures = [tiny_image(i) for i in range(len(runs))]
    real = [x for x, length in zip(pictures, runs, strict=True) for _ in range(length)]
    assert image._choose_shared_rows(real, {}) == shared


def test_processes_agree_on_the_rows_that_share_an_image(monkeypatch):
    monkeypatch.setattr(image, "all_gather", lambda x: np.stack([x, np.int32(4)]))
    assert image._choose_shared_rows([None] * 8 + [tiny_image(1)] * 8, {}) == 4


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (2, 4, 8, 2), (1, 3, 5, 7)])
def test_a_shared_image_is_computed_once_with_equal_results(network, mesh, monkeypatch, sizes):
    drawings = np.stack([np.asarray(tiny_image(seed, (48, 48))) for seed in range(16)])
    pictures = [tiny_image(20), None, tiny_image(21), tiny_image(22)]
    real = [x for x, size in zip(pictures, sizes, strict=True) for _ in range(size)]
    apart = [None if x is None else x.copy() for x in real]
    monkeypatch.setattr(image, "_choose_shared_rows", lambda *_: 1)
    expected = distance(network, drawings, apart)  # each row with its own copy
    monkeypatch.undo()
    program, computed = image._compute_lpips, []

    def count(config, params, generated, real):
        computed.append(len(real))
        return program(config, params, generated, real)

    monkeypatch.setattr(image, "_compute_lpips", count)
    monkeypatch.setattr(image, "LPIPS_IMAGES_AT_ONCE", 8)
    np.testing.assert_allclose(distance(network, drawings, real), expected, atol=NETWORK)
    assert sum(computed) == 16 // math.gcd(*sizes)
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = Network(TINY, jax.device_put(network.params, everywhere), Path(), jnp.float32)
    np.testing.assert_allclose(distance(spread, drawings, real), expected, atol=NETWORK)


# ---- files


def full_shapes(layout: str) -> dict[str, tuple[int, ...]]:
    """The tensors of the published files, written out."""
    places, widths = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (64,) * 2 + (128,) * 2
    widths += (256,) * 3 + (512,) * 6
    slices = (1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5)
    shapes = {}
    for place, part, width, inputs in zip(places, slices, widths, (3, *widths), strict=False):
        name = f"features.{place}" if layout == "torchvision" else f"net.slice{part}.{place}"
        shapes |= {f"{name}.weight": (width, inputs, 3, 3), f"{name}.bias": (width,)}
    heads = {i: (1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    shapes |= {f"lin{i}.model.1.weight": shape for i, shape in heads.items()}
    if layout == "torchvision":
        classifier = {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}
        for i, shape in classifier.items():
            shapes |= {f"classifier.{i}.weight": shape, f"classifier.{i}.bias": shape[:1]}
    else:
        shapes |= {f"lins.{i}.model.1.weight": shape for i, shape in heads.items()}
        shapes |= {f"scaling_layer.{name}": (1, 3, 1, 1) for name in ("shift", "scale")}
    return shapes


@pytest.mark.parametrize("layout", TABLES)
def test_the_published_files_are_covered(layout):
    shapes, problems = full_shapes(layout), Problems()
    config = parse(Path("x"), layout, shapes, problems)
    leaves = {k: leaf.shape for k, leaf in flatten(modules.make_abstract(Lpips, config)).items()}
    slots = TABLES[layout].make_slots(leaves)
    assert config == VggConfig() and not problems
    assert not TABLES[layout].find_problems(slots, shapes, "x")
    assert sum(math.prod(shape) for shape in leaves.values()) == 14_714_688 + 1_472


@pytest.mark.parametrize("layout", TABLES)
def test_a_missing_trunk_is_named(layout):
    heads = {key: shape for key, shape in full_shapes(layout).items() if key.startswith("lin")}
    problems = Problems()
    parse(Path("folder"), layout, heads, problems)
    (problem,) = problems
    assert "folder: VGG16's convolutions are missing" in problem
    assert "vgg16-397923af.pth or the model.safetensors of timm/vgg16.tv_in1k" in problem
