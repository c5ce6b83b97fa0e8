"""Reward networks: their folders, converting them, where they live, and who may be the scorer."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from corl_jax.config.schema import Networks, RewardNetwork
from corl_jax.convert.__main__ import run as convert
from corl_jax.devices.mesh import make_mesh, network_shardings
from corl_jax.errors import InputError
from corl_jax.models.aesthetic import AestheticConfig
from corl_jax.params import flatten
from corl_jax.policies.janus.family import FAMILY
from corl_jax.rewards import networks, registry
from corl_jax.rewards.samples import Context, FrozenNetwork, Network
from corl_jax.types import Params
from corl_jax.weights.checkpoint import open_checkpoint
from corl_jax.weights.kinds import NETWORK_TYPE
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.recognise import recognise_kind
from tests.support.tiny_networks import TINY, load_network, network_dir, random_network

KINDS_HERE = sorted(TINY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    return {kind: network_dir(root / kind, kind) for kind in KINDS_HERE}


def as_torch(kind: str, folder, layout: str | None = None):
    """The random network in one of its foreign layouts, written through the table."""
    table = KINDS[kind].tables[layout or next(iter(KINDS[kind].tables))]
    flat = flatten(random_network(kind))
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    state: dict[str, list] = {}
    for slot in table.make_slots(shapes):
        leaf = flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer]
        state.setdefault(slot.key, []).append((slot.part, slot.transform.to_torch(leaf)))
    folder.mkdir()
    save_file(
        {key: np.ascontiguousarray(np.concatenate([x for _, x in sorted(parts, key=lambda p: p[0])])
                                   if len(parts) > 1 else parts[0][1])
         for key, parts in state.items()},
        folder / "model.safetensors",
    )  # fmt: skip
    return folder


# ---- folders


def test_a_network_whose_layers_differ_in_type_loads_and_converts_exactly(tmp_path):
    source, sizes = as_torch("bert", tmp_path / "source"), TINY["bert"]
    kinds = (np.float16, jnp.bfloat16, np.float32)
    state = load_file(source / "model.safetensors")
    mixed = {key: state[key].astype(kinds[i % 3]) for i, key in enumerate(sorted(state))}
    save_file(mixed, source / "model.safetensors")
    config = {
        "model_type": "bert", "vocab_size": sizes.vocab_size, "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size, "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "max_position_embeddings": sizes.max_position_embeddings,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    _, expected = load_network(source, "bert")
    assert convert(["to-jax", str(source), str(tmp_path / "jax")]) == 0
    _, found = load_network(tmp_path / "jax", "bert")
    flat = flatten(found)
    for path, leaf in flatten(expected).items():
        assert flat[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(flat[path], leaf)
    kernel = flat["layers/attn/q_proj/kernel"]
    name = "bert.encoder.layer.{}.attention.self.query.weight"
    assert mixed[name.format(0)].dtype != mixed[name.format(1)].dtype
    for layer in range(sizes.num_layers):
        np.testing.assert_array_equal(kernel[layer], mixed[name.format(layer)].astype(np.float32).T)


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_converted_folder_is_read_back(folders, kind):
    assert recognise_kind(folders[kind], KINDS.values()) is KINDS[kind]
    config, params = load_network(folders[kind], kind)
    assert config == TINY[kind]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, random_network(kind)))
    with open_checkpoint(folders[kind], KINDS[kind]) as opened:
        assert opened.layout == "jax"
        assert opened.parameters == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("layout", sorted(KINDS["vgg"].tables))
def test_a_foreign_folder_converts_to_the_same_numbers(tmp_path, layout, capsys):
    source = as_torch("vgg", tmp_path / "source", layout)
    assert convert(["to-jax", str(source), str(tmp_path / "out"), "--model", "vgg"]) == 0
    assert f"layout {layout}" in capsys.readouterr().out
    config, params = load_network(tmp_path / "out", "vgg")
    assert config == TINY["vgg"]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, random_network("vgg")))
    assert recognise_kind(tmp_path / "out", KINDS.values()) is KINDS["vgg"]
    assert convert(["inspect", str(tmp_path / "out")]) == 0
    assert f"network     vgg, layout jax, made from {layout}" in capsys.readouterr().out
    assert convert(["verify", str(tmp_path / "out"), str(source)]) == 0
    assert "31 tensors compared: equal" in capsys.readouterr().out


def test_converting_again_as_another_type(folders, tmp_path):
    out = tmp_path / "half"
    assert convert(["to-jax", str(folders["blip"]), str(out), "--dtype", "bfloat16"]) == 0
    config, params = load_network(out, "blip")
    assert config == TINY["blip"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    copied = {file.name for file in out.iterdir()}
    assert copied == {"config.json", "model.safetensors", "vocab.txt", "preprocessor_config.json"}
    _, wide = load_network(out, "blip", np.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}


@pytest.mark.parametrize(
    ("kind", "lost", "expected"),
    [
        ("bert", ["vocab.txt"], ["expected tokenizer.json or vocab.txt", "t2i_bid_cycle_reward",
                                 "networks.bert, networks.sentence"]),
        ("blip", ["vocab.txt", "preprocessor_config.json"], ["vocab.txt of the captioner",
                                                             "preprocessor_config.json"]),
        ("clip", [], ["vocab.json and merges.txt", "t2i_clip_reward, pickscore, hpsv2 "]),
        ("vgg", [], []),
    ],
)  # fmt: skip
def test_converting_says_what_rewards_would_lack(folders, tmp_path, capsys, kind, lost, expected):
    source, out = shutil.copytree(folders[kind], tmp_path / "source"), tmp_path / "out"
    if lost:
        assert convert(["to-jax", str(source), str(tmp_path / "whole"), "--model", kind]) == 0
        assert "note:" not in capsys.readouterr().out
    for name in lost:
        (source / name).unlink()
    assert convert(["to-jax", str(source), str(out), "--model", kind]) == 0
    printed = capsys.readouterr().out
    notes = [line for line in printed.splitlines() if line.startswith(f"note: {out}")]
    assert len(notes) == (len(lost) or bool(expected)) and f"wrote {out}" in printed
    assert all(text in printed for text in expected), printed


def test_what_is_wrong_with_a_folder_is_listed(folders, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folders["bert"], broken)
    state = load_file(broken / "model.safetensors")
    state["extra"] = state.pop("embeddings/layernorm/bias")
    state["embeddings/layernorm/scale"] = np.zeros(3, np.float32)
    save_file(state, broken / "model.safetensors")
    with pytest.raises(InputError) as error:
        load_network(broken, "bert")
    assert len(error.value.problems) == 3
    for text in ("extra is unknown", "embeddings/layernorm/bias is missing", "scale has shape [3]"):
        assert any(text in problem for problem in error.value.problems), text
    with pytest.raises(InputError, match="holds a bert network, expected blip"):
        open_checkpoint(folders["bert"], KINDS["blip"])
    with pytest.raises(InputError, match="no weights found"):
        open_checkpoint(tmp_path, KINDS["vgg"])
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"format_version": 0}))
    with pytest.raises(InputError, match="format_version is 0, expected 1"):
        open_checkpoint(broken, KINDS["bert"])
    (broken / "config.json").write_text(json.dumps(config | {"sizes": {"num_layers": "two"}}))
    with pytest.raises(InputError, match=r"sizes\.num_layers is 'two'"):
        open_checkpoint(broken, KINDS["bert"])


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("bert", "num_heads", 3),
        ("bert", "max_position_embeddings", 2),
        ("bert", "num_layers", 10_001),
        ("bert", "vocab_size", 10**12),
        ("bert", "layer_norm_eps", float("inf")),
        ("blip", "vision.num_heads", 5),
        ("blip", "vision.image_size", 18),
        ("blip", "text.num_heads", 3),
        ("blip", "text.bos_token_id", 10_000),
        ("blip", "text.sep_token_id", -1),
        ("clip", "vision.num_heads", 5),
        ("clip", "text.num_heads", 3),
        ("clip", "vision.activation", "relu"),
        ("clip", "image_size", 18),
        ("clip", "eos_token_id", 40),
        ("clip", "context_length", 2),
        ("clip", "image_mean", [0.5, 0.5]),
        ("clip", "image_mean", [0.5, "0.5", 0.5]),
        ("clip", "image_std", [0.5, 0, 0.5]),
        ("vgg", "channels", [4, 4, 4]),
        ("vgg", "channels", [4, 4, 4, 4, "4"]),
        ("vgg", "channels", []),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_named(folders, tmp_path, kind, key, value):
    """Most of them no tensor's shape contradicts: they would fail on the device, or not at all."""
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    config = json.loads((folder / "config.json").read_text())
    section = config["sizes"]
    *path, name = key.split(".")
    for part in path:
        section = section[part]
    section[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        open_checkpoint(folder, KINDS[kind])
    (problem,) = error.value.problems
    assert problem.startswith(f"{folder / 'config.json'}: {'.'.join(['sizes', *path])}.")
    assert name in problem and "expected" in problem


@pytest.mark.parametrize("sizes", [[8, 4, 1], [8, 4, 3, 3, 2, 2], [8, 4, 3, 2, 2, 0]])
def test_a_rating_head_has_its_layers_and_one_score(tmp_path, sizes):
    usual = {"sizes": [8, 4, 3, 2, 2, 1]}
    shapes = KINDS["aesthetic"].shapes(AestheticConfig(tuple(usual["sizes"])))
    save_file({path: np.zeros(shape, np.float32) for path, shape in shapes.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    config = {"model_type": NETWORK_TYPE, "format_version": 1, "network": "aesthetic"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"sizes": usual}))
    open_checkpoint(tmp_path, KINDS["aesthetic"]).close()
    (tmp_path / "config.json").write_text(json.dumps(config | {"sizes": {"sizes": sizes}}))
    with pytest.raises(InputError, match=r"config\.json: sizes\.sizes .* expected"):
        open_checkpoint(tmp_path, KINDS["aesthetic"])


def test_a_kind_must_be_said_where_no_config_tells_it(tmp_path, capsys):
    source = as_torch("vgg", tmp_path / "source")
    with pytest.raises(SystemExit) as error:
        convert(["to-jax", str(source), str(tmp_path / "out")])
    assert error.value.code == 2 and "give --model bert or blip" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- what the rewards ask


def resolved(**options):
    name = options.pop("name", "t2i_bid_cycle_reward")
    return registry.bind_reward(name, options)


def test_only_what_the_options_ask_is_looked_for(folders):
    paper = resolved(caption="blip", text_term="bertscore", image_term="lpips")
    assert paper.networks == ("blip", "bert", "lpips") and paper.scorers == ()
    plain = resolved()
    assert plain.networks == () and plain.scorers == ("policy",)
    settings = Networks(
        blip=RewardNetwork(path=str(folders["blip"]), dtype="bfloat16"),
        bert=RewardNetwork(path=str(folders["bert"])),
        lpips=RewardNetwork(path=str(folders["vgg"])),
    )
    found = networks.check_networks([paper, plain], settings, "float32")
    assert [(one.name, one.dtype) for one in found] == [
        ("blip", "bfloat16"), ("bert", "float32"), ("lpips", "float32")
    ]  # fmt: skip
    assert found[0].nbytes == 2 * found[0].parameters
    assert {one.rewards for one in found} == {("t2i_bid_cycle_reward",)}
    assert networks.check_networks([plain], Networks(), "float32") == []


def test_missing_networks_say_what_is_expected_where(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    paper = resolved(caption="policy", text_term="sentence", image_term="lpips")
    settings = Networks(sentence=RewardNetwork(path=str(tmp_path / "nowhere")))
    with pytest.raises(InputError) as error:
        networks.check_networks([paper], settings, "float32")
    sentence, lpips = error.value.problems
    assert "networks.sentence" in sentence and "nowhere: no such directory" in sentence
    assert "14,716,160 parameters as published" in lpips
    assert "hf download timm/vgg16.tv_in1k" in lpips and "timm or torchvision" in lpips
    assert "to-jax FOLDER DST --model vgg" in lpips and "t2i_bid_cycle_reward" in lpips


def test_settings_that_nothing_asks_are_warnings(folders):
    idle = Networks(clip=RewardNetwork(path=str(folders["clip"])))
    assert networks.check_networks([resolved()], idle, "float32") == []
    (line,) = networks.find_unused_settings([resolved()], idle)
    assert line.startswith("networks.clip: has no effect; no listed reward asks it")
    (line,) = networks.find_unused_settings([resolved()], Networks(offload=True))
    assert line.startswith("networks.offload: True has no effect")
    frozen = [resolved(scorer="initial")]
    assert networks.find_unused_settings(frozen, Networks(offload=True)) == []


@pytest.mark.parametrize("scorer", ["", "  "])
def test_an_empty_path_is_no_path(folders, scorer):
    with pytest.raises(InputError, match=r"t2i_ti_sim: option scorer: found .*expected policy, "):
        resolved(name="t2i_ti_sim", scorer=scorer)
    paper = resolved(caption="blip", text_term="jaccard", image_term="ssim")
    with pytest.raises(InputError, match=r"networks\.blip.*: is empty, expected a path"):
        networks.check_networks([paper], Networks(blip=RewardNetwork(path=scorer)), "float32")


def test_options_that_idle_beside_others_are_refused():
    for options, expected in (
        ({"caption": "blip", "scorer": "initial"}, "option scorer: found 'initial'"),
        ({"caption": "blip", "caption_greedy": False}, "option caption_greedy: found False"),
        ({"bert_layer": 3}, "option bert_layer: found 3"),
    ):
        with pytest.raises(InputError, match=expected):
            resolved(**options)


@pytest.mark.parametrize(
    ("name", "missing", "options", "expected"),
    [
        ("bert", "vocab.txt", {"text_term": "bertscore"}, "networks.bert: "),
        ("blip", "vocab.txt", {"caption": "blip"}, "networks.blip: "),
        ("blip", "preprocessor_config.json", {"caption": "blip"}, "preprocessor_config.json"),
        ("bert", None, {"text_term": "bertscore", "bert_layer": 9}, "bert_layer: found 9"),
        ("blip", None, {"caption": "blip", "max_new_tokens": 65}, "max_new_tokens: found 65"),
    ],
)
def test_what_would_fail_in_the_first_step_is_found_before(
    folders, tmp_path, name, missing, options, expected
):
    folder = tmp_path / name
    shutil.copytree(folders[name], folder)
    settings = Networks(**{name: RewardNetwork(path=str(folder))})
    if missing:
        whole = Networks(**{name: RewardNetwork(path=str(folders[name]))})
        assert len(networks.check_networks([resolved(**options)], whole, "float32")) == 1
        (folder / missing).unlink()
    with pytest.raises(InputError) as error:
        networks.check_networks([resolved(**options)], settings, "float32")
    assert any(expected in problem for problem in error.value.problems)


def test_a_tokenizer_of_another_network_is_refused(folders, tmp_path):
    for name, options in (("bert", {"text_term": "bertscore"}), ("blip", {"caption": "blip"})):
        folder = tmp_path / name
        shutil.copytree(folders[name], folder)
        with (folder / "vocab.txt").open("a") as words:
            words.write("\n" + "\n".join(f"word{i}" for i in range(50)))
        settings = Networks(**{name: RewardNetwork(path=str(folder))})
        with pytest.raises(InputError, match=rf"networks\.{name}"):
            networks.check_networks([resolved(**options)], settings, "float32")


# ---- where they live


def everywhere(devices: int = 1):
    mesh = make_mesh(devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec())


@pytest.mark.parametrize("devices", [1, 4])
def test_offloaded_parameters_take_the_device_only_while_used(folders, devices):
    params: Params = random_network("bert")
    frozen = FrozenNetwork(
        Network(TINY["bert"], params, folders["bert"], jnp.float32),
        everywhere(devices),
        offload=True,
    )
    (rested,) = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(frozen._offloadable._params)}
    assert rested.endswith("host")
    with frozen.use() as network:
        leaves = jax.tree.leaves(network.params)
        assert {len(leaf.sharding.device_set) for leaf in leaves} == {devices}
        assert jax.tree.all(jax.tree.map(np.array_equal, network.params, params))
    assert all(leaf.is_deleted() for leaf in leaves)
    with frozen.use() as network:
        assert jax.tree.all(jax.tree.map(np.array_equal, network.params, params))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", ["clip", "blip"])
def test_a_loaded_network_is_split_over_the_mesh(folders, mesh, kind, offload):
    found = networks.CheckedNetwork(kind, folders[kind], 0, "bfloat16", ())
    frozen = networks.load_frozen_network(found, mesh, offload)
    _, expected = load_network(folders[kind], kind, jnp.bfloat16)
    with frozen.use() as network:
        wanted = network_shardings(network.params, mesh, KINDS[kind].rules)
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, network.params, wanted)), (
            "not where the table says"
        )
        kernel = network.params["vision_model"]["layers"]["mlp"]["fc1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4
        assert jax.tree.all(jax.tree.map(np.array_equal, network.params, expected))
    assert kernel.is_deleted() == offload


def test_resident_parameters_stay(folders):
    frozen = FrozenNetwork(
        Network(TINY["bert"], random_network("bert"), folders["bert"], jnp.float32),
        SingleDeviceSharding(jax.devices()[0]),
    )
    with frozen.use() as first:
        pass
    with frozen.use() as second:
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, first.params, second.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))


def test_a_network_that_was_not_loaded_is_named():
    context = Context(None, None, None, None, None, 0, 0)
    with pytest.raises(InputError, match="the network blip is not loaded"):
        context.network("blip")
    with pytest.raises(InputError, match="found no model"):
        context.scorer("policy")


def test_the_scorer_is_whom_the_option_names():
    policy = SimpleNamespace()
    named = Network("its config", {}, None, None)
    frozen = FrozenNetwork(named, SingleDeviceSharding(jax.devices()[0]))
    context = Context(
        FAMILY, policy, {"x": 1}, policy, None, 0, 0, {"initial": frozen, "dir": frozen}
    )
    with context.scorer("policy") as scorer:
        assert scorer.config is policy
    for name in ("initial", "dir"):
        with context.scorer(name) as scorer:
            assert scorer.config == "its config"
