"""--check of what lies on the hub: headers instead of downloads, with all of its findings."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from corl_jax.assets import MINI_JANUS
from corl_jax.config import files as config_files
from corl_jax.errors import InputError
from corl_jax.hub_headers import read_headers_only
from corl_jax.train import command, resolve
from corl_jax.weights.hub import resolve_model_dir
from tests.support import tiny_runs
from tests.support.hub_server import serve_hub
from tests.support.tiny_models import encode, tiny_parquet, tiny_row

pytestmark = pytest.mark.usefixtures("one_device")
MODEL, ROWS, VGG = "owner/janus", "owner/rows", "timm/vgg16.tv_in1k"


def publish_vgg(folder):
    """The published VGG16 of timm: real names and sizes; its values are a hole in the file."""
    widths, shapes = iter([64, 64, 128, 128, *[256] * 3, *[512] * 6]), {}
    last = 3
    for place in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        width = next(widths)
        shapes |= {f"features.{place}.weight": [width, last, 3, 3]}
        shapes |= {f"features.{place}.bias": [width]}
        last = width
    shapes |= {"pre_logits.fc1.weight": [4096, 512, 7, 7], "pre_logits.fc1.bias": [4096]}
    shapes |= {"pre_logits.fc2.weight": [4096, 4096, 1, 1], "pre_logits.fc2.bias": [4096]}
    shapes |= {"head.fc.weight": [1000, 4096], "head.fc.bias": [1000]}
    header, offset = {}, 0
    for key, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape))
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    (folder / "config.json").write_text(json.dumps({"architecture": "vgg16"}))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model of 8 MB, a data set of 10 MB in row groups of 8, and a VGG16 of 553 MB."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(MINI_JANUS, root / "models" / MODEL)
    publish_vgg(root / "models" / VGG)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (200, 128, 128, 3), np.uint8)
    rows = [
        tiny_row(i, real_image={"bytes": encode(Image.fromarray(noise[i])), "path": f"{i}.png"})
        for i in range(len(noise))
    ]
    for part in range(2):
        file = root / "datasets" / ROWS / f"data/train-{part:05d}-of-00002.parquet"
        tiny_parquet(file, rows[100 * part : 100 * (part + 1)])
    return root


@pytest.fixture
def hub(published, tmp_path):
    """The published folders, served, beside an empty cache."""
    root = shutil.copytree(published, tmp_path / "hub", copy_function=link)
    with serve_hub(root, tmp_path / "cache") as server:
        yield server


def link(source, target):
    """Stands for a copy; tests that change a file replace it."""
    os.link(source, target)


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def load_config(tmp_path, **changes):
    tree = tiny_runs.options(MODEL, ROWS, tmp_path / "run", **changes)
    tree["data"]["max_prompt_length"] = 512
    return config_files.load(tiny_runs.write_config(tmp_path / "run.yaml", tree))


CYCLE = {"name": "t2i_bid_cycle_reward", "options": {"image_term": "lpips"}}


def test_a_check_reads_headers_alone(hub, tmp_path, capsys):
    local = tmp_path / "local"
    shutil.copytree(hub.root / "datasets" / ROWS, local)
    config = load_config(tmp_path, rewards=[CYCLE, {"name": "qa_accuracy"}])
    assert command.run_config(config, check_only=True) == 0
    printed = capsys.readouterr().out
    assert "model: owner/janus" in printed and "3,793,547" in printed
    assert "14,716,160" in printed and VGG in printed and "data: 200 rows to train on" in printed
    assert sum(hub.sent.values()) < 0.003 * size(hub.root)
    assert hub.sent[f"models/{MODEL}/model.safetensors"] < 0.02 * size(MINI_JANUS)
    assert sum(n for name, n in hub.sent.items() if ROWS in name) < 0.08 * size(local)
    assert "downloads of a run: 0.57 GB; this check read" in printed
    assert f"{VGG:48}   0.55 GB in 2 file(s)" in printed
    assert not (tmp_path / "cache").exists() and "/tmp" not in printed
    # A check of the same files on this disk says the same about the run.
    shutil.copytree(MINI_JANUS, tmp_path / "model")
    here = config_files.load(tmp_path / "run.yaml", [
        f"model.path={tmp_path / 'model'}", f"data.path={local}",
        f"networks.lpips.path={hub.root / 'models' / VGG}",
    ])  # fmt: skip
    command.run_config(here, check_only=True)
    other = capsys.readouterr().out
    assert "downloads" not in other
    for line in other.splitlines():
        if not any(word in line for word in ("model:", "lpips", "free", "the first")):
            assert line in printed


def test_a_run_downloads_each_file_once(hub, tmp_path, capsys):
    config = load_config(tmp_path)
    planned = resolve.resolve_run(config)
    files = {name: (hub.root / name).stat().st_size for name in hub.sent}
    assert hub.sent == files and sum(files.values()) > 0.9 * (size(MINI_JANUS) + 10**7)
    assert planned.train_loader.options.shuffle and planned.model_dir.is_relative_to(tmp_path)
    hub.sent.clear()
    resolve.resolve_run(config)
    assert not hub.sent
    # Now a check reads from the cache, as a run does.
    command.run_config(config, check_only=True)
    assert not hub.sent and "downloads" not in capsys.readouterr().out


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before PyTorch 1.6"])
def test_names_and_shapes_of_a_pytorch_file_are_read(hub, tmp_path, capsys, archive):
    folder = hub.root / "models" / MODEL
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=archive)
    command.run_config(load_config(tmp_path), check_only=True)
    printed = capsys.readouterr().out
    assert "3,793,547" in printed
    sent = hub.sent[f"models/{MODEL}/pytorch_model.bin"]
    assert (sent < 0.05 * size(folder)) == archive
    assert ("pytorch_model.bin: has no header, so it is read whole" in printed) != archive
    del state["lm_head.weight"]
    torch.save(state, file, _use_new_zipfile_serialization=archive)
    with pytest.raises(InputError, match=r"owner/janus: .*lm_head.weight is missing"):
        command.run_config(load_config(tmp_path), check_only=True)


def test_what_does_not_fit_is_found_and_named_by_its_place(hub, tmp_path):
    file = hub.root / "models" / MODEL / "config.json"
    stated = json.loads(file.read_text())
    stated["text_config"]["num_hidden_layers"] += 1
    file.unlink()
    file.write_text(json.dumps(stated))
    rows = [{key: value for key, value in tiny_row(i).items() if key != "qa_solution"}
            for i in range(8)]  # fmt: skip
    shutil.rmtree(hub.root / "datasets" / ROWS)
    tiny_parquet(hub.root / "datasets" / ROWS / "train.parquet", rows)
    with pytest.raises(InputError) as error:
        command.run_config(load_config(tmp_path), check_only=True)
    text = "\n".join(error.value.problems)
    assert "owner/janus: " in text and "is missing, expected with shape" in text
    assert "qa_solution" in text and "corl_jax_headers" not in text


def test_a_damaged_file_is_found_by_its_header(hub, tmp_path):
    file = hub.root / "models" / MODEL / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1000])
    with pytest.raises(InputError, match=r"owner/janus/model.safetensors: .* its header promises"):
        command.run_config(load_config(tmp_path), check_only=True)


def test_without_the_hub_the_remedy_is_named(hub, tmp_path):
    shutil.rmtree(hub.root)
    with pytest.raises(InputError) as error:
        command.run_config(load_config(tmp_path), check_only=True)
    text = "\n".join(error.value.problems)
    assert "hf download owner/janus --local-dir DIR" in text
    assert "hf download --repo-type dataset owner/rows --local-dir DIR" in text


def test_the_copies_are_gone_after_the_check(hub):
    with read_headers_only() as headers:
        copy = resolve_model_dir(MODEL)
        assert copy.is_dir() and headers.read_bytes > 0
        weights = copy / "model.safetensors"
        assert weights.stat().st_size == (MINI_JANUS / "model.safetensors").stat().st_size
    assert not copy.exists()
