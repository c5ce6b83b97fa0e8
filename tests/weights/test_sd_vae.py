"""The files of a VAE: every layout to the bit, where it is found, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from corl_jax.convert.__main__ import run
from corl_jax.errors import InputError, Problems
from corl_jax.models.sd_vae import SdVae, SdVaeConfig
from corl_jax.params import flatten
from corl_jax.weights import selection
from corl_jax.weights.checkpoint import load_config, load_params
from corl_jax.weights.export import convert, save_checkpoint
from corl_jax.weights.kinds import NetworkKind, WeightsPart
from corl_jax.weights.layouts.sd_vae import (
    FOLDERS,
    HUB_ID,
    KIND,
    STEM,
    find_vae,
    find_vae_of,
    load_vae,
    make_config,
    make_rows,
    open_vae,
    read_sizes,
)
from corl_jax.weights.table import Table
from corl_jax.weights.table_rows import dense
from tests.support.tiny_vae import (
    CONFIG,
    SAFE,
    make_params,
    make_state,
    to_ldm_names,
    to_old_names,
    write_vae,
)
from tests.support.weight_files import BFLOAT16, assert_same_bits

BIN = f"{STEM}.bin"


@pytest.fixture(autouse=True)
def warnings_of_this_test():
    """Each folder is warned of once in a process."""
    selection._warn_once.cache_clear()


@pytest.fixture(scope="module")
def state():
    """Tensors of two types, by diffusers' names."""
    mixed = make_state()
    return mixed | {k: v.astype(BFLOAT16) for k, v in mixed.items() if k.startswith("decoder.up")}


@pytest.fixture
def folder(tmp_path, state):
    return write_vae(tmp_path / "vae", state)


def assert_loads(place, state) -> None:
    """Every parameter has the values of its tensor, by a few rules that are not the key table's."""
    config, params = load_vae(place)
    flat = flatten(params)
    assert config == CONFIG and len(flat) == len(state)
    assert all(leaf.dtype == np.float32 for leaf in flat.values())
    kernel = state["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"]
    np.testing.assert_array_equal(
        flat["decoder/up/2/block/0/nin_shortcut/kernel"][0, 0], kernel[:, :, 0, 0].T
    )
    kernel = state["encoder.mid_block.attentions.0.to_k.weight"]
    np.testing.assert_array_equal(flat["encoder/mid/attn_1/k/kernel"][0, 0], kernel.T)
    values = sorted(np.float32(value).sum(dtype=float) for value in state.values())
    np.testing.assert_allclose(sorted(leaf.sum(dtype=float) for leaf in flat.values()), values)


def test_a_folder_comes_back_to_the_byte(folder, tmp_path):
    convert(folder, tmp_path / "ours", KIND)
    convert(tmp_path / "ours", tmp_path / "back", KIND, layout="diffusers")
    names = {"config.json", SAFE}
    assert {file.name for file in (tmp_path / "back").iterdir()} == names
    assert_same_bits(load_file(tmp_path / "back" / SAFE), load_file(folder / SAFE))
    config = folder / "config.json"  # with settings that this package does not read
    assert (tmp_path / "back" / "config.json").read_bytes() == config.read_bytes()


def test_the_command_converts_a_vae(folder, tmp_path, capsys):
    assert run(["to-jax", str(folder), str(tmp_path / "ours")]) == 0
    assert "sd_vae, layout diffusers" in capsys.readouterr().out
    assert load_config(tmp_path / "ours", KIND) == CONFIG


def test_pytorchs_own_file_goes_both_ways(folder, tmp_path, state):
    pytest.importorskip("torch")
    convert(folder, tmp_path / "bin", KIND, layout="diffusers", as_bin=True)
    assert {file.name for file in (tmp_path / "bin").iterdir()} == {"config.json", BIN}
    assert_loads(tmp_path / "bin", state)
    convert(tmp_path / "bin", tmp_path / "back", KIND, layout="diffusers")
    assert_same_bits(load_file(tmp_path / "back" / SAFE), state)


def test_parameters_in_memory_are_written(tmp_path):
    params = make_params()
    save_checkpoint(tmp_path / "new", KIND, CONFIG, params, layout="diffusers")
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == make_config(CONFIG)
    config, found = load_vae(tmp_path / "new")
    assert config == CONFIG and jax.tree.all(jax.tree.map(np.array_equal, found, params))


def test_shards_with_an_index(folder, state):
    (folder / SAFE).unlink()
    weight_map = {}
    for number, half in enumerate(("encoder.", ""), 1):
        name = f"{STEM}-{number:05d}-of-00002.safetensors"
        part = {k: v for k, v in state.items() if k.startswith("encoder.") == bool(half)}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{SAFE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_loads(folder, state)


def test_old_names_of_the_attention(tmp_path, state):
    old = to_old_names(state)
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old
    folder = write_vae(tmp_path / "old", old)
    with open_vae(folder) as opened:
        assert opened.layout == "diffusers_old"
    assert_loads(folder, state)
    convert(folder, tmp_path / "back", KIND, layout="diffusers_old")
    assert_same_bits(load_file(tmp_path / "back" / SAFE), old)


def test_a_single_file_of_latent_diffusion(tmp_path):
    """Its tensors show all sizes but the groups of the norms, which are 32."""
    sizes = SdVaeConfig(latent_channels=3, block_channels=(32, 64, 64, 64), num_res_blocks=1)
    state = make_state(sizes)
    file = tmp_path / "sdxl_vae.safetensors"
    ldm = to_ldm_names(state)
    save_file({**ldm, "loss.logvar": np.zeros((), np.float32)}, file)
    assert "decoder.up.3.block.0.conv1.weight" in ldm
    assert ldm["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    for place in (file, tmp_path):
        with open_vae(place) as opened:
            assert opened.layout == "ldm" and opened.config == sizes
            (note,) = KIND.note_assumptions(place, opened.config)
            assert "0.13025 and 32" in note
    (note,) = convert(tmp_path, tmp_path / "new", KIND, layout="diffusers")
    assert "scaling_factor" in note
    assert_same_bits(load_file(tmp_path / "new" / SAFE), state)
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == make_config(sizes)
    with pytest.raises(InputError, match="'ldm': is only read; write 'diffusers'"):
        convert(tmp_path, tmp_path / "again", KIND, layout="ldm")


def test_of_several_files_diffusers_reads_the_one_of_its_name(folder, state, capsys):
    """As in a whole copy of stabilityai/sdxl-vae, which has the same weights three times."""
    other = {key: value + 1 for key, value in state.items()}
    save_file(to_ldm_names(other), folder / "sdxl_vae.safetensors")
    save_file(other, folder / f"{STEM}.fp16.safetensors")
    (folder / BIN).write_bytes(b"not read")
    assert_loads(folder, state)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{SAFE} is read, and not" in line and "sdxl_vae.safetensors" in line


def test_where_a_vae_is_found(folder, tmp_path):
    """By itself or in a pipeline's folder; that of a larger model may be beside it, too."""
    assert find_vae(folder) == folder and find_vae(tmp_path) == folder
    assert find_vae(folder / SAFE) == folder / SAFE
    model = tmp_path / "model"
    model.mkdir()
    assert find_vae_of(model) == folder
    inside = shutil.copytree(folder, model / "sdxl-vae")
    assert find_vae(model) == inside and find_vae_of(tmp_path) == folder
    folder.rename(tmp_path / "renamed")
    assert find_vae_of(model) == inside
    shutil.rmtree(inside)
    for find in (find_vae, find_vae_of):
        with pytest.raises(InputError, match=f"hf download {HUB_ID} --local-dir {model}"):
            find(model)
    (model / "config.json").write_text('{"model_type": "multi_modality"}')
    with pytest.raises(InputError, match=r"holds no VAE; its config.json is of 'multi_modality'"):
        open_vae(model)


# ---- part of a larger model


@dataclasses.dataclass(frozen=True)
class PairSizes:
    width: int = 3
    vae: SdVaeConfig = CONFIG


class Pair(nnx.Module):
    """A linear layer and a VAE."""

    def __init__(self, config: PairSizes, *, rngs: nnx.Rngs):
        self.head = nnx.Linear(config.width, config.width, rngs=rngs)
        self.vae = SdVae(config.vae, rngs=rngs)


def parse_pair(folder, layout, shapes, problems) -> PairSizes:
    return PairSizes(vae=read_sizes(find_vae_of(folder), problems))


PAIR = NetworkKind(
    name="pair",
    module=Pair,
    config=PairSizes,
    tables={"files": Table("files", (*dense("head", "head"), *make_rows(key="vae/", path="vae/")))},
    parse=parse_pair,
    parts=(
        WeightsPart("", "model", "", "someone/pair"),
        WeightsPart("vae", STEM, "vae/", HUB_ID, other_folders=FOLDERS[1:]),
    ),
)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_larger_model_has_the_vae_as_a_part(name, tmp_path, state):
    model = tmp_path / "model"
    write_vae(model / name, state)
    head = {"head.weight": np.eye(3, dtype=np.float32), "head.bias": np.zeros(3, np.float32)}
    save_file(head, model / "model.safetensors")
    found, alone = load_params(model, PAIR), load_params(model / name, KIND)
    assert found.keys() == {"head", "vae"}
    assert jax.tree.all(jax.tree.map(np.array_equal, found["vae"], alone))
    shutil.rmtree(model / name)
    with pytest.raises(InputError, match=f"hf download {HUB_ID}"):
        load_params(model, PAIR)


# ---- what is refused, before any array is on a device


SETTINGS = {
    "_class_name": ("AutoencoderTiny", "'AutoencoderTiny', expected 'AutoencoderKL'"),
    "in_channels": (4, "4, expected 3"),
    "act_fn": ("relu", "'relu', expected 'silu'"),
    "mid_block_add_attention": (False, "False, expected True"),
    "use_quant_conv": (False, "False, expected True"),
    "use_post_quant_conv": (False, "False, expected True"),
    "shift_factor": (0.1159, "0.1159, expected None"),
    "latents_mean": ([0.0], "[0.0], expected None"),
    "scaling_factor": (0, "0, expected a positive number"),
    "latent_channels": ("4", "'4', expected a whole number"),
    "norm_num_groups": (5, "expected a multiple of norm_groups, 5"),
    "block_out_channels": ([8, 16], "expected 'DownEncoderBlock2D' for each of the 2"),
    "down_block_types": (["AttnDownEncoderBlock2D"] * 4, "no other block is implemented"),
    "up_block_types": (["UpDecoderBlock2D"] * 3, "expected 'UpDecoderBlock2D' for each of the 4"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_the_network_does_not_support(name, tmp_path, state):
    value, expected = SETTINGS[name]
    folder = write_vae(tmp_path / "vae", state, **{name: value})
    with pytest.raises(InputError) as caught:
        load_params(folder, KIND)
    lines = [line for line in caught.value.problems if expected in line]
    assert lines and all(str(folder / "config.json") in line for line in lines)


def test_absent_settings_have_diffusers_defaults(folder):
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    problems = Problems()
    found = read_sizes(folder, problems)
    assert found == SdVaeConfig(4, (64,), 1, 32, 0.18215) and not problems


def cut(folder):
    data = (folder / SAFE).read_bytes()
    (folder / SAFE).write_bytes(data[: len(data) // 2])


def remove(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def change_tensors(function):
    def change(folder):
        state = load_file(folder / SAFE)
        function(state)
        save_file(state, folder / SAFE)

    return change


def write_pointer(folder):
    (folder / SAFE).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 334643276\n"
    )


def swap_config(folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "latent_channels": 4}))


CONV, QUERY = "decoder.conv_in.weight", "encoder.mid_block.attentions.0.to_q.weight"
UNFIT = {
    "cut": (cut, f"{SAFE}: .* bytes found, its header promises .* download or copy it again"),
    "no weights": (remove(SAFE), f"no weights found, expected {SAFE}, .* download or copy it"),
    "no config": (remove("config.json"), "config.json: not found, .* copy the config.json"),
    "pointer": (write_pointer, f"{SAFE}: .*Git LFS pointer"),
    "no tensor": (change_tensors(lambda s: s.pop(CONV)), rf"{CONV} is missing, .* \[24, 3, 3, 3\]"),
    "another tensor": (
        change_tensors(lambda s: s.update(extra=s[CONV])), "extra is unknown to the diffusers"
    ),
    "a convolution as attention": (
        change_tensors(lambda s: s.update({QUERY: s[QUERY][..., None, None]})),
        rf"{QUERY} has shape \[24, 24, 1, 1\], expected \[24, 24\]",
    ),
    "other sizes": (swap_config, r"post_quant_conv.bias has shape \[3\], expected \[4\]"),
    "NaN": (change_tensors(lambda s: s[CONV].fill(np.nan)), "decoder/conv_in/kernel.*NaN"),
    "quantised": (
        change_tensors(lambda s: s.update({CONV: s[CONV].astype(np.int8)})),
        f"{CONV} holds int8, expected a float type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_vae_is_refused(name, folder):
    change, message = UNFIT[name]
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_vae(folder.parent)
    assert str(folder) in str(caught.value)


def test_the_remedy_is_a_download(folder):
    change_tensors(lambda state: state.pop(CONV))(folder)
    with pytest.raises(InputError) as caught:
        open_vae(folder)
    # The first, because a command prints a part of a long list.
    assert f"hf download {HUB_ID} --local-dir DIR" in caught.value.problems[0]


def test_it_is_never_loaded_as_float16(folder):
    with pytest.raises(InputError, match="'float16' for the VAE, expected float32 or bfloat16"):
        load_vae(folder, "float16")
    _, params = load_vae(folder, "bfloat16")
    assert all(leaf.dtype == BFLOAT16 for leaf in flatten(params).values())


def test_a_place_that_does_not_exist():
    with pytest.raises(InputError, match="no such directory"):
        open_vae(Path("./nowhere/at/all"))
