"""The reward `geneval`: scores with a tiny detector, and what is refused before a run."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from corl_jax.config.schema import Networks, RewardNetwork
from corl_jax.data.geneval_demands import COLORS
from corl_jax.errors import InputError
from corl_jax.evaluation.geneval.detector import make_detector
from corl_jax.rewards import networks, registry
from corl_jax.rewards.registry import Context, Samples
from corl_jax.rewards.samples import FrozenNetwork, Network
from tests.support import several_processes
from tests.support.tiny_detector import clip_dir, detector_dir, draw_images
from tests.support.tiny_networks import load_network


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    return {"mask2former": detector_dir(root / "detector"), "clip_l14": clip_dir(root / "clip")}


@pytest.fixture(scope="module")
def loaded(folders):
    """name -> Network on the device."""
    kinds = {"mask2former": "mask2former", "clip_l14": "clip"}
    out = {}
    for name, kind in kinds.items():
        config, params = load_network(folders[name], kind, np.float32)
        out[name] = Network(config, params, folders[name], np.float32)
    return out


@pytest.fixture(scope="module")
def context(loaded):
    place = SingleDeviceSharding(jax.devices()[0])
    frozen = {
        name: FrozenNetwork(network, jax.tree.map(lambda _: place, network.params))
        for name, network in loaded.items()
    }
    return Context(None, None, None, None, None, 0, 0, frozen)


def demand(*include, tag="single_object", exclude=()) -> str:
    return json.dumps({"tag": tag, "prompt": "p", "include": include, "exclude": [*exclude]})


def score(context, images, demands, **options) -> list[float]:
    reward = registry.bind_reward("geneval", options)
    samples = Samples({"geneval": demands}, images=images)
    return registry.score([reward], samples, context)["geneval"].tolist()


def test_dense_and_strict_scores(loaded, context):
    images = draw_images(4)
    objects = make_detector(loaded["mask2former"]).detect(images)
    seen = [next(iter(boxes)) for boxes in objects]
    assert all("zebra" not in boxes for boxes in objects)
    first = {"class": seen[0], "count": 1}
    demands = [
        demand({"class": seen[0], "count": 1}),
        demand({"class": seen[1], "count": 1}, {"class": "zebra", "count": 1}),
        None,
        # Both are not there, so there is no credit for the relation: 1, 0 and 0.
        demand({"class": seen[3], "count": 1},
               {"class": "zebra", "count": 1, "position": ["left of", 0]}),
    ]  # fmt: skip
    dense = score(context, images, demands)
    np.testing.assert_allclose(dense, [1, 0.5, np.nan, 1 / 3], rtol=1e-6)
    strict = score(context, images, demands, score="strict")
    np.testing.assert_array_equal(strict, [1, 0, np.nan, 0])
    # Colours come from CLIP: one of the ten is right.
    colors = [
        score(context, images[:1], [demand({**first, "color": color})], score="strict")[0]
        for color in COLORS
    ]  # fmt: skip
    assert sorted(colors) == [0] * 9 + [1]


@pytest.mark.slow
def test_processes_with_different_demands_score_together(folders):
    """Only one of two has crops to show to CLIP, which lies on the devices of both."""
    address = f"127.0.0.1:{several_processes.free_port()}"
    script = "tests/support/score_geneval_apart.py"
    places = [str(folders[name]) for name in ("mask2former", "clip_l14")]
    texts = several_processes.finished(
        [several_processes.start([script, address, str(n), *places]) for n in (0, 1)]
    )
    plain, colored = (json.loads(text.splitlines()[-1]) for text in texts)
    assert plain == [1, 1]
    # An object of any colour has half the score, one of the right colour all of it.
    assert set(colored) <= {0.5, 1.0}


def test_bad_demands_and_a_missing_column_are_refused(context):
    images = draw_images(2)
    with pytest.raises(InputError) as caught:
        score(context, images, [demand({"class": "sofa", "count": 1}), "{"])
    assert [line.split(": ")[0] for line in caught.value.problems] == ["row 0", "row 1"]
    reward = registry.bind_reward("geneval", {})
    with pytest.raises(InputError, match="column geneval is missing; geneval needs it"):
        registry.score([reward], Samples({"prompt": ["a", "b"]}, images=images), context)
    with pytest.raises(InputError, match=r"option score: .*dense"):
        registry.bind_reward("geneval", {"score": "loose"})


def test_networks_are_checked_before_a_run(folders, tmp_path):
    def settings(**paths) -> Networks:
        return Networks(**{name: RewardNetwork(path=str(path)) for name, path in paths.items()})

    reward = registry.bind_reward("geneval", {})
    checked = networks.check_networks([reward], settings(**folders), "float32")
    assert [network.name for network in checked] == ["mask2former", "clip_l14"]
    # The reward of looks needs no tokenizer of the same CLIP; this one does.
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.safetensors", "config.json"):
        (bare / name).write_bytes((folders["clip_l14"] / name).read_bytes())
    with pytest.raises(InputError, match=r"networks\.clip_l14: .*no tokenizer found"):
        networks.check_networks([reward], settings(**(folders | {"clip_l14": bare})), "float32")
    few = registry.REGISTRY["geneval"].find_network_problems
    assert few({}, {"mask2former": type("Sizes", (), {"num_classes": 3})}) == [
        "networks.mask2former knows 3 classes; expected COCO's 80, as GenEval's detector does"
    ]
