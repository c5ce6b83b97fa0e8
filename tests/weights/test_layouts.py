"""Sampling on every layout of eight devices against one device, and what its loops exchange."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax import tasks
from corl_jax.devices.mesh import batch_sharding, make_mesh, param_shardings
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.janus import sampling
from corl_jax.policies.janus.layout import RULES
from corl_jax.types import Segment
from tests.support import draws
from tests.support.tiny_models import LAYOUTS, divisible, layout_name, two_layers
from tests.support.tiny_runs import SPECIAL, both_tasks, random_params
from tests.support.tolerances import LOGPROBS

pytestmark = pytest.mark.usefixtures("exact_products")

PROMPTS, GROUP, NEW_TOKENS = 8, 2, 6
GREEDY = 1e-6  # a temperature at which the likeliest token is drawn; greedy in the same program
COMMON = {"special": SPECIAL, "dtype": jnp.float32, "attention": "xla", "greedy": False}
TEXT = {"max_new_tokens": NEW_TOKENS, "top_k": 0, "top_p": 1.0}
IMAGE = {"guided": True, "image_logprobs": "conditional"}
# So that a program shows where the partitioner puts a collective: not every backend moves it
# out of a loop afterwards, as the one for CPUs does.
OPTIONS = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,"
    "while-loop-expensive-invariant-code-motion"
}


@pytest.fixture(scope="module")
def config(tiny_config):
    return divisible(two_layers(tiny_config))


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture(scope="module")
def prompts(config):
    return {task: batch.prompts for task, batch in both_tasks(config, PROMPTS, GROUP).items()}


def programs(config, params, prompts, keys):
    """The samplers compiled for where these arrays lie; both take a temperature."""
    one = jnp.float32(1)
    image = sampling.image_program.default.lower(
        config, params, prompts["t2i"], keys, one, one, **COMMON, **IMAGE
    )
    text = sampling.text_program.default.lower(
        config, params, prompts["mm2t"], keys, one, **COMMON, **TEXT
    )
    return SimpleNamespace(
        t2i=image.compile(OPTIONS), mm2t=text.compile(OPTIONS),
        arguments={"t2i": (params, prompts["t2i"], keys, jnp.float32(3)),
                   "mm2t": (params, prompts["mm2t"], keys)},
    )  # fmt: skip


def draw(compiled, task: str, temperature: float) -> list[jax.Array]:
    return getattr(compiled, task)(*compiled.arguments[task], jnp.float32(temperature))


def keys():
    return sample_keys(5, np.arange(PROMPTS), GROUP)


@pytest.fixture(scope="module")
def single(config, params, prompts):
    """(task, temperature) -> what one device draws."""
    with jax.default_matmul_precision("highest"):
        compiled = programs(config, params, prompts, keys())
        drawn = {
            (task, temperature): jax.device_get(draw(compiled, task, temperature))
            for task in ("t2i", "mm2t")
            for temperature in (0.8, GREEDY)
        }
    return drawn


@pytest.fixture(params=LAYOUTS, ids=layout_name)
def layout(request, config, params, prompts, capfd, compiled_anew):
    mesh = make_mesh(*request.param)
    spread = batch_sharding(mesh)
    placed = jax.device_put(params, param_shardings(params, mesh, RULES))
    rows = {task: jax.device_put(x, spread) for task, x in prompts.items()}
    with jax.set_mesh(mesh):
        compiled = programs(config, placed, rows, jax.device_put(keys(), spread))
    compiled.warnings, compiled.mesh = capfd.readouterr().err, mesh
    return compiled


def test_a_low_temperature_is_greedy(config, params, prompts, single):
    greedy = sampling.sample_images(
        config, params, prompts["t2i"], keys(), special=SPECIAL, cfg_scale=3.0, greedy=True,
        dtype=jnp.float32, attention="xla",
    )  # fmt: skip
    np.testing.assert_array_equal(single["t2i", GREEDY][0], greedy.values)


def test_the_draws_are_worth_comparing(single):
    for task in ("t2i", "mm2t"):
        drawn, likeliest = (single[task, temperature][0] for temperature in (0.8, GREEDY))
        assert len(np.unique(drawn, axis=0)) == PROMPTS * GROUP
        assert len(np.unique(likeliest, axis=0)) > PROMPTS / 2
        assert (drawn != likeliest).mean() > 0.3


def test_no_draw_is_near_a_tie(config, params, prompts, single):
    """So that layouts, which add up in other orders, may be asked for the same tokens."""
    for (task, temperature), (tokens, *rest, _) in single.items():

        def logits(asked, tokens=tokens):
            return draws.full_logits(config, params, asked, tokens, SPECIAL.image)

        scores = logits(prompts[task])
        if task == "t2i":
            other = logits(draws.without_prompt(prompts[task], SPECIAL))
            scores = other + 3.0 * (scores - other)
        mask = rest[0] if rest else np.ones(tokens.shape, bool)
        drawn = Segment(tasks.CODES if task == "t2i" else tasks.TEXT, tokens, mask)
        margins = draws.margins(scores, drawn, keys(), temperature)
        assert margins.min() * temperature > draws.SAFE, "choose another seed"


def test_layouts_do_not_matter(layout, single, config):
    """Tokens, drawn and greedy; log-probs; where they lie; and what XLA said."""
    assert "rematerialization" not in layout.warnings, "XLA found no way between layouts"
    for (task, temperature), expected in single.items():
        tokens, *_, logprobs = found = draw(layout, task, temperature)
        np.testing.assert_array_equal(tokens, expected[0])
        if temperature != GREEDY:
            np.testing.assert_allclose(logprobs, expected[-1], atol=LOGPROBS)
        for array in found:
            assert array.sharding.is_equivalent_to(batch_sharding(layout.mesh), array.ndim)
    check_loops(layout.t2i.as_text(), layout.mesh)
    check_loops(layout.mm2t.as_text(), layout.mesh)
    check_caches(layout, config)


def check_loops(program: str, mesh) -> None:
    """A token needs no weight of another device: heads and features of its own row, if anything.

    What tells whether all texts have ended is a scalar, and is asked of everyone.
    """
    rows = 2 * PROMPTS * GROUP // (mesh.shape["data"] * mesh.shape["fsdp"])
    for line in decode_loops(program):
        if re.search(r"= pred\[\]", line):
            continue
        assert mesh.shape["tensor"] > 1, f"nothing to ask of another device: {line}"
        if "all-reduce" not in line:
            # The weights of this network have more rows than a device has samples.
            results = line[: COLLECTIVE.search(line).start()]
            assert all(int(size) <= rows for size in re.findall(r"\w\[(\d+)", results)), line


def check_caches(layout, config) -> None:
    """Each device holds its rows' and its heads' part of the keys and values."""
    mesh, llama = layout.mesh, config.llama
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows, heads = 2 * PROMPTS * GROUP, llama.num_kv_heads
    shape = (rows // ways, config.num_image_tokens, heads // mesh.shape["tensor"], llama.head_dim)
    text = layout.t2i.as_text()
    assert f"f32[{','.join(map(str, shape))}]" in text
    assert f"f32[{rows},{config.num_image_tokens},{heads},{llama.head_dim}]" not in text


COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("
)


def decode_loops(program: str) -> list[str]:
    """The collectives of the loops over tokens, which are those that write at a step's place."""
    computations = computations_of(program)
    found, loops = [], 0
    for lines in computations.values():
        for line in lines:
            body = re.search(r" while\(.*body=%?([\w.\-]+)", line)
            # A layer of a prompt is read in a loop of its own, which gathers that layer's weights.
            if not body or not re.search(r"(f32\[\d+,(16|6),\d+,\d+\][^)]*){4}", line):
                continue
            loops += 1
            inside = [x for name in called(body[1], computations) for x in computations[name]]
            found += [x for x in inside if COLLECTIVE.search(x)]
    assert loops, "found no loop that carries the caches of two layers"
    return found


def computations_of(program: str) -> dict[str, list[str]]:
    computations: dict[str, list[str]] = {}
    name = ""
    for line in program.splitlines():
        header = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = header[1]
        computations.setdefault(name, []).append(line)
    return computations


def called(name: str, computations: dict[str, list[str]], seen: set | None = None) -> set[str]:
    """A computation and all that it uses."""
    seen = set() if seen is None else seen
    if name in seen or name not in computations:
        return seen
    seen.add(name)
    for line in computations[name]:
        for other in re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)", line):
            called(other, computations, seen)
    return seen
