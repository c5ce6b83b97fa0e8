"""Each switch back to the released behaviour: it changes what it should, and nothing else.

One tiny run is set up with every switch in turn, and all that a switch could reach is looked at.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.config import files as config_files
from corl_jax.config.schema import Compat
from corl_jax.devices.mesh import make_mesh
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus import network, sampling
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.logprobs import image_logprobs
from corl_jax.rewards.registry import Context, Samples, score
from corl_jax.runs.pace import Phases
from corl_jax.train import build, resolve
from tests.support import tiny_runs

CHANGES: dict[str, set[str]] = {
    "image_logprobs_unshifted": {"log-probs of t2i"},
    "bfloat16_master": {"trained dtypes", "optimizer dtypes"},
    "mc_as_open_ended": {"qa_accuracy: choice"},
    "text_top_k_50": {"sampler of mm2t"},
    "ti_sim_fixed_spans": {"t2i_ti_sim"},
    "format_without_strip": {"format: white space around"},
    "answer_single_line": {"qa_accuracy: two lines", "oc_accuracy: two lines"},
    "format_repeated_blocks": {"format: two answers", "format: answer in thoughts"},
    "answer_in_thoughts": {"qa_accuracy: answer in thoughts", "oc_accuracy: answer in thoughts"},
    "compare_by_letters": {
        "qa_accuracy: number",
        "oc_accuracy: two classes",
        "oc_accuracy: choice",
        "oc_accuracy: open",
    },
}
GOOD = "<think>it is there</think><answer>{}</answer>"
ANSWERS = {  # name -> (completion, qa_problem, qa_solution, qa_type)
    "choice": (
        GOOD.format("The answer is B"), "Which?\nA. a cat\nB. a dog\n", "<answer>B</answer>", "MC",
    ),
    "open": (GOOD.format("a small dog"), "What?", "<answer>a dog</answer>", "OE"),
    "two lines": ("so: <answer>\na dog\n</answer>", "What?", "<answer>a dog</answer>", "OE"),
    "white space around": (
        f" \n{GOOD.format('a dog')}\n ", "What?", "<answer>a dog</answer>", "OE",
    ),
    "two answers": (
        f"{GOOD.format('a dog')}<answer>a cat</answer>", "What?", "<answer>a dog</answer>", "OE",
    ),
    "answer in thoughts": (
        "<think><answer>a cat</answer></think><answer>a dog</answer>", "What?",
        "<answer>a dog</answer>", "OE",
    ),
    "two classes": (GOOD.format("a dog or a cat"), "What?", "<answer>a dog</answer>", "OE"),
    "number": (GOOD.format("35"), "How many?", "<answer>3.5</answer>", "OE"),
    "nothing": ("who knows", "What?", "<answer>a dog</answer>", "OE"),
}  # fmt: skip


def test_every_switch_is_here():
    assert set(CHANGES) == set(Compat.model_fields)


@pytest.fixture(scope="module")
def observe(model, tmp_path_factory):
    """compat block -> all that can be observed with it, by name."""
    folder = tmp_path_factory.mktemp("compat")
    rows = tiny_runs.rows_file(folder / "rows.parquet", 4)
    rewards = [{"name": name} for name in ("format", "qa_accuracy", "oc_accuracy", "t2i_ti_sim")]
    make = functools.partial(make_mesh, devices=jax.devices()[:1])

    @functools.cache
    def observed(switch: str | None) -> dict:
        tree = tiny_runs.options(model, rows, folder / "run", rewards=rewards)
        tree["compat"] = {switch: True} if switch else {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resolve, "make_mesh", make)
            plan = resolve.resolve_run(config_files.validate(tree, "test"))
        run, state = build.build(plan, Phases())
        scoring = build.make_update_options(plan).logprobs
        scored = logprobs(plan.sizes, scoring)
        return {**dtypes(run, state), **samplers(run), **scored, **scores(plan, run)}

    return observed


def dtypes(run, state) -> dict:
    def of(tree):
        return sorted({str(leaf.dtype) for leaf in jax.tree.leaves(tree) if leaf.ndim})

    return {
        "trained dtypes": of(state.params),
        "optimizer dtypes": of(state.opt_state),
        "frozen dtypes": of(run.frozen),
        "compute dtype": str(jnp.dtype(run.dtype)),
    }


def samplers(run) -> dict:
    """What each task's sampler is called with."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sample_images", "sample_text"):
            patch.setattr(sampling, name, lambda *_, **keywords: keywords)
        options = {task: sampler(None, None, None)[0] for task, sampler in run.samplers.items()}
    return {f"sampler of {task}": sorted(map(str, keys.items())) for task, keys in options.items()}


@functools.cache
def logprobs(config, scoring) -> dict:
    """Of one batch of each task, under the plan's scoring."""
    batch = tiny_runs.both_tasks(config, 2, 1)

    @jax.jit
    def compute(params):
        found = {
            task: FAMILY.turns[part.turn_kinds].logprobs(
                config, params, part.prompts, part.segments, scoring
            )
            for task, part in batch.items()
        }
        return {task: logprobs for task, ((logprobs, _),) in found.items()}

    found = compute(tiny_runs.random_params(config))
    return {f"log-probs of {task}": np.asarray(x).tolist() for task, x in found.items()}


def scores(plan, run) -> dict:
    names = ("qa_problem", "qa_solution", "qa_type")
    columns = {name: [row[1 + i] for row in ANSWERS.values()] for i, name in enumerate(names)}
    texts = Samples(columns, texts=[row[0] for row in ANSWERS.values()])
    params = tiny_runs.random_params(plan.sizes, 1)
    context = Context(plan.family, plan.sizes, params, run.processor, jnp.float32, 0, 0)
    found = {
        f"{reward}: {case}": float(value)
        for reward, values in score(run.rewards["mm2t"], texts, context).items()
        for case, value in zip(ANSWERS, values, strict=True)
    }
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    drawn = Samples({"prompt": ["a red circle and two blue squares"]}, images=images)
    similarity = score(run.rewards["t2i"], drawn, context)["t2i_ti_sim"]
    return found | {"t2i_ti_sim": round(float(similarity[0]), 5)}


@pytest.mark.parametrize("switch", CHANGES)
def test_a_switch_changes_what_it_should_and_nothing_else(observe, switch):
    before, after = observe(None), observe(switch)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == CHANGES[switch]


def test_our_own_behaviour(observe):
    found = observe(None)
    assert found["trained dtypes"] == found["optimizer dtypes"] == ["float32"]
    assert str(("top_k", 0)) in found["sampler of mm2t"]
    for name in ("qa_accuracy: choice", "qa_accuracy: two lines", "format: white space around"):
        assert found[name] == 1.0, name
    assert found["qa_accuracy: nothing"] < 1 and found["format: nothing"] == 0


def test_the_released_behaviours(observe):
    assert observe("bfloat16_master")["trained dtypes"] == ["bfloat16"]
    assert observe("bfloat16_master")["optimizer dtypes"] == ["bfloat16"]
    assert str(("top_k", 50)) in observe("text_top_k_50")["sampler of mm2t"]
    assert observe("mc_as_open_ended")["qa_accuracy: choice"] == pytest.approx(0.25)
    assert observe("format_without_strip")["format: white space around"] == 0.0
    single = observe("answer_single_line")
    assert single["qa_accuracy: two lines"] < 1
    assert observe("format_repeated_blocks")["format: two answers"] == 1.0
    assert observe("answer_in_thoughts")["oc_accuracy: answer in thoughts"] == 0.0
    letters = observe("compare_by_letters")
    assert letters["qa_accuracy: number"] == pytest.approx(2 / 3)
    assert letters["oc_accuracy: two classes"] == pytest.approx(0.9)


def test_unshifted_image_logprobs_are_of_the_state_after_the_token(tiny_config):
    """Q1: what our own scoring gives the next token's place, read at this token."""
    config = tiny_config
    part = tiny_runs.both_tasks(config, 2, 1)["t2i"]
    (codes,) = part.segments
    scoring = LogprobOptions(tiny_runs.SPECIAL, unshifted=True, remat="none")
    seen = np.concatenate([part.prompts.attention_mask, codes.mask], axis=1)

    @jax.jit
    def both(params):
        model = network.bind(config, params)
        prompt = model.embed_text(part.prompts.input_ids)
        embeds = jnp.concatenate([prompt, model.embed_image_tokens(codes.values)], axis=1)
        logits = model.image_logits(model.language_model(embeds, seen)[:, prompt.shape[1] :])
        wanted = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.asarray(codes.values)[..., None], axis=-1
        )
        return image_logprobs(model, part.prompts, codes.values, scoring)[0], wanted[..., 0]

    np.testing.assert_allclose(*both(tiny_runs.random_params(config)), atol=1e-4)
