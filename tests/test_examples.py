"""The worked examples of the pages "add ..." run as the pages say, and hold the pages' code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from corl_jax.params import flatten
from corl_jax.rewards.samples import Context, FrozenNetwork, Network, Samples
from corl_jax.weights.checkpoint import load_config, load_params
from docs.examples import color_network, quantile
from docs.examples.color_network import KIND, ColorConfig
from tests.support import bag_runs, tiny_runs

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    "add_a_policy": "bag_family", "add_a_reward_network": "color_network",
    "add_a_task": "reading_task", "add_an_algorithm": "quantile",
    "add_an_evaluation_suite": "best_of_group",
}  # fmt: skip
"""Page of docs/how_to -> module of docs/examples."""

# Adds the small family of the examples, then runs another example as `python -m` does.
START = (
    "import runpy, sys\n"
    "from corl_jax import policies, tasks\n"
    "if sys.argv[1].endswith('reading_task'):\n"
    "    from docs.examples.reading_task import READING\n"
    "    tasks.TASKS['reading'] = READING\n"
    "from docs.examples.bag_family import FAMILY\n"
    "policies.FAMILIES[FAMILY.name] = FAMILY\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_module(sys.argv[0], run_name='__main__')\n"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return bag_runs.write_files(tmp_path_factory.mktemp("bag"))


class Lines(list):
    """The lines of metrics, and what the run printed as errors and warnings."""

    def __init__(self, lines, printed):
        super().__init__(lines)
        self.printed = printed


def run(example, files, output, *overrides, **changes):
    """Trains with an example in a process of its own; returns its lines of metrics."""
    path = tiny_runs.write_config(
        output.with_suffix(".yaml"), bag_runs.options(files, output, **changes)
    )
    command = [sys.executable, "-c", START, f"docs.examples.{example}", "--config", str(path)]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return Lines([json.loads(line) for line in lines], done.stderr)


@pytest.mark.parametrize("page", EXAMPLES)
def test_code_of_a_page_is_code_of_its_example(page):
    text = (ROOT / "docs" / "how_to" / f"{page}.md").read_text()
    code = (ROOT / "docs" / "examples" / f"{EXAMPLES[page]}.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks and f"examples/{EXAMPLES[page]}.py" in text
    for block in blocks:  # formatters indent and wrap the two differently
        assert "".join(block.split()) in "".join(code.split())


def test_quantile_advantages_by_hand():
    rewards = jnp.array([1.0, 2, 6, 4, jnp.nan, 5, jnp.nan, jnp.nan, 3, 0.1, 0.1, 0.1])
    expected = [-1 / 7**0.5, 0, 4 / 7**0.5, -(0.5**0.5), 0, 0.5**0.5, *[0] * 6]
    found = quantile.quantile_advantages(rewards, 3, eps=0.0)[:9]
    np.testing.assert_allclose(found, expected[:9], rtol=1e-6)
    np.testing.assert_array_equal(quantile.quantile_advantages(rewards, 3)[9:], expected[9:])


def test_an_algorithm_of_its_own_learns(files, tmp_path):
    lines = run(
        "quantile", files, tmp_path / "run", "algorithm.name=quantile", "algorithm.scale=none"
    )
    assert "algorithm.scale: 'none' has no effect; algorithm.name quantile" in lines.printed
    scores = [line["eval/mm2t/qa_accuracy"] for line in lines if "eval/mm2t/qa_accuracy" in line]
    assert scores[-1] > scores[0] + 0.3


def test_a_task_of_its_own_learns(files, tmp_path):
    lines = run(
        "reading_task", files, tmp_path / "run", "algorithm.tasks=reading",
        rewards=[{"name": "qa_accuracy"}],
    )  # fmt: skip
    name = "eval/reading/qa_accuracy"
    scores = [line[name] for line in lines if name in line]
    assert scores[-1] > scores[0] + 0.3


def test_a_suite_reports_its_rates(files, tmp_path):
    lines = run(
        "best_of_group", files, tmp_path / "run", "eval.suite=best_of_group", "train.max_steps=1"
    )
    (first, *_) = [line for line in lines if "eval/mm2t/qa_accuracy_best" in line]
    best = first["eval/mm2t/qa_accuracy_best"]
    assert first["eval/mm2t/qa_accuracy_best_low"] < best <= 1
    # Of 3 words one is right: 8 samples of a prompt contain it with probability 1 - (2/3)^8 = 0.96.
    assert best > 0.7


@pytest.fixture
def color_weights(tmp_path):
    """The file of the color network, as its authors would have saved it."""
    folder = tmp_path / "color"
    folder.mkdir()
    weights = {
        "fc.weight": np.array([[1.0, -0.5, 0.25]], np.float32),
        "fc.bias": np.array([0.125], np.float32),
    }
    save_file(weights, folder / "color.safetensors")
    return folder


def test_the_color_network_is_its_formula(color_weights):
    config = load_config(color_weights, KIND)
    params = load_params(color_weights, KIND, config)
    assert config == ColorConfig() and set(flatten(params)) == {"layer/kernel", "layer/bias"}
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    network = FrozenNetwork(Network(config, params, color_weights, jnp.float32), None)
    context = Context(None, None, None, None, jnp.float32, 0, 0, {"color": network})
    found = color_network.score_color(Samples({}, images=images), context)
    mean = images.astype(np.float64).mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(found, mean @ [1.0, -0.5, 0.25] + 0.125, rtol=1e-5)


def test_the_color_network_is_asked_in_training(files, color_weights, tmp_path):
    lines = run(
        "color_network", files, tmp_path / "run",
        rewards=[{"name": "color"}, {"name": "qa_accuracy"}],
        networks={"color": {"path": str(color_weights)}},
    )  # fmt: skip
    scores = [line["eval/t2i/color"] for line in lines if "eval/t2i/color" in line]
    # Red alone is rated 1.125, and nothing higher.
    assert scores[0] + 0.2 < scores[-1] <= 1.125
    image = np.asarray(Image.open(tmp_path / "run" / "images" / "step_000012.png"))
    assert image.ndim == 3
