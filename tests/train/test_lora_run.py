"""Runs with adapters from files to files: what is saved, resumed and exported, and what is refused.

`peft` and transformers load what the runs leave behind.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from corl_jax.config import files as config_files
from corl_jax.errors import InputError
from corl_jax.models.lora import Lora
from corl_jax.params import leaf_paths, unflatten
from corl_jax.policies.janus import network as janus_network
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.llama_adapters import add_adapters
from corl_jax.train import __main__ as command
from corl_jax.weights.checkpoint import load_config, load_params
from corl_jax.weights.export import convert
from tests.support import tiny_runs
from tests.support.tiny_runs import metric_lines, write_config
from tests.support.tolerances import NETWORK

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
LORA = {"rank": 3, "alpha": 12, "targets": TARGETS}


pytestmark = pytest.mark.usefixtures("module_on_one_device")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_config):
    """In transformers' layout, so that an adapter can name it."""
    folder = tmp_path_factory.mktemp("models")
    tiny_runs.model_dir(folder / "jax", tiny_config)
    convert(folder / "jax", folder / "tiny", KIND, layout="transformers")
    return folder / "tiny"


def train(tree: dict, *arguments: str) -> Path:
    output = Path(tree["output_dir"])
    path = write_config(output.parent / f"{output.name}.yaml", tree)
    command.main(["--config", str(path), *arguments])
    return output


def options(model: Path, rows: Path, folder: Path) -> dict:
    """Three steps with a penalty towards the reference."""
    tree = tiny_runs.options(
        model, rows, folder / "run",
        lora=LORA, algorithm={"kl_coef": 0.1, "tasks": "t2i"}, train={"max_steps": 3},
        rewards=[{"name": "t2i_pixel_mse"}],
    )  # fmt: skip
    return tree | {"export": {"layout": "transformers"}, "optimizer": {"learning_rate": 0.03}}


@pytest.fixture(scope="module")
def merged(model, rows, tmp_path_factory):
    """A run in one go, its export merged."""
    return train(options(model, rows, tmp_path_factory.mktemp("merged")))


@pytest.fixture(scope="module")
def adapter(model, rows, tmp_path_factory):
    """The same run interrupted after two steps, its export the adapter alone."""
    tree = options(model, rows, tmp_path_factory.mktemp("adapter"))
    train(tree, "train.stop_after=2")
    return train(tree, "export.lora=adapter")


def checkpoint_of(folder: Path, step: int = 3) -> dict[str, np.ndarray]:
    state = ocp.StandardCheckpointer().restore((folder / f"checkpoints/{step}/state").absolute())
    return {path: np.asarray(leaf) for path, leaf in leaf_paths(dict_keys(state))}


def dict_keys(tree):
    return {str(k): dict_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def trained_of(folder: Path) -> dict[str, np.ndarray]:
    prefix = "state/params/"
    saved = checkpoint_of(folder)
    return {path.removeprefix(prefix): x for path, x in saved.items() if path.startswith(prefix)}


# ---- runs


def test_checkpoints_hold_adapters_and_their_moments_alone(merged):
    saved = checkpoint_of(merged)
    assert len(trained_of(merged)) == 2 * len(TARGETS)
    arrays = {path for path, leaf in saved.items() if leaf.ndim}
    assert len(arrays) == 3 * 2 * len(TARGETS)
    assert all(path.endswith(("/lora_a", "/lora_b")) for path in arrays)


def test_an_interrupted_run_gives_the_same_bits(merged, adapter):
    ours, theirs = checkpoint_of(adapter), checkpoint_of(merged)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_the_reference_is_the_base(merged):
    """At the first step the policy is the reference; later adapters have moved it away."""
    first, _, last = (line for line in metric_lines(merged) if "t2i/kl" in line)
    assert first["t2i/kl"] == 0 and last["t2i/kl"] > 1e-5
    assert last["t2i/sampling/sampling_logp_difference/max"] < 1e-3


def test_the_merged_export_is_base_plus_adapters(merged, model):
    before, after = (
        dict(leaf_paths(load_params(folder, KIND, load_config(model, KIND))))
        for folder in (model, merged / "export")
    )
    trained, moved = trained_of(merged), 0
    for path, leaf in after.items():
        name = path.rpartition("/")[0]
        if f"{name}/lora_a" not in trained:
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)
            continue
        update = 4 * trained[f"{name}/lora_a"] @ trained[f"{name}/lora_b"]  # alpha / rank
        assert np.abs(update).max() > 1e-3
        np.testing.assert_allclose(leaf, before[path] + update, atol=NETWORK)
        moved += 1
    assert moved == len(TARGETS)


def test_peft_loads_the_adapter(adapter, merged, model):
    """Logits of peft on transformers' base, of transformers' merged model, and ours are one."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import JanusForConditionalGeneration

    torch.set_num_threads(1)
    assert {path.name for path in (adapter / "export").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "generation_config.json",
        "corl_jax_export.json", "README.md",
    }  # fmt: skip
    card = (adapter / "export" / "README.md").read_text()
    assert "library_name: peft" in card and "rank 3" in card
    settings = json.loads((adapter / "export" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model)
    base = JanusForConditionalGeneration.from_pretrained(settings["base_model_name_or_path"])
    ids = torch.tensor(np.random.default_rng(0).integers(100, 400, (2, 7)))
    with torch.no_grad():
        plain = base.eval()(input_ids=ids).logits.numpy()
        wrapped = peft.PeftModel.from_pretrained(base, adapter / "export").eval()
        theirs = wrapped(input_ids=ids).logits.numpy()
        whole = JanusForConditionalGeneration.from_pretrained(merged / "export").eval()
        folded = whole(input_ids=ids).logits.numpy()
    stored = load_file(adapter / "export" / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(wrapped)
    assert loaded.keys() == stored.keys() and len(stored) == 2 * 2 * len(TARGETS)
    for key, value in loaded.items():
        np.testing.assert_array_equal(value.numpy(), stored[key])
    config = add_adapters(load_config(model, KIND), Lora(3, 12.0, tuple(TARGETS)))
    params = unflatten(dict(leaf_paths(load_params(model, KIND))) | trained_of(adapter))
    network = janus_network.bind(config, jax.tree.map(jax.numpy.asarray, params))
    mask = np.ones(ids.shape, bool)
    with jax.default_matmul_precision("highest"):
        hidden = network.language_model(network.embed_text(ids.numpy()), mask)
        ours = np.asarray(network.text_logits(hidden))
    size = np.abs(ours).max()
    assert np.abs(theirs - plain).max() > 1e-2 * size
    np.testing.assert_allclose(theirs, ours, atol=NETWORK * size)
    np.testing.assert_allclose(folded, ours, atol=NETWORK * size)


def test_peft_trains_on_with_the_same_gradients(adapter, model):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import JanusForConditionalGeneration

    torch.set_num_threads(1)
    ids = np.random.default_rng(1).integers(100, 400, (2, 7))
    base = JanusForConditionalGeneration.from_pretrained(model)
    wrapped = peft.PeftModel.from_pretrained(base, adapter / "export", is_trainable=True).eval()
    logits = wrapped(input_ids=torch.tensor(ids)).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()
    ).backward()
    theirs = {
        n.replace(".default", ""): p.grad for n, p in wrapped.named_parameters() if p.requires_grad
    }

    config = add_adapters(load_config(model, KIND), Lora(3, 12.0, tuple(TARGETS)))
    frozen = dict(leaf_paths(load_params(model, KIND)))

    def loss(trained):
        network = janus_network.bind(config, unflatten(frozen | trained))
        hidden = network.language_model(network.embed_text(ids), np.ones(ids.shape, bool))
        logprobs = jax.nn.log_softmax(network.text_logits(hidden)[:, :-1])
        return -jax.numpy.take_along_axis(logprobs, ids[:, 1:, None], axis=-1).mean()

    with jax.default_matmul_precision("highest"):
        ours = jax.grad(loss)(trained_of(adapter))
    slots = KIND.peft.table.make_slots({path: leaf.shape for path, leaf in ours.items()})
    assert len(theirs) == len(slots)
    for slot in slots:
        wanted = theirs[slot.key].numpy().T
        error = np.abs(ours[slot.path][slot.layer] - wanted).max()
        assert error < NETWORK * np.abs(wanted).max(), slot.key


@pytest.mark.slow
def test_the_supervised_stage_trains_adapters(model, rows, tmp_path):
    tree = options(model, rows, tmp_path) | {"stage": "sft", "rewards": [], "algorithm": {}}
    tree["train"] = {"prompts_per_step": 4, "max_steps": 1}
    folder = train(tree, "export.layout=none")
    saved = {path: np.abs(leaf).max() for path, leaf in checkpoint_of(folder, 1).items()}
    assert all(saved[path] > 0 for path in saved if path.endswith("/lora_b") and "nu" not in path)


# ---- before training


def test_check_counts_adapters(model, rows, tmp_path, capsys):
    tree = options(model, rows, tmp_path)
    train(tree, "--check")
    out = capsys.readouterr().out
    assert "trained: adapters of rank 3, alpha 12, on q_proj, v_proj, o_proj, up_proj" in out
    llama = load_config(model, KIND).llama
    heads, keys = (n * llama.head_dim for n in (llama.num_heads, llama.num_kv_heads))
    d, f = llama.hidden_size, llama.intermediate_size
    sides = (d + heads) + (d + keys) + (heads + d) + (d + f) + (f + d)
    (line,) = (line for line in out.splitlines() if line.split()[:1] == ["total"])
    assert line.split()[2] == f"{3 * llama.num_layers * sides:,}"
    (line,) = (line for line in out.splitlines() if line.split()[:1] == ["reference"])
    assert float(line.split()[-1]) == 0


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["lora.rank=-1"], ["lora.rank: found -1"]),
        (["lora.alpha=0"], ["lora.alpha: found 0"]),
        (
            ["train.trainable=[lm_head/.*]"],
            ["train.trainable: found ['lm_head/.*'], but with lora.rank 3 only the adapters"],
        ),
        (["export.layout=original", "export.lora=adapter"], ["export.lora: adapter, but"]),
        (["stage=vq", "rewards=[]", "algorithm={}"], ["lora.rank: found 3, but stage vq"]),
    ],
)  # fmt: skip
def test_contradictions_are_refused(model, rows, tmp_path, overrides, parts):
    path = write_config(tmp_path / "run.yaml", options(model, rows, tmp_path))
    with pytest.raises(InputError) as refused:
        config_files.load(path, ["lora.alpha=12.0", *overrides])
    joined = "\n".join(refused.value.problems)
    assert all(part in joined for part in parts), joined


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        ("[q_proj, c_attn]", ["lora.targets: found ['q_proj', 'c_attn']", "down_proj"]),
        ("[]", ["lora.targets: found []", "expected one or more of"]),
        ("[q_proj, q_proj]", ["lora.targets: found", "each once"]),
    ],
)
def test_projections_that_the_model_does_not_adapt_are_refused(
    model, rows, tmp_path, capsys, targets, parts
):
    """With the model, which says what it can adapt; nothing is written."""
    with pytest.raises(SystemExit) as stopped:
        train(options(model, rows, tmp_path), f"lora.targets={targets}")
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("error: "))
    assert stopped.value.code == 2 and all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


def test_another_rank_in_the_same_directory_is_refused(merged, model, rows, capsys):
    tree = options(model, rows, merged.parent)
    with pytest.raises(SystemExit) as stopped:
        train(tree, "lora.rank=4")
    assert (
        stopped.value.code == 2 and "lora.rank: found 4, the run has 3" in capsys.readouterr().err
    )
