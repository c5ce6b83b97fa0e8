"""Folders that hold two sets of weights, an adapter, Git LFS pointers, or marked text."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from corl_jax.convert.__main__ import run
from corl_jax.errors import InputError
from corl_jax.plan.command import find_sizes
from corl_jax.policies import inspect_policy
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.rewards import networks
from corl_jax.weights import selection
from corl_jax.weights.checkpoint import load_params, open_checkpoint
from corl_jax.weights.export import convert
from corl_jax.weights.folders import SMALL_FILES
from corl_jax.weights.hub import resolve_model_dir
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.storage import open_any_store, open_store
from tests.support.tiny_networks import load_network, network_dir
from tests.support.weight_files import hf_shapes, random_state, read_state, write_checkpoint

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 7654321\n"
MARK = b"\xef\xbb\xbf"
SAFE, BIN = "model.safetensors", "pytorch_model.bin"


@pytest.fixture(autouse=True)
def warnings_of_this_test():
    """Each folder is warned of once in a process; folders of tests have names of their own."""
    selection._warn_once.cache_clear()


@pytest.fixture(scope="module")
def state():
    return random_state(hf_shapes())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, state):
    return write_checkpoint(tmp_path_factory.mktemp("whole") / "model", state, "transformers")


@pytest.fixture
def folder(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def network(tmp_path):
    return network_dir(tmp_path / "bert", "bert")


def write_set(folder, name: str, value: float) -> None:
    """One of the four kinds of sets of weights, of one tensor `a` that holds `value`."""
    values, file = {"a": np.full(3, value, np.float32)}, folder / name
    if name.endswith(".index.json"):
        stem, suffix = name.removesuffix(".index.json").split(".")
        shard = f"{stem}-00001-of-00001.{suffix}"
        file.write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
        file = folder / shard
    if file.suffix == ".safetensors":
        save_file(values, file)
    else:
        import torch

        torch.save({key: torch.from_numpy(array) for key, array in values.items()}, file)


# ---- two sets of weights


@pytest.mark.parametrize("open_weights", [open_store, open_any_store])
def test_of_two_sets_the_one_of_transformers_is_read_and_both_are_named(
    tmp_path, capsys, open_weights
):
    names = (SAFE, f"{SAFE}.index.json", BIN, f"{BIN}.index.json")
    for first in range(4):
        for second in range(first + 1, 4):
            folder = tmp_path / f"{first}{second}"
            folder.mkdir()
            for value in (second, first):
                write_set(folder, names[value], value)
            store = open_weights(folder)
            assert store.read("a").tolist() == [first] * 3
            store.close()
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{names[first]} is read, as transformers does" in line
            assert names[second] in line


def test_transformers_takes_the_same_set(folder, state):
    """Guards the order that ours copies."""
    from transformers import JanusModel

    other = {key.removeprefix("model."): np.zeros_like(value) for key, value in state.items()}
    save_file(other, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (folder / f"{SAFE}.index.json").write_text(json.dumps(index))
    model = JanusModel.from_pretrained(folder)
    assert model.language_model.embed_tokens.weight.abs().sum() > 0


@pytest.mark.parametrize("layout", ["transformers", "jax"])
def test_an_older_sharded_save_is_not_what_is_loaded(folder, tmp_path, capsys, layout, state):
    if layout == "jax":
        folder, source = tmp_path / "jax", folder
        convert(source, folder, KIND, layout="jax")
    expected = read_state(folder)
    old = {key: np.zeros_like(value) for key, value in expected.items()}
    save_file(old, folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (folder / f"{SAFE}.index.json").write_text(json.dumps(index))
    params = load_params(folder, KIND)
    load_params(folder, KIND)
    assert np.any(params["language_model"]["embed_tokens"]["embedding"] != 0)
    (line,) = capsys.readouterr().err.splitlines()  # once, though the folder is opened often
    assert f"{SAFE} is read" in line and f"{SAFE}.index.json" in line


def test_a_reward_network_follows_the_same_order(network, capsys):
    _, expected = load_network(network, "bert")
    old = {key: np.zeros_like(value) for key, value in read_state(network).items()}
    save_file(old, network / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (network / f"{SAFE}.index.json").write_text(json.dumps(index))
    _, found = load_network(network, "bert")
    np.testing.assert_array_equal(
        found["embeddings"]["word_embeddings"]["embedding"],
        expected["embeddings"]["word_embeddings"]["embedding"],
    )
    assert f"{SAFE}.index.json" in capsys.readouterr().err


def test_under_other_names_safetensors_come_before_pytorchs_files(tmp_path, capsys):
    write_set(tmp_path, "open_clip_model.safetensors", 1)
    write_set(tmp_path, "open_clip_pytorch_model.bin", 2)
    store = open_any_store(tmp_path)
    assert store.read("a").tolist() == [1] * 3
    store.close()
    assert "open_clip_pytorch_model.bin" in capsys.readouterr().err


def test_what_trainers_leave_and_an_index_alone_are_no_second_set(tmp_path, capsys):
    write_set(tmp_path, SAFE, 1)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"state")
    (tmp_path / f"{BIN}.index.json").write_text("{}")
    open_any_store(tmp_path).close()
    assert not capsys.readouterr().err


def test_a_link_without_target_is_not_passed_over_for_an_older_set(tmp_path):
    write_set(tmp_path, f"{SAFE}.index.json", 1)
    (tmp_path / SAFE).symlink_to(tmp_path / "absent")
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        open_store(tmp_path)


def test_an_index_of_another_kind_is_refused(tmp_path):
    write_set(tmp_path, f"{BIN}.index.json", 1)
    (tmp_path / f"{BIN}.index.json").rename(tmp_path / f"{SAFE}.index.json")
    with pytest.raises(InputError, match=r"names pytorch_model-00001-of-00001.bin, expected \.saf"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (("a-00001-of-00002", "b-00002-of-00002"), "shards of 2 saves without an index: a-"),
        (("a-00001-of-00002", "a-00003-of-00003"), "shards of 2 saves without an index"),
        (("a-00001-of-00003", "a-00003-of-00003"), r"1 of 3 shards are missing \(a-00002-of-00003"),
    ],
)
def test_shards_without_an_index_are_of_one_whole_save(tmp_path, shards, message):
    for number, name in enumerate(shards):
        save_file({f"t{number}": np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=message):
        open_any_store(tmp_path)


# ---- adapters


def write_adapter(folder, base: object = "someone/model") -> None:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 4}
    (folder / "adapter_config.json").write_bytes(MARK + json.dumps(config).encode())
    save_file({"lora_A.weight": np.zeros(4, np.float32)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "use",
    [
        resolve_model_dir,
        inspect_policy,
        lambda place: load_params(place, KIND),
        lambda place: open_checkpoint(place, KINDS["bert"]),
        lambda place: open_checkpoint(place / "adapter_model.safetensors", KINDS["clip"]),
        lambda place: convert(place, place.parent / "out", KIND, layout="jax"),
        lambda place: find_sizes(str(place), None),
        lambda place: networks._find_weights("bert", str(place)),
    ],
)
def test_an_adapter_given_as_a_model_is_one_line(tmp_path, use):
    write_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"is an adapter of someone/model.*merge") as caught:
        use(tmp_path / "adapter")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "A"],
        ["inspect", "A", "--model=clip"],
        ["verify", "A", "A"],
        ["to-jax", "A", "OUT"],
        ["to-torch", "A", "OUT", "--format", "original"],
    ],
)
def test_commands_say_that_a_folder_is_an_adapter(tmp_path, capsys, arguments):
    write_adapter(tmp_path / "A")
    places = {"A": str(tmp_path / "A"), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as caught:
        run([places.get(argument, argument) for argument in arguments])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "is an adapter of someone/model" in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", [None, "", 7, "a\nb"])
def test_an_adapter_need_not_name_its_model(tmp_path, base):
    write_adapter(tmp_path / "adapter", base)
    with pytest.raises(InputError, match="is an adapter of a model that it does not name"):
        resolve_model_dir(tmp_path / "adapter")


def test_a_model_with_an_adapter_beside_it_is_refused_with_both_names(folder):
    write_adapter(folder)
    with pytest.raises(InputError, match=r"both a model \(model.safetensors\) and adapter_config"):
        inspect_policy(folder)


# ---- Git LFS pointers and byte order marks


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "preprocessor_config.json", SAFE]
)
@pytest.mark.parametrize("command", ["inspect", "verify", "to-jax", "load"])
def test_a_pointer_in_place_of_a_file_is_named(folder, tmp_path, capsys, name, command):
    (folder / name).write_text(POINTER)
    expected = f"{folder / name}: is a Git LFS pointer, not the file itself; run `git lfs pull`"
    if command == "load":
        with pytest.raises(InputError) as caught:
            inspect_policy(folder)
        lines = caught.value.problems
    else:
        other = {"verify": [str(folder)], "to-jax": [str(tmp_path / "out")]}.get(command, [])
        with pytest.raises(SystemExit) as stopped:
            run([command, str(folder), *other])
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert expected in lines[0]


def test_all_pointers_of_a_clone_are_listed_together(folder):
    names = ["tokenizer.json", "tokenizer_config.json", SAFE]
    for name in names:
        (folder / name).write_text(POINTER)
    with pytest.raises(InputError) as caught:
        load_params(folder, KIND)
    assert [name in line for name, line in zip(names, caught.value.problems, strict=True)] == [
        True, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("name", [BIN, "weights.pth", f"{BIN}.index.json", f"{SAFE}.index.json"])
def test_a_pointer_in_place_of_weights_is_named(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(InputError, match="is a Git LFS pointer"):
        open_any_store(tmp_path)


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer_config.json", "config.json", SAFE])
def test_a_pointer_in_a_reward_network_is_named(network, name):
    (network / name).write_text(POINTER)
    with pytest.raises(InputError, match=f"{name}: is a Git LFS pointer"):
        open_checkpoint(network, KINDS["bert"])


def test_files_with_byte_order_marks_are_read(folder, tmp_path, state):
    expected = inspect_policy(folder).processor
    for name in SMALL_FILES:
        if (folder / name).is_file():
            (folder / name).write_bytes(MARK + (folder / name).read_bytes())
    processor = inspect_policy(folder).processor
    assert processor.mm2t_ids("How many?") == expected.mm2t_ids("How many?")
    assert processor.decode([70, 71, 72]) == expected.decode([70, 71, 72])
    convert(folder, tmp_path / "jax", KIND, layout="jax")
    convert(tmp_path / "jax", tmp_path / "back", KIND, layout="transformers")
    for file in (tmp_path / "back").glob("*.json"):  # transformers could not read it with the mark
        assert json.loads(file.read_text()), file
    assert read_state(tmp_path / "back").keys() == state.keys()


def test_a_marked_index_is_read(tmp_path):
    write_set(tmp_path, f"{SAFE}.index.json", 1)
    index = tmp_path / f"{SAFE}.index.json"
    index.write_bytes(MARK + index.read_bytes())
    open_store(tmp_path).close()


def test_a_mark_does_not_become_part_of_a_networks_vocabulary(network, tmp_path):
    from corl_jax.rewards.similarity import load_tokenizer

    expected = load_tokenizer(network, 1000)
    marked = shutil.copytree(network, tmp_path / "marked")
    for name in SMALL_FILES:
        if (marked / name).is_file():
            (marked / name).write_bytes(MARK + (marked / name).read_bytes())
    tokenizer = load_tokenizer(marked, 1000)
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer("a red circle") == expected("a red circle")
    convert_args = ["to-jax", str(marked), str(tmp_path / "out"), "--model", "bert"]
    assert run(convert_args) == 0
    assert not (tmp_path / "out" / "config.json").read_bytes().startswith(MARK)
