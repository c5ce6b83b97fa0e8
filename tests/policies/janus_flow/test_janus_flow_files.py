"""JanusFlow's checkpoints: recognised, read and written to the bit, refused where unclear."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from corl_jax.devices.mesh import find_rule
from corl_jax.errors import InputError
from corl_jax.models.sd_vae import SdVaeConfig
from corl_jax.params import flatten, partition
from corl_jax.policies.janus.checkpoint import KIND as JANUS
from corl_jax.policies.janus_flow import layout, network
from corl_jax.policies.janus_flow.checkpoint import KIND
from corl_jax.policies.janus_flow.checkpoint.flow_config import SECTIONS, parse, write_config
from corl_jax.policies.janus_flow.checkpoint.vae_files import write_vae_config
from corl_jax.weights.checkpoint import load_config, load_params, open_checkpoint
from corl_jax.weights.export import convert, save_checkpoint
from corl_jax.weights.layouts.sd_vae import load_vae
from corl_jax.weights.recognise import recognise_kind
from corl_jax.weights.storage import read_json
from tests.parity import torch_janus_flow
from tests.support import janus_flow_files, tiny_vae
from tests.support.janus_flow_files import (
    VAE_CONFIG,
    make_config,
    make_model,
    original_folder,
    original_state,
    save_state,
    to_numpy,
    vae_state,
)
from tests.support.weight_files import (
    assert_same_bits,
    carried_state,
    hf_shapes,
    random_state,
    read_state,
    to_original,
    write_checkpoint,
)

KEYS = Path(__file__).parents[2] / "support" / "fixtures" / "janusflow_keys.tsv"
COUNTS = {
    "language_model": 1_442_940_928, "lm_head": 209_715_200, "vision_model": 303_688_704,
    "aligner": 2_099_200, "begin_embedding": 2_048, "generation_encoder": 21_614_336,
    "generation_aligner": 1_574_912, "generation_norm": 2_048,
    "generation_projection": 1_573_632, "generation_decoder": 50_561_296, "vae": 83_653_863,
}  # fmt: skip
ATTENTION_POOL = 12_595_200  # in the files, and not in the network


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return original_folder(tmp_path_factory.mktemp("models") / "flow")


@pytest.fixture(scope="module")
def abstract():
    return flatten(network.abstract(network.PRESETS["janusflow-1.3b"]))


def problems_of(folder, kind=KIND) -> str:
    with pytest.raises(InputError) as error:
        open_checkpoint(folder, kind).close()
    return str(error.value)


def with_config(folder: Path, change) -> Path:
    data = make_config()
    change(data)
    (folder / "config.json").write_text(json.dumps(data))
    write_vae_config(folder, torch_janus_flow.VAE, None)
    return folder


# ---- the published model


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of JanusFlow-1.3B and its shape."""
    shapes = {}
    for line in KEYS.read_text().splitlines()[1:]:
        key, numbers, shape = line.split("\t")
        first, _, last = numbers.partition("-")
        for i in range(int(first), int(last) + 1) if numbers else [0]:
            shapes[key.replace("{i}", str(i))] = tuple(map(int, shape.split("x")))
    return shapes


def test_parameter_counts(abstract):
    counts: Counter[str] = Counter()
    for path, leaf in abstract.items():
        counts[path.split("/")[0]] += math.prod(leaf.shape)
    assert counts == COUNTS
    published = published_shapes()
    assert len(published) == 587
    assert sum(map(math.prod, published.values())) == 2_046_367_504
    assert sum(counts.values()) + ATTENTION_POOL == 2_046_367_504 + counts["vae"]


def test_the_key_table_has_every_published_tensor(abstract):
    table, published = KIND.tables["original"], published_shapes()
    slots = table.make_slots({path: leaf.shape for path, leaf in abstract.items()})
    vae = {f"vae/{key}": shape for key, shape in tiny_vae.list_shapes(SdVaeConfig()).items()}
    assert table.find_problems(slots, published | vae, "published") == []
    carried = [key for key in published if table.is_carried(key)]
    assert len({slot.key for slot in slots}) + len(carried) == 587 + len(vae)
    assert all(".attn_pool." in key for key in carried) and len(carried) == 13


def test_every_parameter_has_a_rule_and_most_are_trained(abstract):
    for path in abstract:
        find_rule(path, layout.RULES)
    trained, frozen = partition(network.abstract(network.JanusFlowConfig()), layout.TRAINABLE)
    assert {path.split("/")[0] for path in flatten(frozen)} == {
        "vision_model", "aligner", "begin_embedding", "vae",
    }  # fmt: skip
    assert sum(math.prod(x.shape) for x in flatten(trained).values()) == 1_727_982_352


def test_the_published_sizes_survive_a_config(tmp_path):
    config = network.PRESETS["janusflow-1.3b"]
    data = write_config("original", config, "bfloat16", None)
    (tmp_path / "config.json").write_text(json.dumps(data))
    write_vae_config(tmp_path, config.vae, None)
    assert load_config(tmp_path, KIND) == config
    assert config.latent_shape == (48, 48, 4) and config.num_image_tokens == 576
    for name, section in SECTIONS.items():
        assert set(section.params) <= data[name]["params"].keys()


# ---- reading and writing


def test_it_is_recognised_beside_a_janus(original, tmp_path):
    janus = write_checkpoint(tmp_path / "janus", {}, "original", tokenizer=False)
    for kinds in ([JANUS, KIND], [KIND, JANUS]):
        assert recognise_kind(original, kinds) is KIND
        assert recognise_kind(janus, kinds) is JANUS
    convert(original, tmp_path / "jax", KIND)
    assert recognise_kind(tmp_path / "jax", [JANUS, KIND]) is KIND


def test_the_loaded_network_computes_what_torch_does(original):
    config, params = load_config(original, KIND), load_params(original, KIND)
    model = make_model()
    assert config == torch_janus_flow.jax_config(model)
    vae = load_vae(original / "vae")[1]
    expected = flatten(torch_janus_flow.flow_params(model) | {"vae": vae})
    found = flatten(params)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_conversion_there_and_back_keeps_every_bit(tmp_path, form, dtype):
    folder = original_folder(tmp_path / "flow", form=form, dtype=dtype)
    assert convert(folder, tmp_path / "jax", KIND) == []
    notes = convert(tmp_path / "jax", tmp_path / "back", KIND, layout="original",
                    max_shard_bytes=40_000)  # fmt: skip
    assert notes == []
    state = {key: tensor.to(dtype) for key, tensor in original_state(make_model()).items()}
    assert_same_bits(read_state(tmp_path / "back"), to_numpy(state))
    assert_same_bits(load_file(tmp_path / "back" / "vae" / tiny_vae.SAFE), vae_state())
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    names = ("config.json", "tokenizer.json", "processor_config.json", "vae/config.json")
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes(), name


def test_bin_is_written_too(original, tmp_path):
    convert(original, tmp_path / "bin", KIND, layout="original", as_bin=True)
    state = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    expected = original_state(make_model())
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    file = tmp_path / "bin" / "vae" / "diffusion_pytorch_model.bin"
    assert_same_bits(to_numpy(torch.load(file, weights_only=True)), vae_state())


def test_an_export_without_a_source_states_all_sizes(original, tmp_path):
    config, params = load_config(original, KIND), load_params(original, KIND)
    notes = save_checkpoint(tmp_path / "out", KIND, config, params, layout="original")
    assert len(notes) == 2
    assert "attn_pool" in "".join(notes) and "tokenizer.json" in "".join(notes)
    assert load_config(tmp_path / "out", KIND) == config
    found = flatten(load_params(tmp_path / "out", KIND))
    for path, expected in flatten(params).items():
        np.testing.assert_array_equal(found[path], expected, err_msg=path)


def test_patches_that_the_original_does_not_have_are_written_as_ours_only(tmp_path):
    config = torch_janus_flow.jax_config(make_model())
    uvit = network.UvitConfig(
        patch_size=4, encoder_width=8, encoder_num_layers=1, decoder_width=8, decoder_num_layers=1
    )
    vae = dataclasses.replace(config.vae, block_channels=(8,))
    config = dataclasses.replace(config, uvit=uvit, vae=vae)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), network.abstract(config))
    save_checkpoint(tmp_path / "jax", KIND, config, params)
    assert load_config(tmp_path / "jax", KIND) == config
    with pytest.raises(InputError, match=r"patch_size is 4.*jax"):
        save_checkpoint(tmp_path / "out", KIND, config, params, layout="original")


# ---- refusals


def test_a_janus_and_a_janusflow_are_not_taken_for_each_other(original, tmp_path):
    janus = write_checkpoint(tmp_path / "janus", {}, "original", tokenizer=False)
    found = problems_of(janus, KIND)
    assert "has no vision_gen_enc_config" in found and "give a JanusFlow" in found
    found = problems_of(original, JANUS)
    assert "has a vision_gen_enc_config" in found and "give a Janus" in found


def test_weights_of_the_other_one_are_one_problem(original, tmp_path):
    tiny_vae.write_vae(tmp_path / "vae", vae_state(), **VAE_CONFIG)  # beside all
    state = random_state(hf_shapes())
    states = {"original": {**to_original(state), **carried_state()}, "transformers": state}
    for form, tensors in states.items():
        swapped = write_checkpoint(tmp_path / form, tensors, form, tokenizer=False)
        (swapped / "config.json").write_text(json.dumps(make_config()))
        found = problems_of(swapped, KIND)
        assert "its tensors are those of a Janus," in found and len(found.splitlines()) == 1
        assert "put the config.json there that came with the weights" in found
    flow = write_checkpoint(tmp_path / "flow", {}, "original", tokenizer=False)
    save_state(flow, original_state(make_model()))
    found = problems_of(flow, JANUS)
    assert "its tensors are those of a JanusFlow" in found and len(found.splitlines()) == 1


@pytest.mark.parametrize(
    ("section", "name"), [(key, name) for key, row in SECTIONS.items() for name in row.params]
)
def test_a_setting_that_is_not_stated_is_refused(section, name, tmp_path):
    folder = with_config(tmp_path, lambda data: data[section]["params"].pop(name))
    with pytest.raises(InputError) as error:
        load_config(folder, KIND)
    assert f"{section}: params does not state {name};" in str(error.value)
    assert "put the config.json there that came with the weights" in str(error.value)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_without_settings_is_refused(section, tmp_path):
    folder = with_config(tmp_path, lambda data: data[section].pop("params"))
    with pytest.raises(InputError) as error:
        load_config(folder, KIND)
    for name in SECTIONS[section].params:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("vision_gen_enc_config", "stride", 4, "stride is 4, expected 2"),
        ("vision_gen_enc_config", "kernel_size", 7, "kernel_size is 7, expected 2"),
        ("vision_gen_enc_config", "padding", 3, "padding is 3, expected 0"),
        ("vision_gen_enc_config", "hidden_size", 64, "hidden_size is 64, expected 32"),
        ("vision_gen_enc_config", "use_mid_block", False, "use_mid_block is False"),
        ("vision_gen_enc_config", "block_out_channels", [20, 20], "expected one number"),
        ("vision_gen_enc_config", "block_out_channels", [21], "block_out_channels is [20]"),
        ("vision_gen_dec_config", "upsamples", 2, "upsamples is 2, expected 1"),
        ("vision_gen_dec_config", "out_channels", 3, "out_channels is 3, expected 4"),
        ("vision_und_enc_config", "select_feature", "patch", "select_feature is 'patch'"),
        ("vision_und_enc_config", "select_layer", -2, "select_layer is -2, expected -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(section, name, value, message, tmp_path):
    folder = with_config(tmp_path, lambda data: data[section]["params"].update({name: value}))
    with pytest.raises(InputError) as error:
        load_config(folder, KIND)
    assert message in str(error.value)


def test_statistics_of_pixels_count_only_together(tmp_path):
    """As in the original's vision tower, which normalises if it has mean and std."""
    statistics = {"pixel_mean": [0.5] * 3, "pixel_std": [0.2] * 3}

    def load(name: str, **values: list[float]):
        def change(data):
            data["vision_und_enc_config"]["params"].update(values)

        (tmp_path / name).mkdir()
        return load_config(with_config(tmp_path / name, change), KIND)

    plain = load("plain")
    for name, value in statistics.items():
        assert load(name, **{name: value}) == plain
    with pytest.raises(
        InputError, match=r"pixel_mean is \[0.5, 0.5, 0.5\], expected None"
    ) as error:
        load("both", **statistics)
    assert "pixel_std is [0.2, 0.2, 0.2], expected None" in str(error.value)


def test_an_absent_epsilon_has_the_originals_default(tmp_path):
    def change(data):
        data["vision_gen_enc_config"]["params"]["norm_eps"] = 1e-5
        data["vision_gen_dec_config"]["params"].pop("norm_eps")

    with pytest.raises(InputError, match="norm_eps is 1e-06, expected 1e-05, as in vision_gen_enc"):
        load_config(with_config(tmp_path, change), KIND)


def test_another_class_is_refused_and_a_dotted_one_is_not(tmp_path):
    def rename(data):
        data["vision_gen_dec_config"]["cls"] = "UViTDecoder2"

    with pytest.raises(InputError, match="cls is 'UViTDecoder2', expected 'ShallowUViTDecoder'"):
        load_config(with_config(tmp_path, rename), KIND)
    assert "." in make_config()["vision_gen_enc_config"]["cls"]
    assert load_config(with_config(tmp_path, lambda data: None), KIND)


def test_sizes_that_the_network_cannot_have_are_refused(tmp_path):
    def make_odd(data):
        for name in ("vision_gen_enc_config", "vision_gen_dec_config"):
            data[name]["params"]["block_out_channels"] = [21]

    with pytest.raises(InputError, match="encoder_width is 21, expected a multiple of"):
        load_config(with_config(tmp_path, make_odd), KIND)


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    folder = original_folder(tmp_path / "flow")
    state = original_state(make_model())
    del state["vision_gen_enc_aligner.bias"]
    state["beg_of_und_embed"] = state["beg_of_und_embed"][0]
    save_state(folder, state)
    found = problems_of(folder)
    assert "vision_gen_enc_aligner.bias is missing" in found
    assert "beg_of_und_embed has shape [32], expected [1, 32]" in found


def test_the_fixture_is_the_network_of_the_parity_tests(original):
    """The config that the files state by hand parses to the sizes of the torch modules."""
    from corl_jax.errors import Problems

    problems = Problems()
    config = parse(original, "original", {}, problems)
    assert not problems and config == torch_janus_flow.jax_config(make_model())
    assert read_json(original / "config.json") == janus_flow_files.make_config()


# ---- the VAE


def change_vae(folder: Path, **settings) -> Path:
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@pytest.mark.parametrize("name", ["sdxl-vae", "beside"])
def test_the_vae_may_have_another_place(name, tmp_path):
    folder = original_folder(tmp_path / "flow")
    place = tmp_path / "vae" if name == "beside" else folder / name
    (folder / "vae").rename(place)
    found = load_params(folder, KIND)["vae"]
    assert jax.tree.all(jax.tree.map(np.array_equal, found, load_vae(place)[1]))


def test_the_vae_inside_of_a_folder_is_its_own_whatever_is_beside(tmp_path):
    folder = original_folder(tmp_path / "flow")
    other = tmp_path / "vae"
    tiny_vae.write_vae(other, {key: x + 1 for key, x in vae_state().items()}, **VAE_CONFIG)
    (folder / "vae").rename(folder / "sdxl-vae")
    found = load_params(folder, KIND)["vae"]
    expected = load_vae(folder / "sdxl-vae")[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_without_a_vae_the_command_that_downloads_it_is_named(tmp_path):
    folder = original_folder(tmp_path / "flow")
    shutil.rmtree(folder / "vae")
    found = problems_of(folder)
    assert f"hf download stabilityai/sdxl-vae --local-dir {folder / 'vae'}" in found
    assert len(found.splitlines()) == 1


@pytest.mark.parametrize("beside", [False, True])
def test_the_lone_file_of_a_vae_is_named_with_its_place(beside, tmp_path):
    folder = original_folder(tmp_path / "flow")
    weights, place = folder / "vae" / tiny_vae.SAFE, folder / "vae"
    file = (tmp_path if beside else folder) / "sdxl_vae.safetensors"
    (place / "config.json").rename(folder / "config of the vae")
    found = problems_of(folder)
    assert f"{place / 'config.json'}: not found" in found
    assert f"`hf download stabilityai/sdxl-vae config.json --local-dir {place}`" in found
    weights.rename(file)
    place.rmdir()
    found = problems_of(folder)
    assert found.startswith(f"{file}: found a file of weights, expected a folder {place} with ")
    assert f"move it to {weights} and run `hf download stabilityai/sdxl-vae config.json" in found
    assert len(found.splitlines()) == 1
    # What it says works.
    place.mkdir()
    file.rename(weights)
    (folder / "config of the vae").rename(place / "config.json")
    open_checkpoint(folder, KIND).close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling_factor": 0.18215}, "vae/config.json: scaling_factor is 0.18215, expected 0.13"),
        ({"latent_channels": 16}, "/vae/config.json: latent_channels is 16, expected 4"),
        (
            {"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"],
             "up_block_types": ["UpDecoderBlock2D"]},
            "/vae/config.json: makes one latent of 1 pixels a side",
        ),
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'"),
    ],
)  # fmt: skip
def test_another_vae_is_refused(settings, message, tmp_path):
    found = problems_of(change_vae(original_folder(tmp_path / "flow"), **settings))
    assert message in found and "stabilityai/sdxl-vae" in found


def test_a_damaged_vae_is_refused(tmp_path):
    folder = original_folder(tmp_path / "flow")
    state = vae_state()
    del state["decoder.conv_in.bias"]
    tiny_vae.write_vae(folder / "vae", state, **VAE_CONFIG)
    remedy, problem = problems_of(folder).splitlines()
    assert "the weights of its VAE are not those that" in remedy
    assert f"hf download stabilityai/sdxl-vae --local-dir {folder / 'vae'}`" in remedy
    assert "vae/decoder.conv_in.bias is missing" in problem
