"""One optimizer step against itself: split, recomputed or spread, it gives the same numbers."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.advantages import AdvantageOptions
from corl_jax.algorithms.divergences import k3_kl
from corl_jax.algorithms.losses import (
    CLIPPED_POLICY_LOSS,
    LossConstants,
    LossInputs,
)
from corl_jax.algorithms.recipes import RECIPES
from corl_jax.config import schema
from corl_jax.devices.mesh import batch_sharding, make_mesh, param_shardings
from corl_jax.devices.offload import Offloadable
from corl_jax.errors import InputError
from corl_jax.metrics import Metric
from corl_jax.params import leaf_paths, merge, partition
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.chunked_logprobs import chunked_logprobs
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus import network, sampling
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.layout import RULES, TRAINABLE
from corl_jax.policies.packing import Blocks
from corl_jax.runs.pace import Phases
from corl_jax.train import iteration as rl_iteration
from corl_jax.train import states, step
from corl_jax.train.optimizer import make_optimizer, master_dtype
from corl_jax.train.reference import make_fixed_reference
from corl_jax.train.stages import STAGES
from corl_jax.types import Rollout
from tests.support.tiny_models import LAYOUTS, divisible, layout_name, two_layers
from tests.support.tiny_runs import SPECIAL, both_tasks, place_params, random_params
from tests.support.tolerances import LOGPROBS, NETWORK

pytestmark = pytest.mark.usefixtures("exact_products")

PROMPTS, GROUP = 8, 2
WEIGHTS = (("t2i", 1.0), ("mm2t", 0.7))
LOGPROB_OPTIONS = LogprobOptions(SPECIAL, temperature=0.9, remat="none", chunk=10_000)
OPTIONS = step.UpdateOptions(
    CLIPPED_POLICY_LOSS, LossConstants(kl_coef=0.2), LOGPROB_OPTIONS, WEIGHTS, dtype=jnp.float32
)


@pytest.fixture(scope="module")
def config(tiny_config):
    return divisible(two_layers(tiny_config))


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture(scope="module")
def batch(config):
    """Ragged answers, two of them masked out whole; old and reference log-probs of anyone."""
    rng = np.random.default_rng(9)

    def completed(task: step.TaskBatch, level: float) -> step.TaskBatch:
        (segment,) = task.segments
        old, ref, drawn = (
            (level + rng.normal(0, 0.4, segment.values.shape)).astype(np.float32) for _ in range(3)
        )
        return dataclasses.replace(
            task,
            segments=(dataclasses.replace(segment, logprobs=drawn),),
            old_logprobs=(old,),
            ref_logprobs=(ref,),
        )

    tasks = both_tasks(config, PROMPTS, GROUP)
    return {"t2i": completed(tasks["t2i"], -3.9), "mm2t": completed(tasks["mm2t"], -4.6)}


@functools.cache
def gradient_program(config, options):
    return jax.jit(lambda *args: step.gradients(FAMILY, config, options, *args))


def gradients(config, options, trained, frozen, batch):
    return jax.device_get(gradient_program(config, options)(trained, frozen, batch))


@pytest.fixture(scope="module")
def whole(config, params, batch):
    """(gradients, metrics) in one piece on one device."""
    return gradients(config, OPTIONS, *partition(params, TRAINABLE), batch)


def assert_same(found, expected, tolerance: float) -> float:
    """Loss and metrics within `tolerance`, gradients within it times their largest; the error."""
    (grads, metrics), (wanted_grads, wanted) = found, expected
    assert metrics.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(
            metrics[name], wanted[name], rtol=tolerance, atol=tolerance, err_msg=name
        )
    worst, theirs = 0.0, dict(leaf_paths(wanted_grads))
    for path, leaf in leaf_paths(grads):
        worst = max(worst, np.abs(leaf - theirs[path]).max() / np.abs(theirs[path]).max())
        assert worst < tolerance, path
    print(f"largest gradient error {worst:.1e}")
    return worst


def test_the_batch_is_worth_testing(batch, whole):
    grads, metrics = whole
    lengths = batch["mm2t"].segments[0].mask.sum(axis=1)
    assert (lengths == 0).sum() >= 2 and len(set(lengths.tolist())) > 4
    assert (~batch["mm2t"].prompts.attention_mask[:, 0]).all()
    assert all(0.05 < metrics[f"{task}/clip_ratio/region_mean"] < 0.9 for task, _ in WEIGHTS)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("micro_batches", "changes"),
    [
        (2, {"remat": "dots"}),
        (4, {"chunk": 9}),  # two tokens of each of a piece's rows at once
        (1, {"remat": "full", "chunk": 7}),  # fewer than rows: one token at a time
    ],
)
def test_splitting_and_recomputing_change_nothing(
    config, params, batch, whole, micro_batches, changes
):
    options = dataclasses.replace(
        OPTIONS,
        logprobs=dataclasses.replace(LOGPROB_OPTIONS, **changes),
        micro_batches=micro_batches,
    )
    found = gradients(config, options, *partition(params, TRAINABLE), batch)
    assert_same(found, whole, NETWORK)


@pytest.mark.parametrize("axes", LAYOUTS, ids=layout_name)
@pytest.mark.usefixtures("compiled_anew")
def test_devices_change_nothing(config, params, batch, whole, axes, capfd):
    mesh = make_mesh(*axes)
    trained, frozen = (place_params(part, mesh, RULES) for part in partition(params, TRAINABLE))
    spread = jax.device_put(batch, batch_sharding(mesh))
    # Pieces interleave the prompts, of which each must have as many as there are ways.
    pieces = 2 if axes[0] * axes[1] * 2 <= PROMPTS else 1
    options = dataclasses.replace(OPTIONS, micro_batches=pieces)
    program = jax.jit(
        lambda *args: step.gradients(FAMILY, config, options, *args),
        out_shardings=(param_shardings(trained, mesh, RULES), None),
    )
    with jax.set_mesh(mesh):
        found = jax.device_get(program(trained, frozen, spread))
    assert_same(found, whole, NETWORK)
    assert "rematerialization" not in capfd.readouterr().err, "XLA found no way between layouts"


# ---- log-probs


@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("chunk", [1, 3, 12, 24, 36, 1000])
def test_chunks_do_not_show(length, chunk):
    rng = np.random.default_rng(length)
    head = rng.standard_normal((4, 9)).astype(np.float32)
    hidden = rng.standard_normal((3, length, 4)).astype(np.float32)
    tokens = rng.integers(0, 9, (3, length))
    logits = (hidden @ head).astype(np.float64) / 0.7
    normalised = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    found, entropy = chunked_logprobs(lambda x: x @ head, jnp.asarray(hidden), tokens, 0.7, chunk)
    wanted = np.take_along_axis(normalised, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found, wanted, atol=LOGPROBS)
    np.testing.assert_allclose(
        entropy, -(np.exp(normalised) * normalised).sum(axis=-1), atol=LOGPROBS
    )


def test_logits_are_never_whole(config, params, batch):
    """Of [rows, T, V], only [rows, chunk, V] appears in the gradient's program."""
    rows, length = batch["mm2t"].segments[0].values.shape
    logprobs = dataclasses.replace(LOGPROB_OPTIONS, chunk=2 * rows)
    options = dataclasses.replace(OPTIONS, logprobs=logprobs)
    text = str(
        jax.make_jaxpr(lambda *args: step.gradients(FAMILY, config, options, *args))(
            *partition(params, TRAINABLE), batch
        )
    )
    vocabulary = config.llama.vocab_size
    assert f"f32[{rows},2,{vocabulary}]" in text
    assert f"f32[{rows},{length},{vocabulary}]" not in text
    assert f"[{length // 2},{rows},2,{vocabulary}]" not in text


score_program = functools.cache(step.make_logprob_step)


def score(config, params, batch, **changes):
    logprobs = dataclasses.replace(LOGPROB_OPTIONS, **changes)
    options = dataclasses.replace(OPTIONS, logprobs=logprobs)
    scored = score_program(FAMILY, config, options)(*partition(params, TRAINABLE), batch)
    return {task: logprobs for task, (logprobs,) in jax.device_get(scored).items()}


def test_guidance_of_scale_one_is_none(config, params, batch):
    drawings = {"t2i": batch["t2i"]}
    plain = score(config, params, drawings)["t2i"]
    guided = {"image_logprobs": "guided"}
    same = score(config, params, drawings, **guided, cfg_scale=1.0)["t2i"]
    np.testing.assert_allclose(same, plain, atol=LOGPROBS)
    other = score(config, params, drawings, **guided, cfg_scale=3.0)["t2i"]
    assert np.abs(other - plain).mean() > 0.1


@pytest.mark.parametrize("image_logprobs", ["conditional", "guided"])
def test_what_was_recorded_in_sampling_is_what_the_trainer_computes(
    config, params, batch, image_logprobs
):
    keys = sample_keys(0, np.arange(PROMPTS), GROUP)
    common = {"special": SPECIAL, "temperature": LOGPROB_OPTIONS.temperature, "dtype": jnp.float32}
    segments = {
        "t2i": sampling.sample_images(
            config, params, batch["t2i"].prompts, keys,
            cfg_scale=3.0, image_logprobs=image_logprobs, **common,
        )
    }  # fmt: skip
    if image_logprobs == "conditional":
        segments["mm2t"] = sampling.sample_text(
            config, params, batch["mm2t"].prompts, keys, max_new_tokens=8, **common
        )
    drawn = {
        task: step.TaskBatch(batch[task].prompts, (segment,)) for task, segment in segments.items()
    }
    found = score(config, params, drawn, image_logprobs=image_logprobs, cfg_scale=3.0)
    for task, segment in segments.items():
        error = np.where(segment.mask, np.abs(found[task] - segment.logprobs), 0).max()
        print(f"{task} {image_logprobs}: sampler against trainer {error:.1e}")
        assert error < LOGPROBS


def test_scoring_in_pieces_keeps_the_rows_in_order(config, params, batch):
    options = dataclasses.replace(OPTIONS, micro_batches=4)
    split = step.make_logprob_step(FAMILY, config, options)(*partition(params, TRAINABLE), batch)
    for task, scores in score(config, params, batch).items():
        (logprobs,) = split[task]
        np.testing.assert_allclose(logprobs, scores, atol=LOGPROBS)


# ---- several updates on one rollout


def test_the_first_update_has_ratio_one(config, params, batch):
    """Old log-probs that were just scored: nothing is clipped, the loss is advantages and KL."""
    scores = score(config, params, batch)
    first = {t: dataclasses.replace(b, old_logprobs=(scores[t],)) for t, b in batch.items()}
    _, metrics = gradients(config, OPTIONS, *partition(params, TRAINABLE), first)
    for task, part in first.items():
        assert metrics[f"{task}/clip_ratio/region_mean"] == 0
        kl = np.asarray(k3_kl(scores[task], part.ref_logprobs[0]))
        (segment,) = part.segments
        counts = segment.mask.sum(axis=1)
        rows = np.where(segment.mask, kl, 0).sum(axis=1)[counts > 0] / counts[counts > 0]
        wanted = (OPTIONS.constants.kl_coef * rows - part.advantages[counts > 0]).mean()
        assert metrics[f"{task}/loss"] == pytest.approx(wanted, abs=LOGPROBS)


class Recording:
    """Stands for the jitted functions of a run and keeps what they were called with."""

    def __init__(self):
        self.scored, self.trained = [], []

    def score(self, params, frozen, batch):
        self.scored.append(params["w"])
        return {
            task: tuple(np.full(x.values.shape, len(self.scored)) for x in part.segments)
            for task, part in batch.items()
        }

    def train(self, state, frozen, batch):
        self.trained.append(batch)
        count = len(self.trained)
        metrics = {"loss": Metric(count), "t2i/sampling/x": Metric(10 * count, "first")}
        return step.TrainState(state.step + 1, {"w": state.params["w"] + 1}, None), metrics


def recorded_iteration(monkeypatch, batch, **changes):
    """(recording, metrics) of one iteration whose network is stood in for."""
    rollouts = {
        task: Rollout(part.prompts, jax.tree.map(jnp.asarray, part.segments))
        for task, part in batch.items()
    }
    monkeypatch.setattr(rl_iteration, "sample", lambda run, task, *_: rollouts[task])
    rewards = np.arange(PROMPTS * GROUP, dtype=np.float32)
    monkeypatch.setattr(rl_iteration, "decode", lambda *_: rewards)
    monkeypatch.setattr(rl_iteration, "score_samples", lambda *_: ({"r": rewards}, {}))
    calls = Recording()
    run = SimpleNamespace(**{
        "tasks": ("t2i", "mm2t"), "alternate_every": 0, "phases": Phases(),
        "family": FAMILY, "mesh": make_mesh(8), "frozen": {}, "moving": None, "kl_penalty": None,
        "redraws": 0, "greedy_samplers": None, "answer_blocks": Blocks(8, 1),
        "num_iterations": 1, "mask_truncated": False, "reference": None, "group_size": GROUP,
        "train_step": calls.train, "logprob_step": calls.score,
        "processor": SimpleNamespace(special=SPECIAL),
        "recipe": RECIPES["grpo"],
        "advantage_options": AdvantageOptions(
            reward_weights=(("t2i", (1.0,)), ("mm2t", (1.0,))),
            task_weights=(("t2i", 1.0), ("mm2t", 0.8)),
            mode="unified_reward", group_size=GROUP, eps=1e-4, scale="group",
        ),
    } | changes)  # fmt: skip
    state = step.TrainState(0, {"w": 5}, None)
    state, iteration = rl_iteration.rl_iteration(run, state, None, 0)
    assert state.step == run.num_iterations
    return calls, iteration.metrics


def test_old_logprobs_are_scored_once_and_kept(monkeypatch, batch):
    calls, metrics = recorded_iteration(monkeypatch, batch, num_iterations=3)
    assert calls.scored == [5]  # by the policy that sampled
    assert len(calls.trained) == 3
    for used in calls.trained:
        assert all((part.old_logprobs[0] == 1).all() for part in used.values())
    # The last update's numbers, but the sampler's against the policy that sampled.
    assert metrics["loss"].value == 3 and metrics["t2i/sampling/x"].value == 10


def test_one_update_needs_no_old_logprobs(monkeypatch, batch):
    calls, _ = recorded_iteration(monkeypatch, batch)
    assert not calls.scored
    assert all(part.old_logprobs is None for part in calls.trained[0].values())


def test_the_reference_scores_with_its_own_parameters(monkeypatch, batch):
    reference = Offloadable({"w": -1}, jax.devices()[0])
    calls, _ = recorded_iteration(monkeypatch, batch, num_iterations=2, reference=reference)
    assert calls.scored == [5, -1]
    for part in calls.trained[1].values():
        assert (part.old_logprobs[0] == 1).all() and (part.ref_logprobs[0] == 2).all()


def test_a_reference_may_rest_in_host_memory(config, params):
    mesh = make_mesh(2, 2, 2)
    trained = place_params(partition(params, TRAINABLE)[0], mesh, RULES)
    kinds = {}
    for place in ("device", "host"):
        block = schema.Algorithm(kl_coef=0.1, reference=place)
        plan = SimpleNamespace(
            config=SimpleNamespace(
                algorithm=block, model=schema.Model(path="x"), lora=schema.Lora()
            ),
            stage=STAGES["rl"], family=FAMILY, mesh=mesh,
        )  # fmt: skip
        offloadable = make_fixed_reference(plan, trained)
        (kinds[place],) = {x.sharding.memory_kind for x in jax.tree.leaves(offloadable._params)}
        with offloadable.use() as reference:
            for (path, found), one in zip(
                leaf_paths(reference), jax.tree.leaves(trained), strict=True
            ):
                np.testing.assert_array_equal(found, one.astype(jnp.bfloat16), err_msg=path)
                assert found.sharding.is_equivalent_to(one.sharding, one.ndim), path
        assert all(x.is_deleted() == (place == "host") for x in jax.tree.leaves(reference))
    assert kinds["host"].endswith("host") and kinds["device"] != kinds["host"]
    options = SimpleNamespace(algorithm=schema.Algorithm())
    plan = SimpleNamespace(config=options, stage=STAGES["rl"], family=FAMILY, mesh=mesh)
    assert make_fixed_reference(plan, trained) is None


def test_truncated_answers_are_left_out_but_never_images(monkeypatch, batch):
    (codes,), (text,) = batch["t2i"].segments, batch["mm2t"].segments
    tokens = np.array(text.values)
    tokens[tokens == SPECIAL.eos] = 5
    closed = np.arange(len(tokens)) % 3 == 0
    last = np.maximum(text.mask.sum(axis=1) - 1, 0)
    tokens[closed, last[closed]] = SPECIAL.eos
    closed &= text.mask.any(axis=1)
    # Codes of an image may be any number, that of EOS included, or never it.
    drawn = np.where(codes.values == SPECIAL.eos, 7, codes.values)
    changed = {
        "t2i": dataclasses.replace(codes, values=drawn),
        "mm2t": dataclasses.replace(text, values=tokens),
    }
    batch = {t: dataclasses.replace(b, segments=(changed[t],)) for t, b in batch.items()}
    for masked in (True, False):
        calls, metrics = recorded_iteration(monkeypatch, batch, mask_truncated=masked)
        (used,) = calls.trained
        assert np.asarray(used["t2i"].segments[0].mask).all()
        kept = text.mask & (closed[:, None] | (not masked))
        np.testing.assert_array_equal(used["mm2t"].segments[0].mask, kept)
        assert float(metrics["mm2t/completions/clipped_ratio"]) == pytest.approx(1 - closed.mean())


# ---- the state


@pytest.fixture(scope="module", params=["adamw", "adafactor", "lion", "sgd"])
def stepped(request, params):
    """(parameters before, state, metrics) of an update on a mesh, laid out as a run does it."""
    mesh = make_mesh(2, 2, 2)
    optimizer = make_optimizer(
        schema.Optimizer(name=request.param, learning_rate=1e-3, weight_decay=0.01), 10
    )
    trained, frozen = (place_params(part, mesh, RULES) for part in partition(params, TRAINABLE))
    shardings = states.state_shardings(optimizer, trained, mesh, RULES)
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
        state = jax.device_put(step.TrainState(jnp.int32(0), trained, opt_state), shardings)
        state, update = jax.jit(
            lambda state, grads: step.apply_gradients(state, grads, optimizer, jnp.float32(1)),
            out_shardings=(shardings, None),
        )(state, jax.tree.map(jnp.ones_like, state.params))
    return SimpleNamespace(
        before=params, state=state, frozen=frozen, norm=update["grad_norm"], shardings=shardings
    )


def test_a_step_moves_what_is_trained_and_keeps_its_layout(stepped):
    before = dict(leaf_paths(stepped.before))
    assert int(stepped.state.step) == 1
    size = sum(leaf.size for leaf in jax.tree.leaves(stepped.state.params))
    assert float(stepped.norm) == pytest.approx(np.sqrt(size), rel=1e-5)
    trained = dict(leaf_paths(jax.device_get(stepped.state.params)))
    assert {path.split("/")[0] for path in trained} == {"language_model", "lm_head"}
    for path, leaf in trained.items():
        assert leaf.dtype == np.float32 and np.abs(leaf - before[path]).max() > 1e-6, path
    for path, leaf in leaf_paths(jax.device_get(stepped.frozen)):
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    layouts = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), stepped.state, stepped.shardings
    )
    assert all(jax.tree.leaves(layouts))


def test_moments_lie_as_their_parameters(config, params):
    mesh = make_mesh(2, 2, 2)
    trained = place_params(partition(params, TRAINABLE)[0], mesh, RULES)
    optimizer = make_optimizer(schema.Optimizer(), 10)
    moments = [
        leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            states.state_shardings(optimizer, trained, mesh, RULES).opt_state
        )
        if "q_proj" in jax.tree_util.keystr(path)
    ]
    wanted = trained["language_model"]["layers"]["attn"]["q_proj"]["kernel"].sharding.spec
    assert moments == [wanted, wanted] and any(wanted)


# ---- what is trained


def test_partition_by_regex(params):
    trained, frozen = partition(params, ["language_model/layers/.*/kernel", "lm_head/kernel"])
    paths = {path for path, _ in leaf_paths(trained)}
    assert "lm_head/kernel" in paths and "language_model/layers/mlp/up_proj/kernel" in paths
    assert not any(path.endswith("scale") or "embed" in path for path in paths)
    assert jax.tree.structure(merge(trained, frozen)) == jax.tree.structure(params)
    everything, nothing = partition(params, [".*"])
    assert nothing == {} and len(jax.tree.leaves(everything)) == len(jax.tree.leaves(params))


def test_patterns_are_of_whole_paths(params):
    assert {path for path, _ in leaf_paths(partition(params, ["lm_head/k.*"])[0])} == {
        "lm_head/kernel"
    }
    with pytest.raises(InputError) as error:
        partition(params, ["lm_head", "(", "languag_model/.*", "lm_head/.*"])
    first, second, third = error.value.problems
    assert "'lm_head' matches no parameter path; paths start with aligner, " in first
    assert "'(' is no regular expression" in second
    assert "'languag_model/.*'" in third


def test_compute_dtype_leaves_master_weights_alone(config, params, batch):
    """bfloat16 products, float32 gradients and parameters."""
    trained, frozen = partition(params, TRAINABLE)
    options = dataclasses.replace(OPTIONS, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(
        lambda *args: step.gradients(FAMILY, config, options, *args), trained, frozen, batch
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert jnp.dtype(master_dtype(False)) == np.dtype("float32")
    part = batch["t2i"]
    (hidden,) = jax.eval_shape(lambda: FAMILY.turns[part.turn_kinds].logprobs(
        config, network.cast(params, jnp.bfloat16), part.prompts, part.segments, LOGPROB_OPTIONS
    ))  # fmt: skip
    assert {leaf.dtype for leaf in hidden} == {jnp.dtype("float32")}


def test_a_batch_without_any_kept_token_is_harmless(config, params, batch):
    """All answers truncated and masked: no loss, no NaN, the images still count."""
    part = batch["mm2t"]
    (old,), (ref,) = part.old_logprobs, part.ref_logprobs
    nothing = np.zeros_like(part.segments[0].mask)
    inputs = LossInputs(jnp.asarray(old), nothing, part.advantages, old, ref)
    total, rows, sums = CLIPPED_POLICY_LOSS.compute(inputs, LossConstants(kl_coef=0.2))
    assert float(total) == 0 and float(rows) == 0
    assert float(OPTIONS.loss.count(nothing, LossConstants())) == 0
    assert all(float(value) == 0 for value, _ in sums.values())


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_keeps_the_dtypes_of_its_state(config, params, batch, bfloat16, micro_batches):
    """So that the second step is the same program: in float32, and in the released bfloat16."""
    trained, frozen = partition(params, TRAINABLE)
    trained = jax.tree.map(lambda x: x.astype(master_dtype(bfloat16)), trained)
    optimizer = make_optimizer(schema.Optimizer(), 10)
    state = step.TrainState(jnp.int32(0), trained, optimizer.init(trained))
    options = dataclasses.replace(OPTIONS, micro_batches=micro_batches, dtype=jnp.bfloat16)
    after, _ = jax.eval_shape(
        step.make_train_step(FAMILY, config, options, optimizer), state, frozen, batch
    )
    kinds = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (state, after)]
    assert kinds[0] == kinds[1]
