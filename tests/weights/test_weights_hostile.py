"""Damaged and hostile checkpoints: refused with the file's name, never half-converted."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corl_jax.errors import InputError
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.weights import torch_bin
from corl_jax.weights.checkpoint import load_params
from corl_jax.weights.export import convert
from corl_jax.weights.storage import open_any_store, open_store, read_header
from tests.support.weight_files import (
    hf_config_dict,
    hf_shapes,
    random_state,
    to_original,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def state():
    return random_state(hf_shapes())


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, b"\0" * 7, "15|promises"),
        ({"a": entry()}, b"\0" * 9, "promises"),
        ({"a": entry(), "b": entry()}, b"\0" * 8, "overlap or leave a gap"),
        ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "overlap or leave a gap"),
        ({"a": entry(shape=(3,))}, b"\0" * 8, "needs 12 bytes, 8 are given"),
        ({"a": entry(shape=(-2,))}, b"\0" * 8, "malformed entry"),
        ({"a": entry(shape=(2.0,))}, b"\0" * 8, "malformed entry"),
        ({"a": entry(shape=(0, 2**62))}, b"\0" * 8, "malformed entry"),
        ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "malformed entry"),
        ({"a": entry(dtype="F12")}, b"\0" * 8, "dtype 'F12' is not supported"),
        ({"a": entry(dtype=["F32"])}, b"\0" * 8, "malformed entry"),
        ({"a": {"dtype": "F32"}}, b"\0" * 8, "malformed entry"),
        ({"a": 3}, b"", "malformed entry"),
        ([], b"", "not an object"),
        (b"{nonsense", b"", "header is not valid"),
        (b'{"a":1,"a":2}', b"", "names a key twice"),
        (b"\xff\xfe", b"", "header is not valid"),
        (b"[" * 200000, b"", "header is not valid"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header, data, message):
    file = header_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InputError, match=message) as caught:
        read_header(file)
    assert all(str(file) in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes that do not begin"),
        (b"\0" * 4, "do not begin with a safetensors header"),
        (struct.pack("<Q", 2**60) + b"{}", "do not begin with a safetensors header"),
        (b"PK\x03\x04 this is a zip archive", "do not begin with a safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    ],
)
def test_what_is_not_safetensors_is_named(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_store(tmp_path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_mutated_header_is_read_or_refused_cleanly(tmp_path, edits):
    file = header_file(
        tmp_path / "x.safetensors",
        {"a": entry(), "b": entry((2, 3), (8, 20), "BF16")},
        b"\0" * 20,
    )
    data = bytearray(file.read_bytes())
    for place, value in edits:
        data[place % len(data)] = value
    file.write_bytes(data)
    try:
        read_header(file)
    except InputError as error:
        assert error.problems


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..", "", "a\0b", "a/b.safetensors", 3]
)
def test_an_index_cannot_point_outside_its_folder(tmp_path, name):
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"outside the folder|is missing"):
        open_store(tmp_path)


def sharded(folder: Path, state) -> Path:
    source = write_checkpoint(folder / "one", state, "transformers")
    convert(source, folder / "many", KIND, layout="transformers", max_shard_bytes=10**6)
    return folder / "many"


def test_a_half_downloaded_checkpoint_lists_every_bad_shard(tmp_path, state):
    folder = sharded(tmp_path, state)
    first, second, third = sorted(folder.glob("*.safetensors"))[:3]
    first.unlink()
    os.truncate(second, second.stat().st_size // 2)
    third.unlink()
    with pytest.raises(InputError) as caught:
        load_params(folder, KIND)
    assert [first.name in p or third.name in p for p in caught.value.problems] == [True, True]
    convert(
        tmp_path / "one", tmp_path / "again", KIND, layout="transformers", max_shard_bytes=10**6
    )
    for file in (first, third):
        (tmp_path / "again" / file.name).rename(file)
    with pytest.raises(InputError, match="its header promises"):
        load_params(folder, KIND)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, state):
    folder = sharded(tmp_path, state)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = sorted(set(index["weight_map"].values()))
    keys = sorted(index["weight_map"])
    moved = names[0] if index["weight_map"][keys[0]] != names[0] else names[1]
    index["weight_map"] |= {"ghost": names[0], keys[0]: moved}
    del index["weight_map"][keys[1]]
    file.write_text(json.dumps(index))
    with pytest.raises(InputError) as caught:
        load_params(folder, KIND)
    text = "\n".join(caught.value.problems)
    assert "ghost is missing" in text
    assert f"{keys[0]} is in" in text
    assert f"{keys[1]} is not listed" in text


def test_shards_without_an_index_are_pointed_out(tmp_path, state):
    folder = sharded(tmp_path, state)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"found .*without model\.safetensors\.index\.json"):
        load_params(folder, KIND)


def test_missing_unknown_and_misshapen_tensors_are_all_listed(tmp_path, state):
    bad = dict(state)
    del bad["lm_head.weight"]
    bad["model.language_model.layers.3.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    key = "model.vision_model.encoder.layers.0.mlp.fc1.weight"
    bad[key] = bad[key].T
    bad["model.aligner.fc1.bias"] = bad["model.aligner.fc1.bias"].astype(np.int8)
    folder = write_checkpoint(tmp_path / "bad", bad, "transformers")
    with pytest.raises(InputError) as caught:
        convert(folder, tmp_path / "out", KIND, layout="jax")
    assert len(caught.value.problems) == 4
    assert all(str(folder) in problem for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()


def test_derived_buffers_are_left_out(tmp_path, state):
    extra = {
        "model.vision_model.embeddings.position_ids": np.arange(16)[None],
        "model.language_model.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    folder = write_checkpoint(tmp_path / "hf", {**state, **extra}, "transformers")
    load_params(folder, KIND)


def test_a_config_that_does_not_fit_the_tensors_is_refused(tmp_path, state):
    folder = write_checkpoint(tmp_path / "hf", state, "transformers")
    config = hf_config_dict()
    config["text_config"]["num_hidden_layers"] = 2
    config["text_config"]["num_key_value_heads"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        load_params(folder, KIND)
    text = "\n".join(caught.value.problems)
    assert "layers.2.mlp.up_proj.weight is unknown" in text
    assert "layers.0.self_attn.k_proj.weight has shape [16, 48], expected [24, 48]" in text


def test_a_converted_folder_with_lost_tensors_is_refused(tmp_path, state):
    write_checkpoint(tmp_path / "hf", state, "transformers")
    convert(tmp_path / "hf", tmp_path / "jax", KIND, layout="jax")
    config = json.loads((tmp_path / "jax" / "config.json").read_text())
    config["janus"]["llama"]["num_layers"] = 4
    config["layer_dtypes"] = {"lm_head/kernel": ["float32"]}
    (tmp_path / "jax" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        load_params(tmp_path / "jax", KIND)
    assert len(caught.value.problems) == 10  # nine leaves stacked over layers, and layer_dtypes


def test_a_base_must_have_something_to_give(tmp_path, state):
    folder = write_checkpoint(tmp_path / "hf", state, "transformers")
    bare = write_checkpoint(tmp_path / "bare", to_original(state), "original")
    for base in (folder, bare):
        with pytest.raises(InputError, match="as --base it has nothing to give"):
            convert(folder, tmp_path / "out", KIND, layout="original", base=base)
    assert not (tmp_path / "out").exists()


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    import torch

    canary = tmp_path / "ran"
    for i, write in enumerate(
        (
            lambda file: torch.save({"a": Bomb(canary)}, file),
            lambda file: file.write_bytes(pickle.dumps(Bomb(canary))),
            lambda file: torch.save(
                {"a": Bomb(canary)}, file, _use_new_zipfile_serialization=False
            ),
        )
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        write(folder / "pytorch_model.bin")
        with pytest.raises(InputError, match=r"pytorch_model\.bin"):
            open_store(folder)
    assert not canary.exists()


def test_bin_files_that_lie_about_their_size_are_refused(tmp_path):
    import torch

    view = torch.zeros(1).expand(10**5, 10**5)
    torch.save({"a": view}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="more elements than its storage"):
        open_store(tmp_path)
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as source,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(InputError, match="compressed archive"):
        open_store(tmp_path)


def legacy_file(path: Path, content: object) -> Path:
    """As PyTorch before 1.6 wrote."""
    import torch

    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def test_legacy_files_are_read(tmp_path):
    """All element types, a view, and a tensor that shares its storage."""
    import torch

    base = torch.arange(12.0).reshape(3, 4)
    state = {"whole": base, "view": base[1:, ::2], "half": base.bfloat16(), "none": base[:0]}
    store = torch_bin.BinStore([legacy_file(tmp_path / "x.pth", state)])
    assert {key: info.shape for key, info in store.infos.items()} == {
        "whole": (3, 4), "view": (2, 2), "half": (3, 4), "none": (0, 4),
    }  # fmt: skip
    assert store.read("view").tolist() == [[4, 6], [8, 10]]
    assert store.read("half", ((1, 2), (0, 4))).astype(float).tolist() == [[4, 5, 6, 7]]
    assert store.infos["half"].dtype.name == "bfloat16"


def test_two_files_are_one_store_unless_they_share_a_key(tmp_path):
    import torch

    legacy_file(tmp_path / "a.pth", {"a": torch.ones(2)})
    torch.save({"b": torch.zeros(3)}, tmp_path / "b.pth")
    store = open_any_store(tmp_path)
    assert (store.read("a").sum(), store.read("b").shape) == (2, (3,))
    torch.save({"a": torch.zeros(3)}, tmp_path / "c.pth")
    with pytest.raises(InputError, match=r"a\.pth and c\.pth both hold a; .* keep one"):
        open_any_store(tmp_path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_two_checkpoints_in_one_folder_are_one_line(tmp_path, suffix):
    """HPS v2 and v2.1 are two files of the same hundreds of names."""
    import torch
    from safetensors.numpy import save_file

    names = [f"HPS_v2_compressed.{suffix}", f"HPS_v2.1_compressed.{suffix}"]
    for file in names:
        state = {f"layer.{i}": np.ones(2, np.float32) for i in range(300)}
        if suffix == "pt":
            torch.save({key: torch.from_numpy(x) for key, x in state.items()}, tmp_path / file)
        else:
            save_file(state, tmp_path / file)
    with pytest.raises(InputError) as caught:
        open_any_store(tmp_path)
    (problem,) = caught.value.problems
    assert all(name in problem for name in (*names, str(tmp_path), "299 more", "keep one of them"))
    open_any_store(tmp_path / names[0]).close()


def test_the_weights_inside_a_training_checkpoint_are_found(tmp_path):
    """HPS v2 is published as such a file."""
    import torch

    content = {"epoch": 3, "name": "hps", "state_dict": {"logit_scale": torch.tensor(4.5)}}
    torch.save(content, tmp_path / "HPS_v2_compressed.pt")
    store = open_any_store(tmp_path)
    assert [*store.infos] == ["logit_scale"]
    assert store.read("logit_scale") == np.float32(4.5)


def test_a_large_legacy_file_is_refused_unread(tmp_path):
    file = tmp_path / "x.pth"
    file.write_bytes(torch_bin.LEGACY_START)
    os.truncate(file, torch_bin.MAX_LEGACY_BYTES + 1)  # sparse
    with pytest.raises(InputError, match=r"4294967297 bytes .* expected at most 4294967296"):
        torch_bin.load_bin(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a whole PyTorch file"),
        (lambda data: data[1:], "not a whole PyTorch file"),
        (lambda data: pickle.dumps({"a": 1}), "not a whole PyTorch file"),
        (lambda data: b"PK\x03\x04" + data, "not a whole PyTorch file"),
        (lambda data: data[:-1], "cannot load it"),
        (lambda data: data[: len(torch_bin.LEGACY_START)], "cannot load it"),
        (lambda data: torch_bin.LEGACY_START + pickle.dumps(Bomb(Path("x")), 2), "cannot load it"),
    ],
)
def test_a_damaged_legacy_file_is_refused(tmp_path, damage, message):
    import torch

    file = legacy_file(tmp_path / "x.pth", {"a": torch.ones(7)})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        torch_bin.load_bin(file)
    assert str(file) in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_mutated_legacy_file_is_read_or_refused_cleanly(tmp_path, edits):
    import torch

    file = legacy_file(tmp_path / "x.pth", {"a": torch.ones(7), "b": torch.zeros(2, 3)})
    data = bytearray(file.read_bytes())
    for place, value in edits:
        data[int(place * (len(data) - 1))] = value
    file.write_bytes(data)
    try:
        torch_bin.load_bin(file)
    except InputError as error:
        assert all(str(file) in problem for problem in error.problems)


@pytest.mark.parametrize("content", [{"a": 3}, [1, 2], {3: None}])
def test_bin_files_of_other_things_are_refused(tmp_path, content):
    import torch

    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="expected a"):
        open_store(tmp_path)


def test_without_torch_a_bin_file_says_what_to_do(tmp_path, monkeypatch):
    import sys

    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="needs PyTorch, which is not installed"):
        torch_bin.load_bin(tmp_path / "pytorch_model.bin")


def test_an_empty_folder_names_what_it_lacks(tmp_path):
    with pytest.raises(InputError, match="no weights found, expected one of"):
        open_store(tmp_path)
