"""Images for harnesses: any batches and devices give the same, and so does a resumed run."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from corl_jax.devices.mesh import make_mesh
from corl_jax.errors import InputError
from corl_jax.evaluate import __main__ as evaluate
from corl_jax.evaluate import draw_options
from corl_jax.evaluation import image_store
from corl_jax.evaluation.drawing import draw_prompts
from corl_jax.params import map_with_path
from corl_jax.policies import batched, load_policy
from corl_jax.policies.family import SamplingOptions
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.prompts import Processor
from corl_jax.rewards.samples import Policy
from corl_jax.weights.checkpoint import load_config, load_params
from corl_jax.weights.export import save_checkpoint
from corl_jax.weights.hashing import hash_weights
from tests.support import harness_clones, several_processes
from tests.support.tiny_models import tiny_tokenizer_dir

PROMPTS = ["a red circle", "two blue squares and a green triangle", "a red circle"]
PAIRS = [(2, 0), (0, 1), (1, 0), (0, 0), (1, 3)]


@pytest.fixture(autouse=True)
def _one_local_device(monkeypatch):
    """The command takes one device here; others are asked for by their meshes."""
    first = jax.local_devices()[:1]
    monkeypatch.setattr("corl_jax.evaluate.draw_run.jax.local_devices", lambda: first)


def draw(folder, pairs=PAIRS, batch_size=4, mesh=None, seed=3, prompts=PROMPTS):
    model = load_policy(folder, jnp.float32, mesh)
    policy = Policy(model.family, model.sizes, model.params, model.processor, jnp.float32)
    sampling = SamplingOptions(model.processor.special, dtype=jnp.float32)
    images = draw_prompts(
        policy, prompts, pairs, sampling, seed=seed, batch_size=batch_size, mesh=mesh
    )
    return {(image.prompt, image.sample): image.pixels for image in images}


@pytest.fixture(scope="module")
def drawn(model):
    return draw(model)


def assert_same(images, others):
    assert images.keys() == others.keys()
    for key, pixels in images.items():
        # Another shape rounds otherwise: one step of a pixel at most.
        difference = np.abs(pixels.astype(int) - others[key].astype(int))
        assert difference.max() <= 1, key


def test_images_are_those_of_generate(model, drawn):
    loaded = load_policy(model, jnp.float32)
    sampling = SamplingOptions(loaded.processor.special, dtype=jnp.float32)
    samples = batched.generate_images(loaded, PROMPTS, sampling, samples=4, batch_size=4, seed=3)
    images = {(s.prompt, s.number): s.pixels for s in samples}
    assert_same(drawn, {pair: images[pair] for pair in PAIRS})
    assert (images[0, 0] != images[2, 0]).any()  # the same words with another number


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2)])
def test_batches_and_devices_do_not_matter(model, drawn, axes):
    assert_same(drawn, draw(model, PAIRS[::-1], 3, make_mesh(*axes)))


def test_seeds_and_samples_matter(model, drawn):
    other = draw(model, seed=4)
    assert all((other[pair] != drawn[pair]).any() for pair in PAIRS)
    assert (drawn[0, 0] != drawn[0, 1]).any()


# ---- the command


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return harness_clones.make_geneval(
        tmp_path_factory.mktemp("clone"), {"single_object": 3, "counting": 2}
    )


def command(model, suite, prompts, out, *more):
    return [
        "--model", str(model), "--suite", suite, "--prompts", str(prompts), "--out", str(out),
        "--batch-size", "4", *map(str, more),
    ]  # fmt: skip


def read_files(out):
    """Path -> bytes, of what the harness reads."""
    images = Path(out) / "images"
    return {
        str(path.relative_to(images)): path.read_bytes()
        for path in images.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(model, clone, tmp_path_factory):
    """GenEval drawn without an interruption, two images a prompt."""
    out = tmp_path_factory.mktemp("whole") / "out"
    first = jax.local_devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corl_jax.evaluate.draw_run.jax.local_devices", lambda: first)
        evaluate.main(command(model, "geneval", clone, out, "--images-per-prompt", 2))
    return out


def test_the_folder_of_a_finished_run(whole, model, clone):
    files = read_files(whole)
    expected = {f"{n:05d}/samples/{i:04d}.png" for n in range(5) for i in range(2)}
    assert files.keys() == expected | {f"{n:05d}/metadata.jsonl" for n in range(5)}
    assert {path.name for path in whole.iterdir()} == {
        "images", "manifest.json", "NEXT.txt", "report.json", ".lock",
    }  # fmt: skip
    manifest = json.loads((whole / "manifest.json").read_text())
    settings = json.loads((whole / "report.json").read_text())["settings"]
    assert manifest["complete"] and manifest["settings"] == settings
    assert settings["model_sha256"] == hash_weights(model)
    values = {key: settings[key] for key in ("seed", "cfg_scale", "temperature", "roles", "dtype")}
    assert values == {
        "seed": 20, "cfg_scale": 5.0, "temperature": 1.0, "roles": "pro", "dtype": "float32",
    }  # fmt: skip
    assert settings["template"].startswith("<|User|>: PROMPT")
    assert manifest["counts"]["images"] == len(manifest["images"]) == 10
    with Image.open(whole / "images" / "00000" / "samples" / "0000.png") as image:
        assert image.mode == "RGB" and image.width == image.height


def test_a_stopped_run_is_continued_to_the_same_bytes(whole, model, clone, tmp_path, monkeypatch):
    """Killed at the third rename: no half file is left where the harness reads."""
    out, renames = tmp_path / "out", []
    replace = Path.replace

    def replace_some(self, target):
        if str(target).endswith(".png"):
            renames.append(target)
            if len(renames) > 3:
                raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_some)
    arguments = command(model, "geneval", clone, out, "--images-per-prompt", 2)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(arguments)
    monkeypatch.undo()
    first = jax.local_devices()[:1]
    monkeypatch.setattr("corl_jax.evaluate.draw_run.jax.local_devices", lambda: first)
    expected = read_files(whole)
    left = read_files(out)
    assert 3 <= sum(name.endswith(".png") for name in left) < 10
    assert all(expected[name] == content for name, content in left.items())
    assert not (out / "NEXT.txt").exists()
    # A file that was damaged, and one that was put there, are drawn again.
    (out / "images" / "00000" / "samples" / "0000.png").write_bytes(b"half of a file")
    (out / "images" / "00004" / "samples").mkdir(parents=True, exist_ok=True)
    (out / "images" / "00004" / "samples" / "0001.png").write_bytes(b"a foreign file")
    evaluate.main(arguments)
    assert read_files(out) == expected


def test_a_finished_run_draws_nothing_again(whole, model, clone, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("corl_jax.evaluate.draw_run.load_policy", refuse)
    before = json.loads((whole / "manifest.json").read_text())
    evaluate.main(command(model, "geneval", clone, whole, "--images-per-prompt", 2))
    assert "0 drawn, 10 kept; nothing was missing" in capsys.readouterr().out
    after = json.loads((whole / "manifest.json").read_text())
    assert (after["images"], after["seconds"]) == (before["images"], before["seconds"])


def test_a_few_rows_first_and_all_later(whole, model, clone, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = command(model, "geneval", clone, out, "--images-per-prompt", 2)
    evaluate.main([*arguments, "--rows", "2"])
    assert "--rows 2 of 5 prompts" in capsys.readouterr().err
    assert len(read_files(out)) == 6
    evaluate.main(arguments)
    assert read_files(out) == read_files(whole)
    assert "5 prompts, --rows asks for 2" in refuse(capsys, *arguments, "--rows", "2")


def refuse(capsys, *arguments):
    """The messages of arguments that are refused with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        evaluate.main(list(map(str, arguments)))
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def no_device(monkeypatch):
    """Fails if a device would be used."""

    def fail(*args, **kwargs):
        raise AssertionError("devices are prepared")

    monkeypatch.setattr("corl_jax.evaluate.draw_run.prepare_devices", fail)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """The model with one parameter changed, as a training leaves it: same names and sizes."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    config = load_config(model, KIND)
    params = load_params(model, KIND, config)
    changed = map_with_path(
        lambda path, leaf: leaf + np.float32(path == "language_model/norm/scale"), params
    )
    save_checkpoint(folder, KIND, config, changed, layout="jax")
    skip_weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(model, folder, dirs_exist_ok=True, ignore=skip_weights)
    return folder


@pytest.mark.usefixtures("no_device")
def test_another_setting_in_the_same_folder_is_refused(
    whole, model, trained, clone, tmp_path, capsys
):
    other = tmp_path / "evaluation_metadata.jsonl"
    other.write_text(clone.read_text().replace("photo", "picture"))
    base = command(model, "geneval", clone, whole, "--images-per-prompt", 2)
    for more, words in [
        (["--seed", 21], "--seed 20; this command has 21"),
        (["--cfg-scale", 3], "--cfg-scale 5.0; this command has 3.0"),
        (["--temperature", 0.5], "--temperature 1.0; this command has 0.5"),
        (["--roles", "old"], "--roles pro; this command has old"),
        (["--images-per-prompt", 4], "--images-per-prompt 2; this command has 4"),
        (["--model", trained], f"--model {model} (sha256 {hash_weights(model)[:16]}); this command "
         f"has {trained} (sha256 {hash_weights(trained)[:16]})"),
        (["--prompts", other], f"--prompts {clone} (sha256"),
    ]:  # fmt: skip
        assert words in refuse(capsys, *base, *more)


def test_another_dtype_in_the_same_folder_is_refused(whole, model, clone, capsys):
    base = command(model, "geneval", clone, whole, "--images-per-prompt", 2)
    err = refuse(capsys, *base, "--dtype", "bfloat16")
    assert "--dtype float32; this command has bfloat16" in err


@pytest.mark.usefixtures("no_device")
def test_bad_arguments_are_refused_together(model, clone, tmp_path, capsys):
    out = tmp_path / "out"
    base = command(model, "geneval", clone, out)
    err = refuse(
        capsys, *base, "--seed", -1, "--cfg-scale", "nan", "--temperature", 0, "--batch-size", 0,
        "--images-per-prompt", 0, "--rows", 9, "--mesh", "data=2,model=3", "--roles", "new",
        "--process-id", -1,
    )  # fmt: skip
    for option in ("seed", "cfg-scale", "temperature", "batch-size", "images-per-prompt", "rows",
                   "mesh", "roles", "process-id"):  # fmt: skip
        assert f"error: --{option}: " in err, option
    assert "--greedy" not in err
    assert not out.exists()


@pytest.mark.usefixtures("no_device")
def test_bad_folders_are_refused(model, clone, tmp_path, capsys, whole):
    file = tmp_path / "file"
    file.write_text("x")
    assert "is no folder" in refuse(capsys, *command(model, "geneval", clone, file))
    assert "holds files" in refuse(capsys, *command(model, "geneval", clone, clone.parent))
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "images" / "00001" / "samples" / "7.png").write_bytes(b"")
    arguments = (*command(model, "geneval", clone, copy), "--images-per-prompt", 2)
    assert "1 pictures that are not of this run, such as images/00001/samples/7.png" in refuse(
        capsys, *arguments
    )
    (copy / "manifest.json").write_text("{}")
    assert "is of another suite, or of another version" in refuse(capsys, *arguments)


@pytest.mark.usefixtures("no_device")
def test_a_disk_that_is_too_small_is_refused(model, clone, tmp_path, capsys, monkeypatch):
    usage = argparse.Namespace(free=1000)
    monkeypatch.setattr(draw_options.shutil, "disk_usage", lambda path: usage)
    err = refuse(capsys, *command(model, "geneval", clone, tmp_path / "out"))
    assert "20 images of" in err and "MB are free; make room" in err


@pytest.mark.usefixtures("no_device")
def test_prompts_that_are_too_long_are_refused_not_cut(model, tmp_path, capsys):
    clone = harness_clones.make_dpg(tmp_path, 2)
    (clone / "long.txt").write_text("red circle " * 400)
    err = refuse(capsys, *command(model, "dpg", clone, tmp_path / "out"))
    assert "prompt long: found 808 tokens; expected at most 496" in err
    assert "prompts are never cut" in err


@pytest.mark.usefixtures("no_device")
def test_the_wrong_kind_of_prompts_and_a_bad_model_are_told_together(clone, tmp_path, capsys):
    err = refuse(capsys, *command(tmp_path / "none", "wise", clone, tmp_path / "out"))
    assert "looks like the prompts of GenEval; give --suite geneval" in err
    assert "error: --model: " in err
    err = refuse(capsys, *command("nano", "geneval2", tmp_path / "no.jsonl", tmp_path / "out"))
    assert "no.jsonl: is not there; expected geneval2_data.jsonl" in err


@pytest.mark.usefixtures("no_device")
def test_more_images_than_the_harness_reads_are_refused(model, tmp_path, capsys):
    clone = harness_clones.make_wise(tmp_path / "clone", {"natural_science": range(641, 643)})
    arguments = command(model, "wise", clone, tmp_path / "out", "--images-per-prompt", 2)
    assert "WISE reads at most 1 of each prompt" in refuse(capsys, *arguments)


def test_a_grid_shows_the_samples_in_their_order(model, tmp_path):
    clone = harness_clones.make_dpg(tmp_path / "clone", 2)
    evaluate.main(command(model, "dpg", clone, tmp_path / "out", "--batch-size", 3))
    with Image.open(tmp_path / "out" / "images" / "partiprompts1.png") as image:
        page = np.asarray(image)
    texts = ["a red circle, number 1", "a red circle, number 0"]  # in the order of file names
    singles = draw(model, [(1, sample) for sample in range(4)], seed=20, prompts=texts)
    side = page.shape[0] // 2
    corners = [(0, 0), (0, side), (side, 0), (side, side)]
    crops = [page[top : top + side, left : left + side] for top, left in corners]
    assert_same({(1, sample): crop for sample, crop in enumerate(crops)}, singles)


def test_chat_roles_are_those_asked_for(model, tmp_path):
    processor = load_policy(model).processor
    for name, start in (("pro", "<|User|>: PROMPT"), ("old", "User: PROMPT"), (None, "<|User|>")):
        roles = processor.choose_roles(name)
        assert roles.template.startswith(start)
        ids = roles.processor.prompt_ids("generate", {"prompt": "a red circle"})
        user = processor.tokenizer.convert_tokens_to_ids("<|User|>")
        assert (user in ids) == start.startswith("<|")
    older = Processor.from_dir(tiny_tokenizer_dir(tmp_path / "older", role_tokens=False))
    assert older.choose_roles(None).name == "old"
    with pytest.raises(InputError, match=r"has no token <\|User\|>"):
        older.choose_roles("pro")


def test_sigterm_keeps_what_is_drawn_and_says_so(model, clone, tmp_path, monkeypatch, capsys):
    write, signals = image_store.ImageStore.write_image, []

    def write_and_signal(self, file, pixels):
        if not signals:
            signals.append(file)
            signal.raise_signal(signal.SIGTERM)
        return write(self, file, pixels)

    monkeypatch.setattr(image_store.ImageStore, "write_image", write_and_signal)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        evaluate.main(command(model, "geneval", clone, out))
    assert caught.value.code == 75
    assert "the same command draws the images that are missing" in capsys.readouterr().err
    num_records = sum(
        len(path.read_text().splitlines()) for path in (out / ".drawing").rglob("*.jsonl")
    )
    files = [name for name in read_files(out) if name.endswith(".png")]
    assert 0 < len(files) == num_records < 20


def test_too_little_memory_has_a_remedy(model, clone, tmp_path, capsys, monkeypatch):
    def exhaust(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr("corl_jax.evaluate.draw_run.save_drawings", exhaust)
    err = refuse(capsys, *command(model, "geneval", clone, tmp_path / "out"))
    assert "4 images at once do not fit into the memory" in err


def test_a_mesh_that_does_not_fit_is_refused(model, clone, tmp_path, capsys):
    arguments = command(model, "geneval", clone, tmp_path / "out", "--mesh", "tensor=3")
    assert "tensor 3 does not use exactly the 1 device(s)" in refuse(capsys, *arguments)


def test_two_processes_draw_what_one_does(whole, model, clone, tmp_path):
    port, out = several_processes.free_port(), tmp_path / "out"
    arguments = command(model, "geneval", clone, out, "--images-per-prompt", 2)
    started = [
        several_processes.start(
            ["-m", "corl_jax.evaluate", *arguments, "--coordinator-address", f"127.0.0.1:{port}",
             "--num-processes", "2", "--process-id", str(index)],
            devices=1,
        )
        for index in range(2)
    ]  # fmt: skip
    first, second = several_processes.finished(started)
    for process in started:
        process.out.close()
    assert "10 drawn, 0 kept" in first and "10 drawn" not in second
    files, expected = read_files(out), read_files(whole)
    assert files.keys() == expected.keys()
    for name in files:
        if name.endswith(".png"):
            pair = [np.asarray(Image.open(folder / "images" / name)) for folder in (out, whole)]
            assert_same({name: pair[0]}, {name: pair[1]})
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["devices"]["processes"] == 2 and len(manifest["images"]) == 10
