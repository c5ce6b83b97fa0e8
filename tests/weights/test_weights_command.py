"""The conversion command: exit codes, messages, and how much memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from corl_jax.convert.__main__ import run
from corl_jax.convert.compare import describe_difference
from tests.support.weight_files import (
    BFLOAT16,
    carried_state,
    hf_config_dict,
    hf_shapes,
    random_state,
    read_state,
    to_original,
    write_checkpoint,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def state():
    return random_state(hf_shapes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    root = tmp_path_factory.mktemp("command")
    write_checkpoint(root / "hf", state, "transformers")
    write_checkpoint(root / "original", {**to_original(state), **carried_state()}, "original")
    assert run(["to-jax", str(root / "original"), str(root / "jax")]) == 0
    return root


@pytest.mark.parametrize(
    ("a", "b"), [("original", "jax"), ("jax", "hf"), ("hf", "original"), ("jax", "jax")]
)
def test_verify_finds_equal_checkpoints_of_any_layouts(folder, capsys, a, b):
    assert run(["verify", str(folder / a), str(folder / b)]) == 0
    out = capsys.readouterr().out
    assert " tensors compared: equal" in out.splitlines()[-1]
    assert ("note: " in out) == ("hf" in (a, b))


def test_verify_names_what_differs(folder, state, tmp_path, capsys):
    changed = dict(state)
    key = "model.language_model.layers.1.mlp.up_proj.weight"
    changed[key] = changed[key].copy()
    changed[key][3, 5] += 1
    head = "model.generation_head.proj_out.bias"
    changed[head] = changed[head].astype(np.float32)
    write_checkpoint(tmp_path / "hf", changed, "transformers")
    assert run(["verify", str(folder / "jax"), str(tmp_path / "hf")]) == 1
    out = capsys.readouterr().out
    assert "language_model/layers/mlp/up_proj/kernel layer 1: 1 of 3840 values differ" in out
    assert "generation_head/proj_out/bias: bfloat16 against float32, values equal" in out
    assert "2 differences" in out
    assert run(["verify", "--ignore-dtype", str(folder / "jax"), str(tmp_path / "hf")]) == 1
    assert "1 differences" in capsys.readouterr().out


def test_verify_misses_no_carried_tensor(folder, state, tmp_path, capsys):
    carried = carried_state()
    del carried["gen_vision_model.quantize.codebook_used"]
    key = "vision_model.vision_tower.attn_pool.latent"
    carried[key] = carried[key] + np.ones_like(carried[key])
    write_checkpoint(tmp_path / "o", {**to_original(state), **carried}, "original")
    assert run(["verify", str(folder / "original"), str(tmp_path / "o")]) == 1
    out = capsys.readouterr().out
    assert f"differs: {key}" in out
    assert "codebook_used: only in" in out


def test_difference_tells_nan_payloads_and_signed_zeros_apart():
    zeros = np.zeros(3, np.float32)
    assert describe_difference(zeros, zeros.copy(), False) is None
    assert describe_difference(zeros, -zeros, False) == "0 of 3 values differ, by at most 0"
    assert describe_difference(zeros, zeros[:2], False) == "shape (3,) against (2,)"
    assert describe_difference(zeros.astype(BFLOAT16), zeros, True) is None


def test_inspect_prints_sizes_and_tokens(folder, capsys):
    for name in ("hf", "original", "jax"):
        assert run(["inspect", str(folder / name)]) == 0
        out = capsys.readouterr().out
        assert "hidden_size 48" in out
        assert "bos 256" in out
        assert "parameters" in out
        assert ("carried, unused" in out) == (name != "hf")


def test_bad_input_exits_2_and_names_every_problem(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(["to-jax", str(tmp_path / "absent"), str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        run(["to-torch", str(folder / "jax"), str(folder / "hf"), "--format", "transformers"])
    assert caught.value.code == 2
    assert "holds files" in capsys.readouterr().err


def test_to_torch_reports_what_is_left_out(folder, tmp_path, capsys):
    args = ["to-torch", str(folder / "hf"), str(tmp_path / "out"), "--format", "original"]
    assert run(args) == 0
    assert capsys.readouterr().out.count("note: no source has") == 2
    assert (
        run([*args, "--overwrite", "--base", str(folder / "original"), "--dtype", "float32"]) == 0
    )
    assert "note:" not in capsys.readouterr().out
    assert {value.dtype for value in read_state(tmp_path / "out").values()} == {np.dtype("f4")}


def test_safetensors_conversion_never_imports_torch(folder, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from corl_jax.convert.__main__ import run\n"
        f"run(['to-torch', {str(folder / 'jax')!r}, {str(tmp_path / 'o')!r}, "
        "'--format', 'transformers'])\n"
        f"run(['verify', {str(folder / 'hf')!r}, {str(tmp_path / 'o')!r}])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=_environment())


def _environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


MEASURE = """
import json, resource, sys
from corl_jax.convert.__main__ import run
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(sys.argv[1:])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([before * 1024, after * 1024]))
"""


def _peak(*args: str) -> int:
    """Peak resident bytes of one conversion in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *args],
        cwd=ROOT,
        check=True,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])[1]


def _big_checkpoint(folder: Path) -> None:
    """About 1.5 GB in bfloat16, in shards of at most 500 MB."""
    config = hf_config_dict()
    config["text_config"] |= {
        "vocab_size": 100_000,
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    config["vision_config"]["projection_dim"] = 1024
    config["vq_config"] |= {"projection_dim": 1024, "image_token_embed_dim": 1024}
    from corl_jax.params import unflatten
    from corl_jax.policies.janus.checkpoint import KIND
    from corl_jax.policies.janus.checkpoint.transformers import parse
    from corl_jax.weights.export import save_checkpoint

    problems: list[str] = []
    parsed = parse(config, "big", problems)
    assert not problems
    leaves = {
        path: np.broadcast_to(np.asarray(0.5, BFLOAT16), shape)
        for path, shape in KIND.shapes(parsed).items()
    }
    write_checkpoint(folder / "assets", random_state(hf_shapes()), "transformers")
    save_checkpoint(
        folder / "hf",
        KIND,
        parsed,
        unflatten(leaves),
        layout="transformers",
        assets_from=folder / "assets",
        max_shard_bytes=500 * 10**6,
    )


@pytest.mark.slow
def test_memory_stays_under_one_and_a_half_shards_and_a_gibibyte(tmp_path):
    _big_checkpoint(tmp_path)
    shards = sorted(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert sum(shards) > 1.4e9
    assert len(shards) >= 3
    limit = 1.5 * shards[-1] + 2**30
    hf, jax, out = (str(tmp_path / name) for name in ("hf", "jax", "out"))
    shard = ["--max-shard-mb", "500"]
    peaks = {
        "to-jax": _peak("to-jax", hf, jax, *shard),
        "to-torch": _peak("to-torch", jax, out, "--format", "original", *shard),
        "float32": _peak(
            "to-torch", jax, out, "--format", "transformers", "--dtype", "float32", "--overwrite"
        ),
        "bin": _peak("to-torch", jax, out, "--format", "original", "--bin", "--overwrite", *shard),
        "from bin": _peak("to-jax", out, jax, "--overwrite", *shard),
        "verify": _peak("verify", out, hf),
    }
    print({name: f"{peak / 2**20:.0f} MiB" for name, peak in peaks.items()})
    assert {name: peak for name, peak in peaks.items() if peak > limit} == {}
