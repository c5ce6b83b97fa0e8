"""A kind without a foreign layout goes through every function that Janus goes through."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from corl_jax import weights
from corl_jax.errors import InputError
from corl_jax.models import modules
from corl_jax.models.lora import Lora
from corl_jax.params import flatten, leaf_paths
from corl_jax.policies.janus.checkpoint import KIND as JANUS
from corl_jax.weights.adapters import save_adapter
from corl_jax.weights.checkpoint import (
    detect_layout,
    load_config,
    load_params,
    load_sharded,
    open_checkpoint,
    read_layer_dtypes,
    read_stored_dtypes,
)
from corl_jax.weights.export import check_export, convert, save_checkpoint
from corl_jax.weights.kinds import NetworkKind
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.recognise import recognise_kind
from tests.support.tiny_networks import network_dir


@dataclasses.dataclass(frozen=True)
class Sizes:
    words: int = 5
    codes: int = 7


class Bag(nnx.Module):
    """Two vectors of logits and their scale."""

    def __init__(self, config: Sizes, *, rngs: nnx.Rngs):
        self.text = nnx.Param(jax.random.normal(rngs.params(), (config.words,)))
        self.image = nnx.Param(jax.random.normal(rngs.params(), (2, config.codes)))
        self.scale = nnx.Param(jax.numpy.float32(0.1))


FILES = ("tokenizer.json", "generation_config.json")
BAG = NetworkKind(name="bag", module=Bag, config=Sizes, files=FILES)
SIZES = Sizes(words=3)


@pytest.fixture
def folder(tmp_path):
    """A saved bag with a tokenizer beside it."""
    (tmp_path / "source").mkdir()
    params = modules.init_params(Bag, SIZES, jax.random.key(0))
    save_checkpoint(tmp_path / "source" / "bag", BAG, SIZES, params)
    (tmp_path / "source" / "bag" / "tokenizer.json").write_text('{"a": 1}')
    return tmp_path / "source" / "bag"


def test_it_loads_as_it_was_saved(folder):
    params = modules.init_params(Bag, SIZES, jax.random.key(0))
    assert detect_layout(folder, BAG) == "jax" and load_config(folder, BAG) == SIZES
    assert jax.tree.all(jax.tree.map(np.array_equal, load_params(folder, BAG), params))
    half = flatten(load_params(folder, BAG, SIZES, dtype="float16"))
    assert {path: leaf.dtype.name for path, leaf in half.items()} == {
        "text": "float16", "image": "float16", "scale": "float32"
    }  # fmt: skip
    device = SingleDeviceSharding(jax.devices()[0])
    placed = load_sharded(
        folder, BAG, SIZES, jax.tree.map(lambda _: device, params), lambda _: None
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, placed, params))
    assert {dtype.name for dtype in read_stored_dtypes(folder, BAG).values()} == {"float32"}
    assert read_layer_dtypes(folder, BAG) == {}


def test_it_converts_and_saves_with_its_files(folder, tmp_path):
    assert convert(folder, tmp_path / "half", BAG, dtype="bfloat16") == []
    assert (tmp_path / "half" / "tokenizer.json").read_text() == '{"a": 1}'
    with open_checkpoint(tmp_path / "half", BAG) as opened:
        assert (opened.layout, opened.source_layout, opened.carried) == ("jax", "jax", {})
    notes = save_checkpoint(
        tmp_path / "out", BAG, SIZES, load_params(folder, BAG), assets_from=folder,
        generation={"top_k": 2}, extra={"record.json": {"step": 1}},
    )  # fmt: skip
    assert notes == []
    read = {file.name: json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")}
    assert read["generation_config.json"] == {"top_k": 2} and read["record.json"] == {"step": 1}
    assert read["tokenizer.json"] == {"a": 1} and read["config.json"]["network"] == "bag"
    assert convert(tmp_path / "out", tmp_path / "again", BAG) == []
    assert json.loads((tmp_path / "again" / FILES[1]).read_text()) == {"top_k": 2}


def test_it_is_recognised_and_taken_for_no_other_kind(folder, tmp_path):
    kinds = [JANUS, *KINDS.values(), BAG]
    assert recognise_kind(folder, kinds) is BAG
    with pytest.raises(InputError, match="holds a bag network, expected bert"):
        open_checkpoint(folder, KINDS["bert"])
    with pytest.raises(InputError, match="this is not a janus checkpoint"):
        open_checkpoint(folder, JANUS)
    with pytest.raises(InputError, match="holds a vgg network, expected bag"):
        open_checkpoint(network_dir(tmp_path / "vgg", "vgg"), BAG)
    with pytest.raises(InputError, match=r"config\.json: not found"):
        open_checkpoint(tmp_path, BAG)


def test_what_it_cannot_do_is_refused(folder, tmp_path):
    check_export(BAG, "jax", SIZES)
    with pytest.raises(InputError, match="'transformers': a bag network is written as jax"):
        check_export(BAG, "transformers", SIZES)
    with pytest.raises(InputError, match="as jax"):
        convert(folder, tmp_path / "out", BAG, layout="original")
    with pytest.raises(InputError, match="a bag network carries nothing"):
        convert(folder, tmp_path / "out", BAG, base=folder)
    with pytest.raises(InputError, match="PEFT has no bag network"):
        save_adapter(tmp_path / "out", BAG, {}, Lora(1, 1.0, ()), base=None)
    params = load_params(folder, BAG)
    with pytest.raises(InputError) as caught:
        save_checkpoint(tmp_path / "out", BAG, Sizes(words=4), {**params, "more": params["text"]})
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "out").exists()


def test_the_package_knows_no_policy():
    """What it must know of one is in the record."""
    for path in Path(weights.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"janus|siglip|vqmodel|language_model", text, re.IGNORECASE), path
        assert "corl_jax.policies" not in text, path


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_of_a_reward_network_has_a_rule_and_every_rule_a_parameter(name):
    kind = KINDS[name]
    patterns = [pattern for pattern, _ in kind.rules]
    first = set()
    for path, _ in leaf_paths(modules.make_abstract(kind.module, kind.config())):
        first.add(next(pattern for pattern in patterns if re.fullmatch(pattern, path)))
    assert first == set(patterns)
