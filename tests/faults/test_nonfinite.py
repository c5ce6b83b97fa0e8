"""T11: a loss, gradient or parameter that is not finite changes nothing and is never saved."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from corl_jax.config import schema
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.train import __main__ as command
from corl_jax.train import sft, step
from corl_jax.train.optimizer import make_optimizer
from corl_jax.train.stages import STAGES
from corl_jax.weights.checkpoint import load_config, load_params
from corl_jax.weights.export import save_checkpoint
from tests.support import tiny_runs
from tests.support.tiny_runs import metric_lines, write_config

FOR_EVER = range(3, 1000)


pytestmark = pytest.mark.usefixtures("module_on_one_device")


@pytest.fixture(scope="module")
def options(model, tmp_path_factory):
    """Answers alone, supervised: what compiles soonest. Every step is saved."""
    rows = tiny_runs.rows_file(tmp_path_factory.mktemp("data") / "rows.parquet", 8)

    def tree(output: Path, **changes):
        base = {
            "stage": "sft", "rewards": [], "export": {"layout": "none"},
            "sft": {"t2i_weight": 0.0, "caption_column": None},
            "checkpoint": {"every": 1, "keep": 20},
            "train": {"max_steps": 6, "prompts_per_step": 4},
        }  # fmt: skip
        return tiny_runs.options(model, rows, output, **(base | changes))

    return tree


def train(tree: dict, *arguments: str) -> Path:
    output = Path(tree["output_dir"])
    path = write_config(output.parent / f"{output.name}.yaml", tree)
    command.main(["--config", str(path), *arguments])
    return output


def stopped(capsys, tree: dict, *arguments: str) -> tuple[int, str]:
    """Exit code and what stands on stderr."""
    with pytest.raises(SystemExit) as error:
        train(tree, *arguments)
    return error.value.code, capsys.readouterr().err


@pytest.fixture
def poison(monkeypatch):
    """Makes the pixels of the named steps (from 0) NaN."""

    def infect(steps) -> None:
        def iteration(run, state, prompts, number):
            clean = run.train_step

            def poisoned(state, frozen, batch):
                return clean(state, frozen, jax.tree.map(spoiled, batch))

            if number in steps:
                run = dataclasses.replace(run, train_step=poisoned)
            return sft.sft_iteration(run, state, prompts, number)

        stage = dataclasses.replace(STAGES["sft"], iterate=iteration)
        monkeypatch.setitem(STAGES, "sft", stage)

    return infect


def spoiled(leaf: jax.Array) -> jax.Array:
    return leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf


def saved(output: Path) -> list[int]:
    names = (path.name for path in (output / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


def digest(output: Path, number: int) -> str:
    """Of every array of a checkpoint: parameters, optimizer and step; all of them finite."""
    tree = ocp.StandardCheckpointer().restore((output / f"checkpoints/{number}/state").absolute())
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        assert np.isfinite(np.asarray(leaf)).all(), path
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def test_one_bad_update_is_skipped_and_counted(options, poison, tmp_path, figure):
    poison([2])
    output = train(options(tmp_path / "run"))
    digests = [digest(output, number) for number in saved(output)]
    assert saved(output) == [1, 2, 3, 4, 5, 6]
    assert digests[1] == digests[2] and len(set(digests)) == 5
    lines = metric_lines(output)
    assert [line["update/skipped"] for line in lines] == [0, 0, 1, 0, 0, 0]
    assert lines[2]["loss"] is None and lines[2]["grad_norm"] is None  # as they were
    assert lines[-1]["update/skipped_total"] == 1 and lines[-1]["update/applied"] == 5
    assert lines[2]["learning_rate"] == lines[1]["learning_rate"] > lines[3]["learning_rate"]
    figure("T11", fault="NaN once", tries=1, losses=digests[1] != digests[2])


def test_bad_updates_in_a_row_end_the_run_with_3(options, poison, tmp_path, capsys, figure):
    """Also over a restart, and what is on disk resumes once the cause is gone."""
    poison(FOR_EVER)
    tree = options(tmp_path / "run", guards={"max_skipped_updates": 3}, train={
        "max_steps": 8, "prompts_per_step": 4,
    })  # fmt: skip
    train(tree, "train.stop_after=5")
    code, err = stopped(capsys, tree)
    assert code == 3
    for part in ("error: step 6: 3 update(s) in a row", "loss nan", "norm nan", "mm2t/nll"):
        assert part in err, part
    output = Path(tree["output_dir"])
    assert saved(output) == [1, 2, 3, 4, 5]
    digests = {digest(output, number) for number in (3, 4, 5)}
    assert len(digests) == 1
    poison([])
    train(tree)
    assert saved(output)[-1] == 8 and digest(output, 8) not in digests
    figure("T11", fault="NaN for ever", tries=2, losses=len(digests) - 1)


def test_parameters_that_are_not_finite_are_refused_at_the_start(
    options, model, tmp_path, capsys, figure
):
    params = jax.tree.map(np.array, load_params(model, KIND))
    params["lm_head"]["kernel"][0, :2] = np.nan
    params["vqmodel"]["quant_conv"]["bias"][1] = np.inf
    folder = tmp_path / "model"
    save_checkpoint(folder, KIND, load_config(model, KIND), params, layout="jax")
    written = {path.name for path in folder.iterdir()}
    shutil.copytree(
        model, folder, dirs_exist_ok=True, ignore=lambda *_: written & {*os.listdir(model)}
    )
    tree = options(tmp_path / "run", model={"path": str(folder)})
    code, err = stopped(capsys, tree)
    assert code == 2
    for part in ("lm_head/kernel: 2 of ", "vqmodel/quant_conv/bias: 1 of "):
        assert part in err
    assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))
    figure("T11", fault="weights not finite", tries=1, losses=0)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_every_optimizer_keeps_its_bits(name, clip, figure):
    """A NaN in one gradient, an infinite one, one whose square overflows; a loss alone."""
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((8, 6)), "b": rng.standard_normal(7)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    options = schema.Optimizer(
        name=name, learning_rate=1e-2, weight_decay=0.1, warmup_steps=2, max_grad_norm=clip
    )
    optimizer = make_optimizer(options, 10)
    apply = jax.jit(lambda *args: step.apply_gradients(*args[:2], optimizer, args[2]))
    state = step.TrainState(jnp.int32(0), params, optimizer.init(params))
    good = jax.tree.map(jnp.ones_like, params)
    state, _ = apply(state, good, 1.0)
    bad = [good | {"b": good["b"].at[3].set(value)} for value in (np.nan, -np.inf, 1e20)]
    changed = 0
    for grads, loss in [*((grads, 1.0) for grads in bad), (good, np.nan), (good, np.inf)]:
        after, metrics = apply(state, grads, loss)
        assert metrics["update/skipped"] == 1 and metrics["update/applied"] == 1
        same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(),
                            after, state)  # fmt: skip
        changed += not all(jax.tree.leaves(same))
    figure("T11", fault="bits kept, by optimizer", tries=5, losses=changed)
    assert not changed
    after, metrics = apply(state, good, 1.0)
    assert metrics["update/skipped"] == 0 and metrics["update/applied"] == 2
    assert all((x != y).any() for x, y in zip(*map(jax.tree.leaves, (after.params, params))))
