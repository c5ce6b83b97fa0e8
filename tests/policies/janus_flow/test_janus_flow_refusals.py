"""Commands refuse wrong models and options: the remedy, exit code 2, nothing written."""

from __future__ import annotations

import json

import pytest

from corl_jax import generate
from corl_jax.policies.janus_flow.checkpoint.flow_config import DECODER, ENCODER
from corl_jax.train import __main__ as command
from tests.support import janus_flow_files, tiny_flow, tiny_runs, tiny_vae
from tests.support.weight_files import hf_shapes, random_state, to_original, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_runs.rows_file(tmp_path_factory.mktemp("data") / "rows.parquet")


@pytest.fixture
def flow(tmp_path):
    return janus_flow_files.original_folder(tmp_path / "flow")


def change_json(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def refuse_training(model, rows, folder, capsys, *more, **changes) -> str:
    tree = tiny_runs.options(
        model, rows, folder / "run", **{"data": {"max_prompt_length": 256}} | changes
    )
    path = tiny_runs.write_config(folder / "run.yaml", tree)
    with pytest.raises(SystemExit) as error:
        command.main(["--config", str(path), *more])
    assert error.value.code == 2 and not (folder / "run").exists()
    return capsys.readouterr().err


def refuse_everywhere(model, rows, folder, capsys) -> str:
    """Refuses it in training, in its check, and in drawing; returns what training says."""
    said = refuse_training(model, rows, folder, capsys)
    assert refuse_training(model, rows, folder, capsys, "--check") == said
    with pytest.raises(SystemExit) as error:
        generate.main(["image", "--model", str(model), "--prompt", "x",
                       "--out", str(folder / "images")])  # fmt: skip
    assert error.value.code == 2 and not (folder / "images").exists()
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    drawn = capsys.readouterr().err
    assert lines and all(line.removeprefix("error: ") in drawn for line in lines), drawn
    return said


# ---- the model


@pytest.mark.parametrize("section", [ENCODER, DECODER])
def test_a_config_without_its_parameters(flow, rows, tmp_path, capsys, section):
    change_json(flow / "config.json", lambda data: data[section].pop("params"))
    said = refuse_everywhere(flow, rows, tmp_path, capsys)
    assert f"{section}: params does not state " in said
    assert "put the config.json there that came with the weights" in said


def test_a_vae_that_does_not_fit(flow, rows, tmp_path, capsys):
    change_json(flow / "vae" / "config.json", lambda data: data.update(scaling_factor=0.18215))
    said = refuse_everywhere(flow, rows, tmp_path, capsys)
    assert "scaling_factor is 0.18215, expected 0.13025" in said
    assert "stabilityai/sdxl-vae" in said


def test_no_vae(flow, rows, tmp_path, capsys):
    (flow / "vae").rename(flow / "elsewhere")
    said = refuse_everywhere(flow, rows, tmp_path, capsys)
    assert f"hf download stabilityai/sdxl-vae --local-dir {flow / 'vae'}" in said


def test_a_janus_given_as_a_janus_flow(rows, tmp_path, capsys):
    """Its weights with the config.json of a JanusFlow."""
    janus = write_checkpoint(tmp_path / "janus", to_original(random_state(hf_shapes())), "original")
    tiny_vae.write_vae(
        tmp_path / "vae", janus_flow_files.vae_state(), **janus_flow_files.VAE_CONFIG
    )
    (janus / "config.json").write_text(json.dumps(janus_flow_files.make_config()))
    said = refuse_everywhere(janus, rows, tmp_path, capsys)
    assert "its tensors are those of a Janus, but its config.json is of a JanusFlow" in said
    assert "put the config.json there that came with the weights" in said


def test_a_janus_flow_given_as_a_janus(rows, tmp_path, capsys):
    flow = write_checkpoint(tmp_path / "flow", {}, "original")
    model = janus_flow_files.make_model()
    janus_flow_files.save_state(flow, janus_flow_files.original_state(model))
    said = refuse_everywhere(flow, rows, tmp_path, capsys)
    assert "its tensors are those of a JanusFlow" in said


def test_a_janus_with_the_config_of_a_janus_flow(model, rows, tmp_path, capsys):
    said = refuse_training(model, rows, tmp_path, capsys, "--check", denoising={"window": 2})
    assert "model.path: found a janus, which does not make images by denoising" in said
    assert "give a model that does, such as a JanusFlow, or leave the block denoising out" in said


# ---- guidance


@pytest.mark.parametrize(
    "key",
    ["denoising.cfg_scale", "denoising.guidance", "algorithm.guidance_scale", "eval.cfg_scale"],
)
def test_a_second_guidance(rows, tmp_path, capsys, key):
    """There is one for sampling, replay and evaluations."""
    folder = tiny_flow.model_dir(tmp_path / "flow")
    said = refuse_training(folder, rows, tmp_path, capsys, f"{key}=3.5")
    assert f"{key}: unknown key; did you mean rollout.cfg_scale?" in said
