"""A whole training step against PyTorch: transformers' Janus, a loss written token by token,
autograd, torch.optim. Nothing below the random inputs is shared with our own computation."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS, LossConstants
from corl_jax.config import schema
from corl_jax.params import leaf_paths, merge, partition
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus.family import FAMILY
from corl_jax.train import step
from corl_jax.train.optimizer import learning_rate, make_optimizer
from tests.parity import torch_janus
from tests.support.tiny_runs import SPECIAL, both_tasks
from tests.support.tolerances import LOGPROBS, NETWORK

pytestmark = pytest.mark.usefixtures("exact_products")

PROMPTS, GROUP = 2, 3
TEMPERATURE, KL, LOW, HIGH = 0.9, 0.3, 0.2, 0.28
WEIGHTS = {"t2i": 1.0, "mm2t": 0.7}
UPDATES = 4  # of the whole run; the learning rate reaches 0 after the last
SIZES = {
    "llama": {"num_hidden_layers": 2, "num_key_value_heads": 2},
    "vision": {"num_hidden_layers": 1},
}
# Without the image tokenizer, of which no loss depends.
TRAINABLE = [r"(?!vqmodel).*"]
# A large eps: Adam divides a gradient by its own size, so where it is next to 0 the update
# would be the sign of a rounding error.
EPS = 1e-3
OPTIMIZER = schema.Optimizer(learning_rate=1e-2, weight_decay=0.1, b2=0.99, max_grad_norm=0.5)
OPTIONS = step.UpdateOptions(
    loss=CLIPPED_POLICY_LOSS,
    constants=LossConstants(kl_coef=KL, clip_low=LOW, clip_high=HIGH),
    logprobs=LogprobOptions(SPECIAL, temperature=TEMPERATURE, remat="full", chunk=30),
    weights=tuple(WEIGHTS.items()),
    dtype=jnp.float32, micro_batches=2,
)  # fmt: skip


# ---- PyTorch


def tensor(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def logits_of(model, task: str, batch: step.TaskBatch) -> torch.Tensor:
    """Logits [N, T, classes] that score each token, from one pass over prompt and completion."""
    ids, mask = (
        tensor(x).repeat_interleave(GROUP, 0)
        for x in (batch.prompts.input_ids, batch.prompts.attention_mask)
    )
    tokens = tensor(batch.segments[0].values).long()
    ids, width = ids.long(), ids.shape[1]
    if task == "t2i":
        read = model.prepare_embeddings_for_image_generation(tokens)
        embeds = torch.cat([model.get_input_embeddings()(ids), read], dim=1)
        mask = torch.cat([mask, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions(mask)
        ).last_hidden_state
        return model.model.generation_head(hidden[:, width - 1 : -1])
    pixels = tensor(batch.prompts.pixel_values.transpose(0, 3, 1, 2)).repeat_interleave(GROUP, 0)
    mask = torch.cat([mask, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
    return model(
        input_ids=torch.cat([ids, tokens], dim=1), pixel_values=pixels,
        attention_mask=mask.long(), position_ids=positions(mask),
    ).logits[:, width - 1 : -1]  # fmt: skip


def torch_logprobs(model, task, batch) -> torch.Tensor:
    logp = torch.log_softmax(logits_of(model, task, batch) / TEMPERATURE, dim=-1)
    return logp.gather(-1, tensor(batch.segments[0].values).long()[..., None])[..., 0]


def torch_loss(model, batch: step.Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """(loss, metrics), the formula of the specification one token at a time."""
    total, metrics = torch.zeros(()), {}
    for task, part in batch.items():
        logp = torch_logprobs(model, task, part)
        rows, kls, clipped = [], [], []
        for n in range(logp.shape[0]):
            kept = [t for t in range(logp.shape[1]) if part.segments[0].mask[n, t]]
            losses = []
            for t in kept:
                advantage = float(part.advantages[n])
                ratio = torch.exp(logp[n, t] - float(part.old_logprobs[0][n, t]))
                bounded = torch.clamp(ratio, 1 - LOW, 1 + HIGH)
                delta = float(part.ref_logprobs[0][n, t]) - logp[n, t]
                kl = torch.exp(delta) - delta - 1
                losses.append(-torch.minimum(ratio * advantage, bounded * advantage) + KL * kl)
                kls.append(kl.item())
                clipped.append(bool(bounded * advantage < ratio * advantage))
            if kept:
                rows.append(torch.stack(losses).mean())
        loss = torch.stack(rows).mean()
        metrics[f"{task}/loss"] = loss.item()
        metrics[f"{task}/kl"] = float(np.mean(kls))
        metrics[f"{task}/clip_ratio/region_mean"] = float(np.mean(clipped))
        total = total + WEIGHTS[task] * loss
    return total, metrics | {"loss": total.item()}


# ---- both


@pytest.fixture(scope="module")
def case():
    """One model twice, and a batch with old and reference log-probs away from the policy's."""
    torch_model = torch_janus.tiny_model(**SIZES)
    config = torch_janus.jax_config(torch_model.config)
    params = torch_janus.params_of(torch_model)
    reference = torch_janus.tiny_model(**SIZES)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in reference.model.language_model.parameters():
            parameter *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
    batch = both_tasks(config, PROMPTS, GROUP)
    rng = np.random.default_rng(3)
    old, expected_ref = {}, {}
    with torch.no_grad():
        for task, part in batch.items():
            logp = torch_logprobs(torch_model, task, part).numpy()
            # Far enough for the clip to act on some tokens, on both sides.
            old[task] = (logp + rng.normal(0, 0.3, logp.shape)).astype(np.float32)
            expected_ref[task] = torch_logprobs(reference, task, part).numpy()
    ref_params = torch_janus.params_of(reference)
    return SimpleNamespace(
        torch=torch_model, config=config, params=params, batch=batch, old=old,
        ref_params=ref_params, expected_ref=expected_ref,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scored(case):
    """The batch with the reference's log-probs as our own scoring gives them."""
    score = step.make_logprob_step(FAMILY, case.config, OPTIONS)
    scores = score(*partition(case.ref_params, TRAINABLE), case.batch)
    return {
        task: dataclasses.replace(
            part, old_logprobs=(case.old[task],), ref_logprobs=(np.asarray(scores[task][0]),)
        )
        for task, part in case.batch.items()
    }


@pytest.fixture(scope="module")
def compute(case):
    return jax.jit(lambda *args: step.gradients(FAMILY, case.config, OPTIONS, *args))


@pytest.fixture(scope="module")
def found(case, scored, compute):
    grads, metrics = compute(*partition(case.params, TRAINABLE), scored)
    return jax.device_get(grads), jax.device_get(metrics)


@pytest.fixture(scope="module")
def expected(case, scored):
    torch_scored = {
        task: dataclasses.replace(part, ref_logprobs=(case.expected_ref[task],))
        for task, part in scored.items()
    }
    case.torch.zero_grad()
    loss, metrics = torch_loss(case.torch, torch_scored)
    loss.backward()
    grads, _ = partition(torch_janus.gradients_of(case.torch), TRAINABLE)
    return grads, metrics


def test_reference_logprobs(case, scored):
    for task, part in scored.items():
        error = np.abs(part.ref_logprobs[0] - case.expected_ref[task]).max()
        print(f"parity reference log-probs {task}: {error:.1e}")
        assert error < LOGPROBS
        assert np.abs(case.expected_ref[task] - case.old[task]).mean() > 0.05


def test_loss_and_metrics(found, expected):
    (_, metrics), (_, wanted) = found, expected
    for name, value in wanted.items():
        print(f"parity {name}: {metrics[name]:.6f}, difference {abs(metrics[name] - value):.1e}")
        assert metrics[name] == pytest.approx(value, abs=NETWORK, rel=NETWORK)
        assert abs(value) > 1e-3, f"{name}: a value this small proves nothing"
    for task in WEIGHTS:
        assert 0.05 < metrics[f"{task}/clip_ratio/region_mean"] < 0.6


def test_gradient_of_every_trained_parameter(found, expected):
    ours, theirs = dict(leaf_paths(found[0])), dict(leaf_paths(expected[0]))
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for path, wanted in theirs.items():
        size = np.abs(wanted).max()
        if path.startswith("vision_model") and path.endswith("k_proj/bias"):
            assert size < NETWORK  # shifts all scores of a query alike: no effect but rounding
            continue
        assert size > 1e-6, f"{path}: no gradient"
        error = np.abs(ours[path] - wanted).max() / size
        worst = max(worst, error)
        assert error < 1e-4, f"{path}: {error:.1e} of the largest"
    print(f"parity gradients: largest error {worst:.1e} of a parameter's largest")


def test_gradient_norm(found, expected):
    norms = [
        np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(grads)))
        for grads in (found[0], expected[0])
    ]
    assert norms[0] == pytest.approx(norms[1], rel=NETWORK)
    assert norms[1] > OPTIMIZER.max_grad_norm, "too small for the clip to act"


def test_two_updates_on_one_rollout(case, scored, compute):
    """Clip by global norm, AdamW, linear decay without warm-up; the old log-probs stay."""
    trained, frozen = partition(case.params, TRAINABLE)
    optimizer = make_optimizer(OPTIMIZER, UPDATES, EPS)
    apply = jax.jit(lambda state, grads: step.apply_gradients(state, grads, optimizer, 0.0))
    state = step.TrainState(jnp.int32(0), trained, optimizer.init(trained))

    model = torch_janus.tiny_model(**SIZES)
    parameters = [p for n, p in model.named_parameters() if "vqmodel" not in n]
    adam = torch.optim.AdamW(
        parameters, OPTIMIZER.learning_rate, (OPTIMIZER.b1, OPTIMIZER.b2), EPS,
        OPTIMIZER.weight_decay,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda done: 1 - done / UPDATES)
    for _ in range(2):
        grads, metrics = compute(state.params, frozen, scored)
        state, update = apply(state, grads)
        adam.zero_grad()
        loss, _ = torch_loss(model, scored)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.max_grad_norm)
        adam.step()
        schedule.step()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), abs=NETWORK, rel=NETWORK)
        assert float(update["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    ours = dict(leaf_paths(jax.device_get(merge(state.params, frozen))))
    before = dict(leaf_paths(case.params))
    errors = {}
    for path, wanted in leaf_paths(torch_janus.params_of(model)):
        errors[path] = np.abs(ours[path] - wanted).max()
        moved = np.abs(wanted - before[path]).max()
        assert (moved > 3e-4) == (not path.startswith("vqmodel")), f"{path} moved by {moved:.1e}"
    print(f"parity parameters after two updates: {max(errors.values()):.1e}")
    assert max(errors.values()) < NETWORK, max(errors, key=errors.get)


def test_adamw_alone_to_the_end_of_the_schedule():
    """The same gradients for both: clipped or not, until the learning rate is 0."""
    options = schema.Optimizer(learning_rate=1e-2, weight_decay=0.05)
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((5, 3)), "b": rng.standard_normal(7)}
    weights = {name: x.astype(np.float32) for name, x in weights.items()}
    theirs = {name: torch.nn.Parameter(tensor(x)) for name, x in weights.items()}
    adam = torch.optim.AdamW(
        theirs.values(), options.learning_rate, (options.b1, options.b2), EPS,
        options.weight_decay,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda done: 1 - done / UPDATES)
    optimizer = make_optimizer(options, UPDATES, EPS)
    state = step.TrainState(jnp.int32(0), weights, optimizer.init(weights))
    for update in range(UPDATES):
        size = (0.1, 30.0)[update % 2]  # global norm below and above 1
        grads = {name: np.float32(size) * x[::-1] / 5 for name, x in weights.items()}
        assert learning_rate(options, UPDATES)(update) == pytest.approx(schedule.get_last_lr()[0])
        state, metrics = step.apply_gradients(state, grads, optimizer, jnp.float32(0))
        norm = metrics["grad_norm"]
        for name, parameter in theirs.items():
            parameter.grad = tensor(grads[name])
        torch_norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        adam.step()
        schedule.step()
        assert float(norm) == pytest.approx(torch_norm.item(), rel=NETWORK)
        assert (float(norm) > 1) == (size > 1)
    for name, parameter in theirs.items():
        error = np.abs(np.asarray(state.params[name]) - parameter.detach().numpy()).max()
        print(f"parity AdamW {name}: {error:.1e}")
        assert error < 1e-6
    last = learning_rate(options, UPDATES)
    assert float(last(UPDATES)) == 0.0 and float(last(0)) == pytest.approx(1e-2)
