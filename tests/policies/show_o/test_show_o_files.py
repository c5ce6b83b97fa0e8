"""Show-o's checkpoints: read from three folders, converted to ours and back to the bit."""

from __future__ import annotations

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from corl_jax.assets import NANO_SHOW_O
from corl_jax.convert.describe import describe
from corl_jax.errors import InputError
from corl_jax.params import flatten
from corl_jax.policies import find_family, inspect_policy
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.checkpoint import KIND, find_tokenizer
from corl_jax.policies.show_o.checkpoint.sizes import write_config
from corl_jax.weights.checkpoint import load_config, load_params, open_checkpoint
from corl_jax.weights.export import convert, save_checkpoint
from corl_jax.weights.export_folder import Export, plan_tensors
from corl_jax.weights.hashing import hash_weights
from corl_jax.weights.parts import count_part_bytes
from corl_jax.weights.recognise import recognise_kind
from corl_jax.weights.shards import write_json
from tests.parity import torch_show_o
from tests.support import show_o_files
from tests.support.show_o_files import Shapes

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return show_o_files.original_folder(tmp_path_factory.mktemp("models") / "show-o")


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "show-o")


def list_files(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def change(file, **values):
    write_json(file, {**json.loads(file.read_text()), **values})


def problems_of(folder) -> str:
    with pytest.raises(InputError) as error:
        open_checkpoint(folder, KIND).close()
    return str(error.value)


def test_sizes_come_from_the_tensors(original):
    expected = torch_show_o.jax_config(torch_show_o.tiny_phi().config)
    assert load_config(original, KIND) == expected
    assert recognise_kind(original, [KIND]) is KIND


def test_the_loaded_network_computes_what_torch_does(original):
    config, params = load_config(original, KIND), load_params(original, KIND)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    mask = np.tril(np.ones((2, 9, 9), bool))
    tokens, seen = jnp.asarray(ids), jnp.asarray(mask)
    with torch.no_grad():
        expected = torch_show_o.tiny_phi()(
            torch.from_numpy(ids), attention_mask=torch_show_o.additive(mask)
        ).logits.numpy()
    model = network.bind(config, params)
    found = model.text_logits(model.language_model(model.embed_text(tokens), seen))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    theirs = torch_show_o.tiny_tokenizer().encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    np.testing.assert_array_equal(model.vqmodel.encode(jnp.asarray(pixels)), theirs.numpy())


def test_conversion_there_and_back_changes_no_byte(original, tmp_path):
    assert convert(original, tmp_path / "jax", KIND) == []
    assert load_config(tmp_path / "jax", KIND) == load_config(original, KIND)
    assert convert(tmp_path / "jax", tmp_path / "back", KIND, layout="original") == []
    assert list_files(tmp_path / "back") == list_files(original)
    for name in list_files(original):
        assert (tmp_path / "back" / name).read_bytes() == (original / name).read_bytes(), name


def test_folders_may_stand_beside_the_model(original, tmp_path):
    folder = show_o_files.original_folder(tmp_path / "show-o", beside=True)
    first, second = (flatten(load_params(path, KIND)) for path in (original, folder))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[path], second[path]) for path in first)
    assert find_tokenizer(folder) == tmp_path / "phi-1_5"
    convert(folder, tmp_path / "jax", KIND)
    assert find_tokenizer(tmp_path / "jax") == tmp_path / "jax/phi-1_5"


def test_an_export_without_a_source_is_complete(original, tmp_path):
    """Parameters in memory, and no tokenizer."""
    config, params = load_config(original, KIND), load_params(original, KIND)
    notes = save_checkpoint(tmp_path / "out", KIND, config, params, layout="original")
    assert len(notes) == 1 and "tokenizer.json" in notes[0]
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 83
    assert load_config(tmp_path / "out", KIND) == config
    for name in ("pytorch_model.safetensors", "magvitv2/pytorch_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()


def test_weights_of_a_trainer(copy):
    """A plain state dict in a .pth file, beside the config.json of the model it came from."""
    state = load_file(copy / "pytorch_model.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, copy / "mycheckpoint.pth")
    expected = flatten(load_params(copy, KIND))
    (copy / "pytorch_model.safetensors").unlink()
    found = flatten(load_params(copy, KIND))
    assert all(np.array_equal(found[path], expected[path]) for path in expected)
    # The original's own shards, whose index has another name.
    (copy / "mycheckpoint.pth").unlink()
    for number, keys in enumerate((list(state)[:9], list(state)[9:]), start=1):
        shard = copy / f"pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, shard)
    write_json(copy / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": {}})
    found = flatten(load_params(copy, KIND))
    assert all(np.array_equal(found[path], expected[path]) for path in expected)


def test_settings_that_no_tensor_shows(copy, tmp_path):
    change(copy / "phi-1_5/config.json", partial_rotary_factor=0.25, rope_theta=500.0)
    config = load_config(copy, KIND)
    assert (config.phi.rotary_dim, config.phi.rope_theta) == (2, 500.0)
    shutil.rmtree(copy / "phi-1_5")
    config = load_config(copy, KIND)
    assert (config.phi.rotary_dim, config.phi.rope_theta) == (4, 10000.0)
    note = "no file states the share of each head"
    notes = convert(copy, tmp_path / "jax", KIND)
    assert len(notes) == 2 and note in notes[0] and "0.5, 10000, 1e-05 and gelu_new" in notes[0]
    assert any(note in line for line in describe(copy, KIND))
    with pytest.raises(InputError) as error:
        find_tokenizer(copy)
    assert "phi-1_5/tokenizer.json: not found" in str(error.value)
    command = "hf download microsoft/phi-1_5 tokenizer.json .* config.json --local-dir .*/phi-1_5`"
    assert re.search(command, str(error.value))


def test_a_command_that_opens_a_model_notes_its_assumptions_once(tmp_path, capsys):
    folder = shutil.copytree(NANO_SHOW_O, tmp_path / "m")
    inspect_policy(folder)
    assert capsys.readouterr().err == ""
    (folder / "phi-1_5/config.json").unlink()
    for opened in (inspect_policy(folder), inspect_policy(folder)):
        assert opened.sizes.phi.partial_rotary_factor == 0.5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {folder}: no file states the share of each head that is rotated")
    assert line.endswith("those of microsoft/phi-1_5: 0.5, 10000, 1e-05 and gelu_new")
    # A converted folder states them itself.
    convert(folder, tmp_path / "jax", KIND)
    inspect_policy(tmp_path / "jax")
    assert capsys.readouterr().err == ""


def test_a_small_model_may_have_the_folder_of_the_large_ones_tokenizer(copy, tmp_path):
    file = copy / "phi-1_5/config.json"
    change(file, num_hidden_layers=24, hidden_size=2048, rope_theta=500.0)
    config = load_config(copy, KIND)
    assert (config.phi.num_layers, config.phi.rope_theta) == (3, 500.0)
    convert(copy, tmp_path / "out", KIND, layout="original")
    written = json.loads((tmp_path / "out/phi-1_5/config.json").read_text())
    assert (written["num_hidden_layers"], written["hidden_size"]) == (3, 32)
    assert load_config(tmp_path / "out", KIND) == config


def add_projector(folder, inner=2048) -> None:
    """Adds the projector of the original code, whose sizes are constants, and its option."""
    state = load_file(folder / "pytorch_model.safetensors")
    draw = np.random.default_rng(0).standard_normal
    for number, inputs in ((0, 1024), (2, inner)):
        state[f"mm_projector.{number}.weight"] = draw((inner, inputs)).astype(np.float32)
        state[f"mm_projector.{number}.bias"] = draw(inner).astype(np.float32)
    save_file(state, folder / "pytorch_model.safetensors", metadata={"format": "pt"})
    change(folder / "config.json", w_clip_vit=True)


def test_a_projector_is_kept_and_the_lack_of_its_tower_is_said(copy, tmp_path):
    add_projector(copy)
    notes = convert(copy, tmp_path / "jax", KIND)
    assert len(notes) == 1 and "draws images but answers no questions" in notes[0]
    assert "hf download openai/clip-vit-large-patch14-336 config.json" in notes[0]
    convert(tmp_path / "jax", tmp_path / "back", KIND, layout="original")
    first, second = (
        load_file(folder / "pytorch_model.safetensors") for folder in (copy, tmp_path / "back")
    )
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    change(copy / "config.json", w_clip_vit=None)
    assert load_config(copy, KIND).w_clip_vit
    change(copy / "config.json", w_clip_vit=False)
    assert "w_clip_vit is false, expected true" in problems_of(copy)


def test_sizes_that_the_config_leaves_out(copy, tmp_path):
    data = json.loads((copy / "config.json").read_text())
    for name in ("codebook_size", "llm_vocab_size", "mask_token_id", "vocab_size", "w_clip_vit"):
        del data[name]
    write_json(copy / "config.json", data)
    assert load_config(copy, KIND) == torch_show_o.jax_config(torch_show_o.tiny_phi().config)
    del data["num_vq_tokens"]
    write_json(copy / "config.json", data)
    assert load_config(copy, KIND).num_vq_tokens == 256
    (note,) = convert(copy, tmp_path / "jax", KIND)
    assert "does not state num_vq_tokens; an image is taken to have 256 codes" in note


def test_wrong_files_are_refused(copy):
    change(copy / "config.json", llm_vocab_size=41)
    assert "found 83 tokens in the embedding, expected 84" in problems_of(copy)
    change(copy / "config.json", llm_vocab_size=40, codebook_size=64, num_vq_tokens=15)
    assert "codebook_size is 64, expected 32" in problems_of(copy)
    change(copy / "config.json", codebook_size=32)
    assert "num_vq_tokens is 15, expected a square number" in problems_of(copy)
    change(copy / "config.json", num_vq_tokens=16, w_clip_vit=True)
    assert "mm_projector.0.weight is missing" in problems_of(copy)
    change(copy / "config.json", w_clip_vit=False)
    change(copy / "phi-1_5/config.json", hidden_act="gelu")
    assert "hidden_act is 'gelu', expected 'gelu_new'" in problems_of(copy)


def test_a_missing_tokenizer_and_a_wrong_table_are_refused(copy):
    file = copy / "magvitv2/pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["quantize.power_vals"] = tensors["quantize.power_vals"][::-1].copy()
    save_file(tensors, file)
    assert "magvitv2/quantize.power_vals does not hold" in problems_of(copy)
    shutil.rmtree(copy / "magvitv2")
    assert "hf download showlab/magvitv2 --local-dir" in problems_of(copy)


@pytest.mark.parametrize(
    "name",
    [
        "showo.model.embed_tokens.weight", "showo.model.layers.0.self_attn.q_layernorm.weight",
        "showo.model.layers.1.input_layernorm.weight", "magvitv2/encoder.conv_out.weight",
        "magvitv2/encoder.down.0.block.0.conv1.weight",
        "magvitv2/decoder.up.2.block.1.conv1.weight",
    ],
)  # fmt: skip
def test_a_missing_tensor_is_named_where_sizes_come_from_it(copy, name):
    key = name.removeprefix("magvitv2/")
    file = copy / f"{name.removesuffix(key)}pytorch_model.safetensors"
    tensors = load_file(file)
    shape = list(tensors.pop(key).shape)
    save_file(tensors, file)
    assert problems_of(copy) == f"{copy}: {name} is missing, expected with shape {shape}"


def test_a_tensor_of_a_far_layer_is_unknown(copy):
    file = copy / "pytorch_model.safetensors"
    name = "showo.model.layers.9999.mlp.fc1.bias"
    save_file(load_file(file) | {name: np.zeros(2, np.float32)}, file)
    assert f"{name} is unknown" in problems_of(copy)


def test_the_hash_of_a_model_is_of_all_its_parts(copy, tmp_path):
    first = hash_weights(copy, KIND)
    file = copy / "magvitv2/pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["encoder.conv_in.bias"] += 1
    save_file(tensors, file)
    assert hash_weights(copy, KIND) != first
    convert(copy, tmp_path / "jax", KIND)
    assert hash_weights(tmp_path / "jax", KIND) == hash_weights(tmp_path / "jax")


def test_a_folder_that_does_not_say_its_class_is_known_by_its_tensors(copy, original):
    data = json.loads((copy / "config.json").read_text())
    del data["_class_name"]
    write_json(copy / "config.json", data)
    assert inspect_policy(copy).sizes == inspect_policy(original).sizes
    (copy / "config.json").unlink()
    with pytest.raises(InputError) as error:
        inspect_policy(copy)
    assert "copy config.json from the Show-o that the weights come from" in str(error.value)
    # What a file states goes before names, and a folder without weights says nothing.
    write_json(copy / "config.json", {"model_type": "multi_modality"})
    assert find_family(copy).name == "janus"
    (copy / "config.json").unlink()
    (copy / "pytorch_model.safetensors").unlink()
    assert find_family(copy).name == "janus"


def test_names_without_their_prefix_are_explained(copy):
    state = load_file(copy / "pytorch_model.safetensors")
    bare = {name.removeprefix("showo."): value for name, value in state.items()}
    save_file(bare, copy / "pytorch_model.safetensors")
    assert "lack the 'showo.'" in problems_of(copy)


def test_published_files_have_the_predicted_size():
    """Without a projector of CLIP's features and with it."""
    config = network.PRESETS["show-o-w-clip-vit"]
    shapes = KIND.shapes(config)
    plain = {path: shape for path, shape in shapes.items() if not path.startswith("mm_projector")}
    for leaves, expected in ((plain, 5_792_758_016), (shapes, 5_817_940_584)):
        export = Export(
            kind=KIND, layout="original", config=config, leaves=Shapes(leaves), assets=None,
            carried={},
        )  # fmt: skip
        assert count_part_bytes(KIND, plan_tensors(export)) == {
            "pytorch_model.safetensors": expected,
            "magvitv2/pytorch_model.safetensors": 382_013_656,
        }


def test_published_configs_have_the_predicted_size(tmp_path):
    config = network.PRESETS["show-o-512x512"]
    write_json(tmp_path / "config.json", write_config("original", config, "float32", None))
    assert (tmp_path / "config.json").stat().st_size == 280


def test_bfloat16_keeps_the_tokenizer_to_the_end(original, tmp_path):
    """Every float of the files is written in the type that is asked for."""
    convert(original, tmp_path / "half", KIND, layout="original", dtype="bfloat16")
    params = load_params(tmp_path / "half", KIND)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    cast = network.cast(params, "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cast["vqmodel"])} == {"float32"}
