"""Tensors under names that are wrong in one way are explained in one line."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from corl_jax.errors import InputError
from corl_jax.params import flatten
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.weights.checkpoint import load_params, open_checkpoint
from corl_jax.weights.export import convert
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.wrong_names import find_wrong_names
from tests.support.tiny_networks import TINY, random_network
from tests.support.weight_files import (
    carried_state,
    hf_shapes,
    original_config_dict,
    random_state,
    to_original,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def states():
    state = random_state(hf_shapes())
    return {
        "transformers": state,
        "original": {**to_original(state), **carried_state()},
    }


def problems_of(folder) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_params(folder, KIND)
    return caught.value.problems


@pytest.mark.parametrize("layout", ["transformers", "original"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.model.", "base_model.model."])
def test_a_prefix_of_every_name_is_one_line(tmp_path, states, layout, prefix):
    state = {prefix + key: value for key, value in states[layout].items()}
    (line,) = problems_of(write_checkpoint(tmp_path / "model", state, layout))
    assert f"the names of {len(state)} of {len(state)} tensors begin with {prefix!r}" in line
    assert f"remove {prefix!r} from the names" in line


def test_a_wrapper_within_names_is_one_line(tmp_path, states):
    """torch.compile and FSDP wrap parts of a model, too."""
    inner = "model.language_model."
    state = {
        key.replace(inner, f"{inner}_orig_mod."): value
        for key, value in states["transformers"].items()
    }
    (line,) = problems_of(write_checkpoint(tmp_path / "model", state, "transformers"))
    assert "tensors contain '_orig_mod.'" in line


def test_a_part_of_a_model_is_said_to_lack_its_prefix(tmp_path, states):
    state = {key.removeprefix("model."): value for key, value in states["transformers"].items()}
    (line,) = problems_of(write_checkpoint(tmp_path / "model", state, "transformers"))
    assert "lack the 'model.' with which they begin" in line


def test_what_else_is_wrong_stays_listed_beside_a_prefix(tmp_path, states):
    state = {f"module.{key}": value for key, value in states["transformers"].items()}
    del state["module.lm_head.weight"]
    state["module.model.aligner.fc1.bias"] = np.zeros(3, np.float32)
    state["v_head.summary.weight"] = np.zeros(3, np.float32)
    problems = problems_of(write_checkpoint(tmp_path / "model", state, "transformers"))
    assert len(problems) == 4
    assert "begin with 'module.'" in problems[0]
    assert "lm_head.weight is missing" in "\n".join(problems)


def test_single_wrong_names_stay_single_lines(tmp_path, states):
    state = dict(states["transformers"])
    state["module.lm_head.weight"] = state["lm_head.weight"]  # a copy, beside the right name
    (line,) = problems_of(write_checkpoint(tmp_path / "model", state, "transformers"))
    assert "module.lm_head.weight is unknown" in line


def test_an_adapter_that_is_not_merged_is_one_line(tmp_path, states):
    state = {
        f"base_model.model.{key}".replace("q_proj.weight", "q_proj.base_layer.weight"): value
        for key, value in states["transformers"].items()
    }
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    for leaf in ("lora_A.default", "lora_B.default"):
        state[f"{name}.{leaf}.weight"] = np.zeros((4, 4), np.float32)
    (line,) = problems_of(write_checkpoint(tmp_path / "model", state, "transformers"))
    assert "2 of" in line and "adapter that is not merged" in line and "merge_and_unload" in line


def test_tensors_of_another_layout_than_the_configs_are_one_line(tmp_path, states):
    source = write_checkpoint(tmp_path / "hf", states["transformers"], "transformers")
    convert(source, tmp_path / "jax", KIND, layout="jax")
    original = write_checkpoint(tmp_path / "original", states["original"], "original")
    for config, weights in (("jax", "hf"), ("hf", "jax"), ("original", "jax"), ("jax", "original")):
        folder = shutil.copytree(tmp_path / config, tmp_path / f"{config}_{weights}")
        shutil.copy(tmp_path / weights / "model.safetensors", folder)
        (line,) = problems_of(folder)
        layouts = {"hf": "transformers"}
        assert f"as in the {layouts.get(weights, weights)} layout" in line
        assert f"of the {layouts.get(config, config)} layout" in line
    assert original_config_dict()["model_type"] in (original / "config.json").read_text()


@pytest.mark.parametrize("kind", sorted(TINY))
def test_a_prefix_in_a_reward_network_is_one_line(tmp_path, kind):
    layout, table = next(iter(KINDS[kind].tables.items()))
    shapes = {path: leaf.shape for path, leaf in flatten(random_network(kind)).items()}
    state = {f"module.{s.key}": np.zeros(s.shape, np.float32) for s in table.make_slots(shapes)}
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"begin with 'module\.'") as caught:
        open_checkpoint(tmp_path, KINDS[kind])
    assert len(caught.value.problems) == 1
    assert layout in caught.value.problems[0]


def test_names_of_no_network_are_left_as_they_are():
    assert (
        find_wrong_names(["a.b", "transformer.h.0.ln_1.weight"], KIND.tables["transformers"])
        is None
    )
    assert find_wrong_names([], KIND.tables["transformers"]) is None
