"""Round trips through all three layouts, exact to the bit."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open

from corl_jax.errors import InputError
from corl_jax.params import flatten, partition
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.checkpoint.assets import add_bos
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.tokens import STRINGS, special_tokens
from corl_jax.train import export
from corl_jax.weights.checkpoint import (
    detect_layout,
    load_config,
    load_params,
    read_layer_dtypes,
    read_stored_dtypes,
)
from corl_jax.weights.dtypes import find_common_dtype
from corl_jax.weights.export import convert, save_checkpoint
from tests.support.weight_files import (
    BFLOAT16,
    assert_same_bits,
    carried_state,
    hf_shapes,
    random_state,
    read_state,
    to_original,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def hf_state():
    return random_state(hf_shapes(), mixed=True)


@pytest.fixture(scope="module")
def original_state(hf_state):
    return {**to_original(hf_state), **carried_state()}


@pytest.fixture(scope="module")
def dirs(tmp_path_factory, hf_state, original_state):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "transformers": write_checkpoint(folder / "hf", hf_state, "transformers"),
        "original": write_checkpoint(folder / "original", original_state, "original"),
    }


@pytest.fixture(scope="module")
def jax_dirs(tmp_path_factory, dirs):
    folder = tmp_path_factory.mktemp("converted")
    for layout, source in dirs.items():
        convert(source, folder / layout, KIND, layout="jax", max_shard_bytes=10**6)
    return {layout: folder / layout for layout in dirs}


def uniform(state):
    return {key: value.astype(np.float32) for key, value in state.items()}


def test_layouts_are_detected(dirs, jax_dirs):
    assert {name: detect_layout(folder, KIND) for name, folder in dirs.items()} == {
        "transformers": "transformers",
        "original": "original",
    }
    assert detect_layout(jax_dirs["original"], KIND) == "jax"


def test_all_layouts_mean_the_same_config(dirs, jax_dirs):
    configs = {load_config(folder, KIND) for folder in [*dirs.values(), *jax_dirs.values()]}
    assert len(configs) == 1


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("as_bin", [False, True])
def test_to_jax_and_back_is_exact(layout, as_bin, dirs, jax_dirs, request, tmp_path):
    expected = request.getfixturevalue("original_state" if layout == "original" else "hf_state")
    out = tmp_path / "back"
    notes = convert(
        jax_dirs[layout], out, KIND, layout=layout, as_bin=as_bin, max_shard_bytes=2 * 10**6
    )
    assert notes == []
    if as_bin:
        again = tmp_path / "again"  # and our own reader of .bin shards
        convert(out, tmp_path / "jax", KIND, layout="jax")
        convert(tmp_path / "jax", again, KIND, layout=layout)
        assert sorted(p.suffix for p in out.glob("pytorch_model*"))[-1] == ".json"
        out = again
    assert_same_bits(read_state(out), expected)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert (out / name).read_bytes() == (dirs[layout] / name).read_bytes(), name


def test_original_to_transformers_renames_and_splits(jax_dirs, hf_state, tmp_path):
    notes = convert(jax_dirs["original"], tmp_path / "out", KIND, layout="transformers")
    assert_same_bits(read_state(tmp_path / "out"), hf_state)
    assert len(notes) == 1
    assert "5 tensors have no place in the transformers layout" in notes[0]


def test_transformers_to_original_takes_the_rest_from_base(dirs, hf_state, tmp_path):
    state = uniform(hf_state)  # a fused qkv of unlike types takes the wider one
    source = write_checkpoint(tmp_path / "hf", state, "transformers")
    notes = convert(source, tmp_path / "out", KIND, layout="original", base=dirs["original"])
    assert notes == []
    assert_same_bits(read_state(tmp_path / "out"), {**to_original(state), **carried_state()})


def test_what_no_source_has_is_reported(dirs, original_state, tmp_path):
    notes = convert(dirs["transformers"], tmp_path / "out", KIND, layout="original")
    assert len(notes) == 2
    assert "attn_pool.*" in notes[0]
    assert "codebook_used" in notes[1]
    assert read_state(tmp_path / "out").keys() == original_state.keys() - carried_state().keys()


def test_a_crossing_and_back_is_exact(dirs, original_state, tmp_path):
    convert(dirs["original"], tmp_path / "hf", KIND, layout="transformers")
    convert(tmp_path / "hf", tmp_path / "out", KIND, layout="original", base=dirs["original"])
    assert_same_bits(read_state(tmp_path / "out"), original_state)


def test_kernels_are_transposed_and_qkv_split(jax_dirs, original_state):
    flat = flatten(load_params(jax_dirs["original"], KIND))
    block = "vision_model.vision_tower.blocks.1."
    qkv = original_state[f"{block}attn.qkv.weight"]
    width = qkv.shape[1]
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        kernel = flat[f"vision_model/layers/attn/{name}/kernel"][1]
        np.testing.assert_array_equal(kernel, qkv[i * width : (i + 1) * width].T)
    gate = original_state["language_model.model.layers.2.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(
        flat["language_model/layers/mlp/gate_proj/kernel"][2], gate.T.astype(np.float32)
    )
    conv = original_state["gen_vision_model.encoder.conv_blocks.0.res.0.conv1.weight"]
    np.testing.assert_array_equal(
        flat["vqmodel/encoder/down/0/block/0/conv1/kernel"], conv.transpose(2, 3, 1, 0)
    )
    position = original_state["vision_model.vision_tower.pos_embed"]
    np.testing.assert_array_equal(flat["vision_model/position_embedding/embedding"], position[0])


def test_params_are_the_same_from_every_layout(dirs, jax_dirs):
    expected = flatten(load_params(dirs["transformers"], KIND))
    for folder in [dirs["original"], *jax_dirs.values()]:
        assert_same_bits(flatten(load_params(folder, KIND)), expected)


def test_load_params_casts(dirs):
    flat = flatten(load_params(dirs["original"], KIND, dtype=np.float32))
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype(np.float32)}
    exact = flatten(load_params(dirs["original"], KIND))
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, exact[path].astype(np.float32))


@pytest.mark.parametrize("layout", ["original", "transformers", "jax"])
def test_save_checkpoint_writes_jax_arrays_of_any_layout(layout, dirs, tmp_path):
    import jax

    config = load_config(dirs["original"], KIND)
    params = load_params(dirs["original"], KIND, dtype=np.float32)
    notes = save_checkpoint(
        tmp_path / "out",
        KIND,
        config,
        jax.tree.map(jax.numpy.asarray, params),
        layout=layout,
        assets_from=dirs["original"],
        dtype="bfloat16",
        max_shard_bytes=10**6,
    )
    assert (notes == []) == (layout != "transformers")
    found = load_params(tmp_path / "out", KIND)
    assert_same_bits(flatten(found), {k: v.astype(BFLOAT16) for k, v in flatten(params).items()})
    assert special_tokens(tmp_path / "out") == special_tokens(dirs["original"])
    assert load_config(tmp_path / "out", KIND) == config


@pytest.mark.parametrize("layout", ["original", "transformers", "jax"])
def test_layers_of_several_types_come_back_bit_for_bit(
    layout, dirs, hf_state, original_state, tmp_path
):
    """float16 and bfloat16 layers of one parameter meet in float32, and part again."""
    source = dirs["transformers" if layout == "transformers" else "original"]
    config, params = load_config(source, KIND), load_params(source, KIND)
    layers = read_layer_dtypes(source, KIND, config)
    assert any({"float16", "bfloat16"} <= set(kinds) for kinds in layers.values())
    out = tmp_path / "out"
    save_checkpoint(
        out, KIND, config, params, layout=layout, assets_from=source, layer_dtypes=layers
    )
    if layout == "jax":
        convert(out, tmp_path / "again", KIND, layout="original")
        out = tmp_path / "again"
    assert_same_bits(read_state(out), hf_state if layout == "transformers" else original_state)


def test_an_export_writes_each_layer_in_the_type_of_its_source(dirs, hf_state, tmp_path):
    """What is frozen comes back bit for bit; what is trained is rounded to its own type."""
    import jax

    folder = dirs["transformers"]
    config = load_config(folder, KIND)
    params = jax.tree.map(jax.numpy.asarray, load_params(folder, KIND))
    trained, frozen = partition(params, ["language_model/.*"])
    trained = jax.tree.map(lambda x: x.astype(np.float32) + 0.25, trained)
    options = SimpleNamespace(layout="transformers", lora="merged", dtype="keep", base=None)
    export.export(
        tmp_path / "out",
        SimpleNamespace(export=options, model=SimpleNamespace(path=str(folder))),
        SimpleNamespace(
            family=FAMILY, sizes=config, frozen=frozen,
            source_dtypes=read_stored_dtypes(folder, KIND, config),
            layer_dtypes=read_layer_dtypes(folder, KIND, config),
        ),
        SimpleNamespace(params=trained, average=None), folder, primary=True,
    )  # fmt: skip
    expected = {
        key: (value.astype(np.float32) + np.float32(0.25)).astype(value.dtype)
        if ".language_model." in key
        else value
        for key, value in hf_state.items()
    }
    assert_same_bits(read_state(tmp_path / "out"), expected)


def test_parts_of_different_types_that_a_layout_joins_are_noted(hf_state, tmp_path):
    key = "model.vision_model.encoder.layers.0.self_attn.{}_proj.weight"
    kinds = {"q": np.float16, "k": BFLOAT16, "v": np.float32}
    state = hf_state | {
        key.format(name): hf_state[key.format(name)].astype(np.float32).astype(kind)
        for name, kind in kinds.items()
    }
    source = write_checkpoint(tmp_path / "hf", state, "transformers")
    notes = convert(source, tmp_path / "original", KIND, layout="original")
    joined = "vision_model.vision_tower.blocks.0.attn.qkv.weight"
    assert any(f"1 tensors ({joined}) join parts" in note for note in notes)
    found = read_state(tmp_path / "original")[joined]
    parts = [state[key.format(name)].astype(np.float32) for name in "qkv"]
    np.testing.assert_array_equal(found, np.concatenate(parts))
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((np.float16, BFLOAT16), np.float32),
        ((BFLOAT16, np.float16, np.float64), np.float64),
        ((BFLOAT16, np.float32), np.float32),
        ((np.float16, np.float16), np.float16),
    ],
)
def test_the_type_that_holds_others_exactly(kinds, expected):
    for order in (kinds, kinds[::-1]):
        assert find_common_dtype(np.dtype(kind) for kind in order) == expected


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_a_converted_folder_is_enough_to_export_from(layout, dirs, jax_dirs, request, tmp_path):
    """Training starts from a converted folder; its export needs no PyTorch checkpoint."""
    expected = request.getfixturevalue("original_state" if layout == "original" else "hf_state")
    config, params = (
        load_config(jax_dirs[layout], KIND),
        load_params(jax_dirs[layout], KIND, dtype="float32"),
    )
    assets = jax_dirs[layout]
    save_checkpoint(tmp_path / "out", KIND, config, params, layout=layout, assets_from=assets)
    found = read_state(tmp_path / "out")
    carried = carried_state() if layout == "original" else {}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        kept = value.dtype if key in carried else np.dtype(np.float32)
        assert found[key].dtype == kept
        np.testing.assert_array_equal(found[key], value.astype(kept))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (dirs[layout] / name).read_bytes()


def test_a_saved_config_states_the_type_that_was_written(dirs, tmp_path):
    config, params = (
        load_config(dirs["original"], KIND),
        load_params(dirs["original"], KIND, dtype="float32"),
    )
    save_checkpoint(
        tmp_path / "out", KIND, config, params, layout="original", assets_from=dirs["original"]
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "float32"
    assert written["language_config"]["torch_dtype"] == "float32"


def test_trained_sizes_other_than_the_assets_get_their_own_config(dirs, tmp_path):
    """A config.json is copied only while it means the same model."""
    import dataclasses

    config = load_config(dirs["transformers"], KIND)
    params = load_params(dirs["transformers"], KIND, dtype="float32")
    half = {**params, "language_model": dict(params["language_model"])}
    half["language_model"]["layers"] = _first_layers(params["language_model"]["layers"], 2)
    smaller = dataclasses.replace(config, llama=dataclasses.replace(config.llama, num_layers=2))
    save_checkpoint(
        tmp_path / "out",
        KIND,
        smaller,
        half,
        layout="transformers",
        assets_from=dirs["transformers"],
    )
    assert load_config(tmp_path / "out", KIND) == smaller
    load_params(tmp_path / "out", KIND)


def _first_layers(tree, count):
    return {
        k: _first_layers(v, count) if isinstance(v, dict) else v[:count] for k, v in tree.items()
    }


def test_shards_have_an_index_and_metadata(dirs, tmp_path):
    convert(dirs["original"], tmp_path / "out", KIND, layout="transformers", max_shard_bytes=10**6)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    state = read_state(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in state.values())
    assert index["weight_map"].keys() == state.keys()
    for name in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / name, framework="np") as stream:
            assert stream.metadata() == {"format": "pt"}
            assert set(stream.keys()) == {k for k, v in index["weight_map"].items() if v == name}


def test_dtype_converts_floats_and_says_so_in_the_config(dirs, tmp_path):
    convert(dirs["original"], tmp_path / "out", KIND, layout="original", dtype="float32")
    assert {v.dtype for v in read_state(tmp_path / "out").values()} == {np.dtype(np.float32)}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "float32"


def test_transformers_config_is_always_declared_untied(dirs, tmp_path, hf_state):
    source = write_checkpoint(tmp_path / "hf", hf_state, "transformers")
    config = json.loads((source / "config.json").read_text())
    del config["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", KIND, layout="transformers")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


def test_a_synthesised_original_config_has_no_nulls(dirs, tmp_path):
    convert(dirs["transformers"], tmp_path / "out", KIND, layout="original")
    text = (tmp_path / "out" / "config.json").read_text()
    assert "null" not in text
    assert load_config(tmp_path / "out", KIND) == load_config(dirs["transformers"], KIND)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"special_tokens_map.json", "preprocessor_config.json"} <= names


def test_output_appears_whole_or_not_at_all(dirs, tmp_path, monkeypatch):
    from corl_jax.weights import shards

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "read_header", fail)
    with pytest.raises(InputError, match="No space left"):
        convert(dirs["original"], tmp_path / "out", KIND, layout="jax")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_unless_overwrite(dirs, tmp_path):
    out = tmp_path / "out"
    convert(dirs["original"], out, KIND, layout="jax")
    with pytest.raises(InputError, match="holds files"):
        convert(dirs["original"], out, KIND, layout="jax")
    (out / "stale").touch()
    convert(dirs["original"], out, KIND, layout="jax", overwrite=True)
    assert not (out / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_params_that_do_not_fit_are_all_listed(dirs, tmp_path):
    config, params = load_config(dirs["original"], KIND), load_params(dirs["original"], KIND)
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].T
    params["extra"] = {"kernel": np.zeros(3)}
    del params["generation_embeddings"]
    with pytest.raises(InputError) as caught:
        save_checkpoint(tmp_path / "out", KIND, config, params, layout="jax")
    assert len(caught.value.problems) == 3
    assert not (tmp_path / "out").exists()


def test_without_assets_only_transformers_needs_a_tokenizer(dirs, tmp_path):
    config, params = load_config(dirs["original"], KIND), load_params(dirs["original"], KIND)
    notes = save_checkpoint(tmp_path / "jax", KIND, config, params, layout="jax")
    assert "tokenizer.json" in notes[0]
    assert load_config(tmp_path / "jax", KIND) == config
    with pytest.raises(InputError, match="needs the tokenizer's ids"):
        save_checkpoint(tmp_path / "hf", KIND, config, params, layout="transformers")


def with_post_processor(folder, post):
    data = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": post}
    (folder / "tokenizer.json").write_text(json.dumps(data))


FIRST = {"Sequence": {"id": "A", "type_id": 0}}
SECOND = {"Sequence": {"id": "B", "type_id": 1}}
PLAIN = {
    "type": "TemplateProcessing", "single": [FIRST], "pair": [FIRST, SECOND], "special_tokens": {},
}  # fmt: skip
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("form", ["none", "bytes", "template", "sequence"])
def test_a_tokenizer_gets_bos_once_whatever_its_template(tmp_path, hf_state, form, ends):
    from tokenizers import Tokenizer

    source = write_checkpoint(tmp_path / "source", to_original(hf_state), "original")
    special, template = special_tokens(source), PLAIN
    if ends:
        eos = STRINGS["eos"]
        end = {"SpecialToken": {"id": eos, "type_id": 0}}
        known = {eos: {"id": eos, "ids": [special.eos], "tokens": [eos]}}
        template = PLAIN | {
            "single": [FIRST, end], "pair": [FIRST, SECOND, end], "special_tokens": known,
        }  # fmt: skip
    sequence = {"type": "Sequence", "processors": [BYTES, template]}
    posts = {"none": None, "bytes": BYTES, "template": template, "sequence": sequence}
    with_post_processor(source, posts[form])
    convert(source, tmp_path / "out", KIND, layout="transformers")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    plain = [tokenizer.token_to_id(letter) for letter in "ab"]
    tail = [special.eos] if ends and form in ("template", "sequence") else []
    assert tokenizer.encode("ab").ids == [special.bos, *plain, *tail]
    assert tokenizer.encode("a", "b").ids == [special.bos, *plain, *tail]

    # What has BOS already stays as it is.
    again = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert add_bos(again, tmp_path / "out") is again


def test_a_tied_checkpoint_is_told_how_to_untie(tmp_path, hf_state):
    state = {key: value for key, value in hf_state.items() if key != "lm_head.weight"}
    folder = write_checkpoint(tmp_path / "tied", state, "transformers")
    data = json.loads((folder / "config.json").read_text())
    for value in (True, None, False):
        data["tie_word_embeddings"] = value
        if value is None:  # the class's default is true
            del data["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(data))
        with pytest.raises(InputError, match=r"lm_head\.weight is missing") as caught:
            load_params(folder, KIND)
        (problem,) = caught.value.problems
        assert ("this checkpoint is tied (tie_word_embeddings)" in problem) == (value is not False)
