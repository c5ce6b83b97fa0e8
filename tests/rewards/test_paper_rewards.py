"""The paper's rewards, all of them with their networks, through the train command at tiny size."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from corl_jax.config import files as config_files
from corl_jax.devices.mesh import make_mesh
from corl_jax.policies import FAMILIES
from corl_jax.policies.janus.family import FAMILY
from corl_jax.train import __main__ as command
from corl_jax.train import check, memory, resolve
from tests.support.tiny_networks import network_dir
from tests.support.tiny_runs import metric_lines
from tests.support.tolerances import NETWORK

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("t2i/t2i_bid_cycle_reward", "t2i/t2i_ti_sim", "mm2t/qa_accuracy", "mm2t/format")


@pytest.fixture(scope="module")
def tree(tmp_path_factory, model, rows):
    """configs/janus_pro_1b/unified.yaml with a tiny Janus, tiny networks and few rows."""
    root = tmp_path_factory.mktemp("paper")
    networks = {
        name: {"path": str(network_dir(root / name, kind))}
        for name, kind in (("blip", "blip"), ("bert", "bert"), ("lpips", "vgg"))
    }
    return {
        "base": str(ROOT / "configs" / "janus_pro_1b" / "unified.yaml"),
        "output_dir": str(root / "run"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(rows), "max_prompt_length": 128},
        "rollout": {"group_size": 2, "max_new_tokens": 6, "batch_prompts": 4},
        "train": {"prompts_per_step": 4, "micro_batch": 2, "max_steps": 2},
        "eval": {"rows": 4, "batch_prompts": 4, "every": 0},
        "log": {"images_every": 0},
        "networks": networks,
    }


def run(tree: dict, *arguments: str) -> Path:
    output = Path(tree["output_dir"])
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    command.main(["--config", str(path), *arguments])
    return output


def test_check_lists_the_networks(tree, one_device, capsys):
    run(tree, "--check")
    printed = capsys.readouterr().out
    for name in ("blip", "bert", "lpips"):
        (line,) = [row for row in printed.splitlines() if row.startswith(f"  {name} ")]
        assert str(tree["networks"][name]["path"]) in line
        assert int(line.split()[1].replace(",", "")) > 0
    assert "blip, bert, lpips" in printed and "reward networks" in printed
    assert not Path(tree["output_dir"]).exists()


def picture_codes(config, params, tokens, *, dtype=jnp.float32):
    """Pictures of codes without a network, for comparisons over devices.

    A network's pixels are cut to whole numbers, and the last bit of a sum, which another number of
    rows on a device may change, decides one here and there.
    """
    side = config.siglip.image_size
    grid = math.isqrt(config.num_image_tokens)
    codes = tokens.reshape(-1, grid, 1, grid, 1, 1) * jnp.array([5, 11, 23]) % 256
    blocks = jnp.broadcast_to(codes, (len(tokens), grid, side // grid, grid, side // grid, 3))
    return blocks.reshape(-1, side, side, 3).astype(jnp.uint8)


DRAWN_CODES = dataclasses.replace(FAMILY, decode_images=picture_codes)


@pytest.fixture(scope="module")
def straight(tree):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "janus", DRAWN_CODES)
        make = functools.partial(make_mesh, devices=jax.devices()[:1])
        patch.setattr(resolve, "make_mesh", make)
        return run(tree)


def test_every_reward_is_scored_timed_and_learnt_from(straight):
    steps = [line for line in metric_lines(straight) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        for name in NAMES:
            task, reward = name.split("/")
            prefix = f"{task}/rewards/{reward}/"
            assert np.isfinite(line[prefix + "mean"]) and line[prefix + "seconds"] > 0, name
            assert line[prefix + "not_applicable"] == 0
        assert line["t2i/rewards/t2i_bid_cycle_reward/std"] > 0
        assert line["t2i/reward_std"] > 0 and line["grad_norm"] > 0
        total = sum(line[f"t2i/rewards/{name}/mean"] for name in
                    ("t2i_bid_cycle_reward", "t2i_ti_sim"))  # fmt: skip
        assert line["t2i/reward"] == pytest.approx(total, abs=1e-5)
    evaluated = json.loads((straight / "summary.json").read_text())["last_evaluation"]
    assert {f"eval/{name}" for name in NAMES} <= evaluated.keys()


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_offloading_and_devices_change_no_reward(tree, straight, tmp_path, devices, monkeypatch):
    make = functools.partial(make_mesh, devices=jax.devices()[:devices])
    monkeypatch.setattr(resolve, "make_mesh", make)
    monkeypatch.setitem(FAMILIES, "janus", DRAWN_CODES)
    again = tree | {
        "output_dir": str(tmp_path / "run"),
        "networks": tree["networks"] | {"offload": devices == 1},
        "train": tree["train"] | {"stop_after": 1},
    }
    first, second = (metric_lines(folder)[1] for folder in (straight, run(again)))
    for name in NAMES:
        task, reward = name.split("/")
        for what in ("mean", "std"):
            key = f"{task}/rewards/{reward}/{what}"
            # Offloaded networks run one after the other, and others are all started first.
            tolerance = 0.0 if devices == 1 else NETWORK
            assert second[key] == pytest.approx(first[key], abs=tolerance, rel=0.0), key


OWN = """
def warmth(images, prompt, **columns):
    assert len(columns["qa_problem"]) == len(images) == len(prompt)
    return [image.getpixel((0, 0))[0] / 255 for image in images]


def moody(texts, *, fails: bool = True):
    if fails:
        raise ValueError("not today")
    return [len(text) for text in texts]
"""


def test_rewards_of_ones_own(tree, tmp_path, one_device, caplog, capsys):
    """One that works, and one that fails in every call and so ends the run at its limit."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    moody = {"use": f"{file}:moody", "max_failures": 3}
    changed = {name: value for name, value in tree.items() if name != "networks"} | {
        "output_dir": str(tmp_path / "run"),
        "rewards": [{"use": f"{file}:warmth", "weight": 2.0}, moody, {"name": "format"}],
        "eval": {"suite": "none", "every": 0},
        "log": {"images_every": 0},
    }
    steps = [line for line in metric_lines(run(changed)) if "loss" in line]
    for number, line in enumerate(steps, start=1):
        assert 0 <= line["t2i/rewards/warmth/mean"] <= 1
        assert line["t2i/reward"] == pytest.approx(2 * line["t2i/rewards/warmth/mean"], abs=1e-6)
        assert line["mm2t/rewards/moody/not_applicable"] == 1
        assert line["mm2t/rewards/moody/failures"] == number
        assert line["mm2t/rewards/moody/mean"] is None
    assert "moody" in caplog.text and "not today" in caplog.text
    fatal = changed | {"output_dir": str(tmp_path / "fatal")}
    fatal["rewards"] = [fatal["rewards"][0], moody | {"max_failures": 2}]
    with pytest.raises(SystemExit) as error:
        run(fatal)
    text = capsys.readouterr().err
    assert error.value.code == 1 and "reward moody" in text and "ValueError: not today" in text
    idle = changed | {"rewards": [{"use": f"{file}:moody", "options": {"fail": False}}]}
    with pytest.raises(SystemExit) as error:
        run(idle, "--check")
    assert error.value.code == 2 and "did you mean fails?" in capsys.readouterr().err


def test_frozen_scorers_and_gdpo(tree, tmp_path, one_device):
    """One step with the start of the run as scorer, one with another checkpoint."""
    other = {"name": "t2i_bid_cycle_reward", "options": {"scorer": tree["model"]["path"]}}
    changed = tree | {
        "output_dir": str(tmp_path / "run"),
        "rewards": [{"name": "t2i_ti_sim", "options": {"scorer": "initial"}}, other,
                    {"name": "qa_accuracy"}, {"name": "format"}],
        "networks": {"offload": True},
        "algorithm": {"name": "gdpo"},
        "optimizer": {"learning_rate": 0.05},
    }  # fmt: skip
    steps = [line for line in metric_lines(run(changed)) if "loss" in line]
    assert all(np.isfinite(line["t2i/rewards/t2i_ti_sim/mean"]) for line in steps)
    assert all(line["grad_norm"] > 0 for line in steps)


def test_a_scorer_by_path_counts_as_the_policys_start_does(tree, tmp_path, monkeypatch):
    """Both are spread over the mesh; another network lies whole on every device."""
    make = functools.partial(make_mesh, devices=jax.devices()[:4])
    monkeypatch.setattr(resolve, "make_mesh", make)
    estimates, plans = {}, {}
    for scorer in ("initial", tree["model"]["path"]):
        ti_sim = {"name": "t2i_ti_sim", "options": {"scorer": scorer}}
        changed = tree | {"rewards": [ti_sim, {"name": "format"}], "mesh": {"data": 1, "fsdp": 4}}
        changed["train"] = tree["train"] | {"micro_batch": 4}
        del changed["networks"]
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(changed), encoding="utf-8")
        plans[scorer] = resolve.resolve_run(config_files.load(path))
        estimates[scorer] = memory.estimate_memory(plans[scorer])["reward networks"]
    mine, theirs = estimates.values()
    (found,) = plans[tree["model"]["path"]].networks
    assert mine == theirs and 0 < theirs < found.nbytes / memory.GIB
    assert "scorers sharded as the policy" in check.describe(plans[tree["model"]["path"]])


@pytest.mark.parametrize("whose", ["policy", "initial", "path"])
def test_answers_that_pass_the_last_position_are_refused(tree, one_device, capsys, whose):
    """The tiny Janus has 512; a prompt of the data may have 128."""
    scorer = tree["model"]["path"] if whose == "path" else whose
    options = {"scorer": scorer, "max_new_tokens": 500}
    rewards = [{"name": "t2i_cycle_reward", "options": options | {"caption": "policy",
                "text_term": "jaccard"}}, {"name": "t2i_qa", "options": options},
               {"name": "t2i_ti_sim", "options": {"scorer": scorer}}]  # fmt: skip
    changed = tree | {"rewards": [*rewards, {"name": "format"}]}
    del changed["networks"]
    with pytest.raises(SystemExit) as error:
        run(changed, "--check")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert error.value.code == 2 and len(lines) == 2
    for line, name in zip(lines, ("t2i_cycle_reward", "t2i_qa"), strict=True):
        assert f"{name}: option max_new_tokens: found 500" in line and "512 positions" in line
    assert "up to 128 tokens" in lines[1] and "leaves 384" in lines[1]
    for reward in rewards[:2]:
        reward["options"]["max_new_tokens"] = 384
    run(changed, "--check")
