"""config.json of every layout: presets, defaults, overrides and refusals."""

from __future__ import annotations

import copy
import json

import pytest

from corl_jax.errors import InputError
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.checkpoint import original as original_layout
from corl_jax.policies.janus.checkpoint import transformers as transformers_layout
from corl_jax.policies.janus.network import PRESETS
from corl_jax.policies.janus.tokens import special_tokens
from corl_jax.train import export
from corl_jax.weights.checkpoint import detect_layout, load_config
from corl_jax.weights.hub import resolve_model_dir
from corl_jax.weights.own_config import make_own_config
from tests.support.weight_files import hf_config_dict, original_config_dict, write_tokenizer


def released_original(width: int, layers: int, language: dict) -> dict:
    """What the released files state, and no more."""
    projector = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    return {
        "model_type": "multi_modality",
        "aligner_config": {"cls": "MlpProjector", "params": {**projector, "input_dim": 1024}},
        "gen_aligner_config": {"cls": "MlpProjector", "params": {**projector, "input_dim": 8}},
        "gen_head_config": {
            "cls": "vision_head",
            "params": {"image_token_embed": width, "image_token_size": 16384, "n_embed": width},
        },
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        "language_config": {
            "model_type": "llama",
            "max_position_embeddings": 16384,
            "num_hidden_layers": layers,
            "vocab_size": 102400,
            **language,
        },
        "vision_config": {
            "cls": "CLIPVisionTower",
            "params": {
                "image_size": 384,
                "model_name": "siglip_large_patch16_384",
                "select_feature": "same",
                "select_layer": -1,
            },
        },
    }


SIZES_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


@pytest.fixture
def folder(tmp_path):
    return lambda data: (tmp_path / "config.json").write_text(json.dumps(data)) and tmp_path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("janus-1.3b", released_original(2048, 24, SIZES_1B)),
        ("janus-pro-1b", released_original(2048, 24, SIZES_1B)),
        ("janus-pro-7b", released_original(4096, 30, {})),  # the rest are LlamaConfig's defaults
    ],
)
def test_released_original_configs_are_the_presets(folder, name, data):
    assert load_config(folder(data), KIND) == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_written_original_config_reads_back(folder, name):
    data = original_layout.write(PRESETS[name], "bfloat16")
    assert load_config(folder(data), KIND) == PRESETS[name]
    assert "width" not in data["vision_config"]["params"]  # presets stay named, not spelt out


@pytest.mark.parametrize("name", PRESETS)
def test_a_written_transformers_config_reads_back(folder, name, tmp_path):
    write_tokenizer(tmp_path, "original")
    data = transformers_layout.write(PRESETS[name], "bfloat16", special_tokens(tmp_path))
    assert load_config(folder(data), KIND) == PRESETS[name]
    assert data["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", PRESETS)
def test_a_written_jax_config_reads_back(tmp_path, name):
    (tmp_path / "config.json").write_text(
        json.dumps(make_own_config(KIND, PRESETS[name], "original", {}))
    )
    assert load_config(tmp_path, KIND) == PRESETS[name]


def test_the_config_of_transformers_own_class_reads_back(tmp_path):
    from transformers import JanusConfig

    JanusConfig.from_dict(hf_config_dict()).save_pretrained(tmp_path)
    config = load_config(tmp_path, KIND)
    assert config.llama.rope_theta == 5000.0
    assert (config.llama.num_kv_heads, config.llama.head_dim) == (2, 8)
    assert config.siglip.intermediate_size == 100
    assert config.vq.channel_multiplier == (1, 1, 2, 3)


@pytest.mark.parametrize("where", ["rope_parameters", "rope_theta", "rope_scaling"])
def test_rope_theta_is_found_wherever_it_stands(folder, where):
    data = hf_config_dict()
    del data["text_config"]["rope_parameters"]
    data["text_config"] |= {
        "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        "rope_theta": {"rope_theta": 7.0, "rope_scaling": None},
        "rope_scaling": {"rope_theta": 7.0, "rope_scaling": {"type": "default"}},
    }[where]
    assert load_config(folder(data), KIND).llama.rope_theta == 7.0


def test_head_dim_and_key_value_heads_are_respected(folder):
    data = hf_config_dict()
    data["text_config"] |= {"head_dim": 16, "num_key_value_heads": 3}
    llama = load_config(folder(data), KIND).llama
    assert (llama.head_dim, llama.num_kv_heads) == (16, 3)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("language_config", {"hidden_size": -4}, "hidden_size is -4, expected a whole number"),
        ("language_config", {"hidden_size": "48"}, "hidden_size is '48'"),
        ("language_config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("language_config", {"num_attention_heads": True}, "num_attention_heads is True"),
        ("language_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ("language_config", {"rope_scaling": {"type": "yarn"}}, "scaled RoPE"),
        ("language_config", {"num_key_value_heads": 4}, "not a multiple of key-value heads 4"),
        ("language_config", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("vision_config", {"params": {"model_name": "clip"}}, "model_name is 'clip'"),
        ("gen_vision_config", {"cls": "VQ-8"}, "cls is 'VQ-8'"),
        ("gen_vision_config", {"params": []}, "params is \\[\\], expected an object"),
        ("aligner_config", {"params": {"input_dim": 41}}, "input_dim is 41, expected 40"),
    ],
)
def test_a_bad_field_is_named(folder, section, change, message):
    data = original_config_dict()
    data[section] = {**data[section], **change}
    with pytest.raises(InputError, match=message):
        load_config(folder(data), KIND)


def test_all_bad_fields_are_reported_together(folder):
    data = copy.deepcopy(hf_config_dict())
    data["text_config"]["vocab_size"] = 0
    data["vision_config"] |= {"hidden_act": "relu", "num_image_tokens": 7}
    data["vq_config"]["projection_dim"] = 5
    with pytest.raises(InputError) as caught:
        load_config(folder(data), KIND)
    assert len(caught.value.problems) == 4


def test_an_unknown_tower_with_all_sizes_stated_is_accepted(folder):
    data = original_config_dict()
    data["vision_config"]["params"]["model_name"] = "my_tower"
    assert load_config(folder(data), KIND).siglip.hidden_size == 40
    del data["vision_config"]["params"]["heads"]
    with pytest.raises(InputError, match="heads are not"):
        load_config(folder(data), KIND)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ('{"model_type": "llama"}', "model_type is 'llama', expected one of"),
        ('{"model_type": ["janus"]}', "model_type is"),
        ('{"model_type": "corl_jax", "format_version": 9}', "format_version is 9"),
        ('{"model_type": "corl_jax", "format_version": 1}', "janus is None"),
        ("[" * 100000, "not valid JSON"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path, KIND)


def test_a_jax_config_with_odd_fields_is_refused(tmp_path):
    data = make_own_config(KIND, PRESETS["janus-pro-1b"], "original", {})
    data["janus"]["llama"]["hidden_size"] = "2048"
    del data["janus"]["vq"]["embed_dim"]
    data["janus"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        load_config(tmp_path, KIND)
    assert len(caught.value.problems) == 3


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: not found"):
        detect_layout(tmp_path, KIND)


def test_a_path_resolves_to_itself_and_rubbish_is_refused(tmp_path):
    assert resolve_model_dir(tmp_path) == tmp_path
    with pytest.raises(InputError, match="no such directory, and not a hub id"):
        resolve_model_dir(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        resolve_model_dir(tmp_path / "file")


def test_an_unreachable_hub_says_how_to_fetch_the_model(monkeypatch):
    import huggingface_hub

    def offline(*_args, **_kwargs):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"hf download owner/name --local-dir DIR"):
        resolve_model_dir("owner/name")


def test_a_hub_id_without_safetensors_falls_back_to_bin(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(_id, allow_patterns, revision):
        asked.append(allow_patterns[-1])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model_dir("owner/name") == tmp_path
    assert asked == ["*.safetensors", "*.bin"]


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "0123abc", "fix-2+1"])
def test_a_revision_of_a_hub_id_is_downloaded(monkeypatch, tmp_path, revision):
    import huggingface_hub

    asked = []

    def download(hub_id, **options):
        asked.append((hub_id, options.get("revision")))
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model_dir(f"owner/name@{revision}") == tmp_path
    assert asked == [("owner/name", revision)]


def test_an_adapter_names_its_base_as_peft_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    assert export._find_base("owner/name@v1", tmp_path / "cache") == ("owner/name", "v1")
    assert export._find_base("owner/name", tmp_path / "cache") == ("owner/name", None)
    assert export._find_base("$SCRATCH/m@1", tmp_path / "m@1") == (str(tmp_path / "m@1"), None)


def test_an_unreachable_revision_says_how_to_fetch_it(monkeypatch):
    import huggingface_hub

    def offline(*_args, **_kwargs):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="hf download owner/name --revision v2 --local-dir DIR"):
        resolve_model_dir("owner/name@v2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("owner/name@", "its revision is ''"),
        ("owner/name@a b", "its revision is 'a b'"),
        ("owner/name@../x", "its revision is"),
        ("owner/name@a..b", "its revision is"),
        ("owner/name@-b", "its revision is"),
        ("owner/name@v1@v2", "its revision is"),
        ("owner/name@v1\n", "its revision is"),
        ("name@v1", "owner/name@revision"),
        ("a/b/c@v1", "owner/name@revision"),
    ],
)
def test_a_malformed_revision_is_refused_before_any_download(monkeypatch, text, message):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(InputError, match=message):
        resolve_model_dir(text)


def test_a_folder_that_looks_like_a_revision_is_a_folder(monkeypatch, tmp_path):
    (tmp_path / "owner" / "name@v1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(resolve_model_dir("owner/name@v1")) == "owner/name@v1"


def test_home_and_variables_in_a_models_path_are_expanded(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    for text in ("~/model", "$SCRATCH/model", "${SCRATCH}/model"):
        assert resolve_model_dir(text) == tmp_path / "model"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(InputError, match=r"\$SCRATCH is not set"):
        resolve_model_dir("$SCRATCH/model")


def test_special_tokens_are_looked_up_by_string(tmp_path):
    write_tokenizer(tmp_path, "original")
    tokens = special_tokens(tmp_path)
    assert (tokens.bos, tokens.eos, tokens.pad, tokens.boi) == (256, 257, 258, 259)
    text = (tmp_path / "tokenizer.json").read_text().replace("<begin_of_image>", "<other>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="has no token '<begin_of_image>'"):
        special_tokens(tmp_path)
