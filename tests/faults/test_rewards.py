"""T10, T12, T13, T14: a reward that fails costs its samples, and the run only beyond a limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.estimators import compute_group_advantages, summarize_rewards
from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS, LossConstants, LossInputs
from corl_jax.errors import FAILED_EXIT_CODE
from corl_jax.params import leaf_paths
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.train import __main__ as command
from corl_jax.weights.checkpoint import load_config, load_params
from tests.faults.harness import PATIENCE
from tests.support import several_processes, tiny_runs
from tests.support.tiny_runs import metric_lines, write_config

ROOT = Path(__file__).resolve().parents[2]

REWARDS = """
import asyncio, itertools, math, os, signal, time

calls = {}
lock = asyncio.Lock()

def call(name):
    return next(calls.setdefault(name, itertools.count(1)))

def length(texts):
    return [float(len(text)) for text in texts]

def nan_once(texts):
    scores = length(texts)
    if call("nan_once") == 1:
        scores[0], scores[3] = math.nan, math.inf
    return scores

def raises_once(texts):
    if call("raises_once") == 1:
        raise KeyError("no such thing")
    return length(texts)

def short_once(texts):
    return length(texts)[: -1 if call("short_once") == 2 else None]

def words_once(texts):
    return ["good"] * len(texts) if call("words_once") == 1 else length(texts)

def none_once(texts):
    return None if call("none_once") == 1 else length(texts)

def sleeps_once(texts):
    if call("sleeps_once") == 2:
        time.sleep(3600)
    return length(texts)

def sleeps_on_one(texts):
    if os.environ["CORL_JAX_PROCESS_INDEX"] == "1" and call("sleeps_on_one") == 1:
        time.sleep(3600)
    return length(texts)

async def shares_lock(texts):
    async def one(text):
        async with lock:
            await asyncio.sleep(0)
            return float(len(text))

    return await asyncio.gather(*map(one, texts))

def sets_alarm(texts):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 100)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return length(texts)

def raises(texts):
    raise ZeroDivisionError("always")
"""


pytestmark = pytest.mark.usefixtures("module_on_one_device")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_config, written):
    """Options of a run on answers alone, with rewards of the file by name."""
    model = tiny_runs.model_dir(tmp_path_factory.mktemp("models") / "tiny", tiny_config)
    rows = tiny_runs.rows_file(tmp_path_factory.mktemp("data") / "rows.parquet", 8)

    def tree(output: Path, *names: str, **changes):
        listed = [{"use": f"{written}:{name}", "timeout_s": 3.0} for name in names]
        return tiny_runs.options(
            model, rows, output, rewards=listed, algorithm={"tasks": "mm2t"},
            **{"train": {"max_steps": 2, "prompts_per_step": 2}} | changes,
        )  # fmt: skip

    return tree


def train(tree: dict) -> Path:
    output = Path(tree["output_dir"])
    path = write_config(output.parent / f"{output.name}.yaml", tree)
    command.main(["--config", str(path)])
    return output


FAILING = ("raises_once", "short_once", "words_once", "none_once", "sleeps_once")


def test_every_kind_of_failure_costs_a_call_and_not_the_run(base, tmp_path, figure):
    began = time.monotonic()
    names = ("length", "shares_lock", "sets_alarm", "nan_once", *FAILING)
    output = train(base(tmp_path / "run", *names))
    lines = metric_lines(output)
    share = {name: [line[f"mm2t/rewards/{name}/failed"] for line in lines] for name in names}
    assert share == {
        "length": [0, 0], "shares_lock": [0, 0], "sets_alarm": [0, 0], "nan_once": [0, 0],
        "raises_once": [1, 0], "short_once": [0, 1], "words_once": [1, 0],
        "none_once": [1, 0], "sleeps_once": [0, 1],
    }  # fmt: skip
    assert [line["mm2t/rewards/nan_once/not_applicable"] for line in lines] == [0.5, 0]
    assert [line["mm2t/rewards/sleeps_once/failures"] for line in lines] == [0, 1]
    assert lines[1]["mm2t/rewards/sleeps_once/seconds"] >= 3
    assert all(line["loss"] is not None and line["grad_norm"] is not None for line in lines)
    config = load_config(output / "export", KIND)
    params = dict(leaf_paths(load_params(output / "export", KIND, config)))
    bad = [path for path, leaf in params.items() if not np.isfinite(leaf).all()]
    figure("T10", fault="NaN and inf in 2 of 4 samples", tries=1, losses=len(bad))
    figure("T13", fault="raises, wrong length, strings, None", tries=4, losses=len(bad))
    seconds = time.monotonic() - began
    figure("T14", fault="sleeps for ever", tries=1, losses=len(bad), note=f"run {seconds:.0f} s")
    assert not bad


@pytest.mark.slow
def test_a_reward_that_hangs_on_one_of_two_processes_costs_its_samples(base, tmp_path, figure):
    began = time.monotonic()
    changes = {"train": {"max_steps": 2, "prompts_per_step": 8}}
    tree = base(tmp_path / "run", "length", "sleeps_on_one", **changes)
    pair = several_processes.train(write_config(tmp_path / "run.yaml", tree))
    several_processes.finished(pair)
    lines = metric_lines(tmp_path / "run")
    shares = [line["mm2t/rewards/sleeps_on_one/failed"] for line in lines]
    seconds = time.monotonic() - began
    figure(
        "T14", fault="hangs on one of two processes", tries=1, losses=shares != [0.5, 0],
        note=f"run {seconds:.0f} s",
    )  # fmt: skip
    assert shares == [0.5, 0]
    assert all(line["loss"] is not None for line in lines)


def test_a_reward_that_keeps_failing_ends_the_run_by_its_name(base, tmp_path, capsys, figure):
    tree = base(tmp_path / "run", "length", "raises")
    tree["rewards"][1]["max_failures"] = 2
    with pytest.raises(SystemExit) as error:
        train(tree)
    assert error.value.code == FAILED_EXIT_CODE
    text = capsys.readouterr().err
    for part in ("reward raises", "2 (max_failures: 2)", "ZeroDivisionError: always", "mine.py"):
        assert part in text, part
    assert "corl_jax/" not in text, "the user's traceback alone"
    assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))
    figure("T13", fault="raises for ever", tries=1, losses=0)


STUBBORN = """
import time
def hung(texts):
    while True:
        try:
            %s
        except Exception:
            pass
"""


@pytest.mark.parametrize("kind", ["sleeps", "spins"])
def test_a_hung_reward_does_not_keep_the_process(tmp_path, kind, figure):
    """Even where it takes no notice of the end of its time."""
    wait = {"sleeps": "time.sleep(3600)", "spins": "while True: pass"}[kind]
    (tmp_path / "hung.py").write_text(STUBBORN % wait)
    script = (
        "from corl_jax.rewards import own\n"
        "from corl_jax.rewards.samples import Context, Samples\n"
        "reward = own.load_user_reward('hung.py:hung', {}, timeout_s=0.5, max_failures=2)\n"
        "context = Context(None, None, None, None, None, 0, 0)\n"
        "for _ in range(3):\n"
        "    print(reward(Samples({}, texts=['a', 'b']), context), flush=True)\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=PATIENCE, env=environment(),
    )  # fmt: skip
    seconds = time.monotonic() - began
    assert done.returncode == 1 and done.stdout == "[nan nan]\n"
    assert "reward hung (hung.py:hung): failed calls in a row: 2" in done.stderr
    figure("T14", fault=f"hung: {kind}; exit", tries=1, losses=0, note=f"{seconds:.1f} s")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


# ---- T12


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e6])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_equal_rewards_teach_exactly_nothing(value, scale, eps, figure):
    """Also through the loss: the gradient is 0, and finite."""
    rewards = jnp.full(12, value, jnp.float32).at[7].set(jnp.nan)

    def loss(logprobs, rewards):
        advantages = compute_group_advantages(rewards, 4, eps, scale)
        stats = summarize_rewards(rewards, 4)
        mask = jnp.ones(logprobs.shape, bool)
        inputs = LossInputs(logprobs=logprobs, mask=mask, advantages=advantages)
        total, count, _ = CLIPPED_POLICY_LOSS.compute(inputs, LossConstants())
        return total / count, (advantages, stats)

    logprobs = jnp.log(jnp.linspace(0.1, 0.9, 60).reshape(12, 5))
    grads, (advantages, stats) = jax.grad(loss, has_aux=True)(logprobs, rewards)
    largest = float(jnp.abs(advantages).max())
    assert largest == 0 and (np.asarray(grads) == 0).all()
    assert stats["frac_reward_zero_std"] == 1
    figure("T12", fault="equal rewards", tries=1, losses=largest > 0, note="max |advantage| 0")


def test_noise_stays_small_and_rounding_is_nothing(figure):
    """Noise of 1e-7 beside rewards of 1 is rounding; of 1e-6 about 1e-6 / std_eps."""
    rng = np.random.default_rng(0)
    sizes = {}
    for noise in (1e-7, 1e-6):
        rewards = (1 + noise * rng.uniform(-1, 1, 4000)).astype(np.float32)
        sizes[noise] = float(jnp.abs(compute_group_advantages(rewards, 8)[0]).max())
    assert sizes[1e-7] == 0 and 0 < sizes[1e-6] < 0.03
    # Around 0, where floats are dense, the eps alone decides.
    around_zero = (1e-7 * rng.uniform(-1, 1, 4000)).astype(np.float32)
    largest = float(jnp.abs(compute_group_advantages(around_zero, 8)[0]).max())
    assert 0 < largest < 0.003
    figure("T12", fault="noise of 1e-7 and 1e-6", tries=3, losses=0,
           note=f"max |advantage| {max(largest, sizes[1e-6]):.4f}")  # fmt: skip
