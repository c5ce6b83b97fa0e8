"""LPIPS against torchmetrics, which ships the learned heads; full width, a random trunk.

torchmetrics takes the trunk from torchvision, whose binary must match torch's build; the layers
that it would get are built here instead.
"""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchmetrics.functional.image import lpips as reference

from corl_jax.errors import InputError
from corl_jax.models import modules, vgg
from corl_jax.models.vgg import Lpips, VggConfig
from corl_jax.params import flatten
from corl_jax.weights.checkpoint import open_checkpoint
from corl_jax.weights.layouts.vgg import KIND, TABLES, parse
from corl_jax.weights.storage import open_any_store
from tests.parity.from_table import arrays, from_table
from tests.support.tolerances import NETWORK

CONFIGURATION_D = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M",
                   512, 512, 512, "M")  # fmt: skip
TOLERANCE = NETWORK


def vgg16_features() -> nn.Sequential:
    """The layers of torchvision's vgg16().features, with random weights of its scale."""
    layers, inputs = [], 3
    for step in CONFIGURATION_D:
        if step == "M":
            layers.append(nn.MaxPool2d(2, 2))
            continue
        conv = nn.Conv2d(inputs, step, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(conv.bias, std=0.05)
        layers += [conv, nn.ReLU()]
        inputs = step
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def theirs():
    """torchmetrics' network with its learned heads."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_get_tv_model_features", lambda *_: vgg16_features())
        return reference._LPIPS(net="vgg")


def pictures(rows: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Pairs from equal to unrelated, in [0, 1]."""
    rng = np.random.default_rng(5)
    first, other = rng.random((2, rows, size, size, 3), np.float32)
    share = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None, None]
    return first, (1 - share) * first + share * other


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def reference_distances(theirs, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return theirs(nchw(first), nchw(second), normalize=True).flatten().numpy()


def distances(theirs, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Ours, with the other network's weights."""
    params = from_table(TABLES["lpips"], Lpips, VggConfig(), arrays(theirs.state_dict()))
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(lambda params, *x: modules.bind(Lpips, VggConfig(), params)(*x))
        return np.asarray(compiled(params, first, second))


@pytest.mark.parametrize("size", [64, 53], ids=["even", "odd sides"])
def test_distances_of_the_full_network(theirs, size):
    first, second = pictures(4, size)
    expected = reference_distances(theirs, first, second)
    found = distances(theirs, first, second)
    error = np.abs(found - expected).max()
    print(f"parity LPIPS: largest difference {error:.1e}, distances to {expected.max():.2f}")
    assert found[0] == expected[0] == 0
    assert (np.diff(expected) > 0.02).all()
    assert error <= TOLERANCE


def test_the_epsilon_stands_under_the_root(theirs, monkeypatch):
    """Where features are around 1e-4, it decides what the distance is."""
    faint = copy.deepcopy(theirs)
    with torch.no_grad():
        faint.net.slice1[2].weight *= 1e-4
        faint.net.slice1[2].bias *= 1e-4
    images = pictures(3)
    expected = reference_distances(faint, *images)
    assert np.abs(distances(faint, *images) - expected).max() <= TOLERANCE
    monkeypatch.setattr(vgg, "EPSILON", 1e-20)
    assert np.abs(distances(faint, *images) - expected).max() > 1e-3


def test_the_trunk_of_timm_with_the_heads_of_this_package(theirs, tmp_path):
    trunk = {
        f"features.{key.split('.', 2)[2]}": x.contiguous()
        for key, x in theirs.state_dict().items()
        if "net" in key
    }
    # timm's classifier consists of convolutions; here it is smaller than the published one.
    trunk |= {f"pre_logits.fc1.{name}": torch.zeros(2, 3, 1, 1) for name in ("weight", "bias")}
    trunk |= {"head.fc.weight": torch.zeros(2, 3), "head.fc.bias": torch.zeros(2)}
    save_file(trunk, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vgg16", "num_classes": 1000}')
    images = pictures(2)
    with open_checkpoint(tmp_path, KIND) as opened:
        assert opened.config == VggConfig() and opened.parameters == 14_716_160
        params = opened.load()
    with jax.default_matmul_precision("highest"):
        found = modules.bind(Lpips, VggConfig(), params)(*images)
    assert np.abs(found - reference_distances(theirs, *images)).max() <= TOLERANCE


@pytest.mark.parametrize("heads", ["whole", "one is missing"])
def test_heads_of_the_folder_come_first(theirs, tmp_path, heads):
    """A part of them is not completed by those of another training."""
    state = {
        key: x.contiguous() for key, x in theirs.state_dict().items() if not key.startswith("lins")
    }
    state |= {key: 2 * x for key, x in state.items() if key.startswith("lin")}
    if heads == "one is missing":
        del state["lin3.model.1.weight"]
    save_file(state, tmp_path / "model.safetensors")
    if heads == "one is missing":
        with pytest.raises(InputError, match=r"lin3\.model\.1\.weight is missing"):
            open_checkpoint(tmp_path, KIND)
        return
    with open_checkpoint(tmp_path, KIND) as opened:
        first = opened.load()["heads"]["0"]["kernel"]
    assert np.array_equal(first.ravel(), state["lin0.model.1.weight"].numpy().ravel())


def test_files_as_published_load(theirs, tmp_path):
    """torchvision's trunk beside the heads of lpips, both in the format before PyTorch 1.6."""
    state = theirs.state_dict()
    trunk = {f"features.{key.split('.', 2)[2]}": x for key, x in state.items() if "net" in key}
    trunk |= {"classifier.0.weight": torch.zeros(2, 3), "classifier.0.bias": torch.zeros(2)}
    heads = {key: x for key, x in state.items() if key.startswith("lin") and "lins" not in key}
    for name, part in (("vgg16-397923af.pth", trunk), ("vgg.pth", heads)):
        torch.save(part, tmp_path / name, _use_new_zipfile_serialization=False)
    store, problems = open_any_store(tmp_path), []
    shapes = {key: info.shape for key, info in store.infos.items()}
    assert parse(tmp_path, "torchvision", shapes, problems) == VggConfig()
    assert not problems
    found = from_table(
        TABLES["torchvision"], Lpips, VggConfig(), {k: store.read(k) for k in shapes}
    )
    expected = from_table(TABLES["lpips"], Lpips, VggConfig(), arrays(state))
    expected, found = flatten(expected), flatten(found)
    assert all(np.array_equal(found[path], leaf) for path, leaf in expected.items())
