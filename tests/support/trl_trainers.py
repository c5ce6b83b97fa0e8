"""TRL's trainers without a model: their own losses and advantages of given arrays.

A trainer is made without its constructor. It has the attributes that the methods read, with the
defaults of TRL's config. Log-probs, completions and rewards are given in place of a model.
"""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

Arrays = dict[str, Any]
"""Names of `LossInputs` -> arrays."""

ARGUMENTS = {
    "delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1,
    "per_device_train_batch_size": 64, "gradient_accumulation_steps": 1,
    "gradient_checkpointing_kwargs": None,
}  # fmt: skip
ATTRIBUTES = {
    "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "grpo",
    "importance_sampling_level": "token", "top_entropy_quantile": 1.0, "use_vllm": False,
    "vllm_importance_sampling_correction": True, "off_policy_mask_threshold": None,
    "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_min": None,
    "scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize",
    "normalize_advantages": False, "reward_clip_range": None, "num_iterations": 1,
    "aux_loss_enabled": False, "_entropy_bonus_enabled": False, "environment_factories": None,
    "environments": None, "tools": None, "pad_to_multiple_of": None, "log_multimodal": False,
    "mask_truncated_completions": False, "current_gradient_accumulation_steps": 1,
    "chat_template_kwargs": {}, "ref_model": "reference", "_pending_extra_logs": {},
    "_pending_metrics": {},
}  # fmt: skip


def make_trainer(kind: type, attributes: dict[str, Any], **methods: Any) -> Any:
    """Returns a trainer of a kind; `attributes` also holds values of its `args`."""
    subclass = type("Trainer", (kind,), methods)
    trainer = subclass.__new__(subclass)
    arguments = {key: attributes[key] for key in ARGUMENTS if key in attributes}
    vars(trainer).update(ATTRIBUTES | attributes)
    trainer.args = SimpleNamespace(**ARGUMENTS | arguments)
    trainer.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    trainer.accelerator = SimpleNamespace(
        device="cpu", num_processes=1, process_index=0, gather=lambda x: x,
        reduce=lambda x, reduction: x, pad_across_processes=lambda x, dim, pad_index: x,
    )  # fmt: skip
    trainer._tokenizer = SimpleNamespace(pad_token_id=0)
    trainer._metrics = {"train": collections.defaultdict(list)}
    trainer._logs = collections.defaultdict(list)
    trainer._logs["rewards"] = collections.defaultdict(list)
    return trainer


def compute_loss(
    kind: type[GRPOTrainer] | type[RLOOTrainer], arrays: Arrays, **attributes: Any
) -> tuple[float, np.ndarray]:
    """Returns (loss, gradient in the log-probs) of a trainer for arrays [N, T] and [N].

    With old and sampler log-probs it applies the importance correction of `token_truncate` if
    `use_vllm` is True.
    """
    tensors = {name: torch.tensor(np.asarray(x)) for name, x in arrays.items() if x is not None}
    logprobs = tensors["logprobs"].requires_grad_()
    mask = tensors["mask"].long()
    trainer = make_trainer(
        kind, attributes | {"max_completion_length": mask.shape[1]},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, tensors["entropy"], None),
    )  # fmt: skip
    old = tensors["old_logprobs"]
    inputs = {
        "prompt_ids": torch.ones(len(mask), 1), "prompt_mask": torch.ones(len(mask), 1),
        "completion_ids": mask, "completion_mask": mask, "advantages": tensors["advantages"],
        "old_per_token_logps": old, "ref_per_token_logps": tensors["ref_logprobs"],
        "old_logps": (old * mask).sum(1), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    if attributes.get("use_vllm"):
        cap = attributes["vllm_importance_sampling_clip_max"]
        difference = (old - tensors["sampler_logprobs"]) * mask
        inputs["importance_sampling_ratio"] = difference.exp().clamp(max=cap)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), logprobs.grad.numpy()


def compute_advantages(
    kind: type[GRPOTrainer] | type[RLOOTrainer],
    rewards: np.ndarray,
    group_size: int,
    logprobs: np.ndarray | None = None,
    ref_logprobs: np.ndarray | None = None,
    **attributes: Any,
) -> np.ndarray:
    """Returns the advantages [N] of a trainer for rewards [F, N] and log-probs [N, T]."""
    functions, rows = rewards.shape
    length = 1 if logprobs is None else logprobs.shape[1]
    scored = iter([logprobs, ref_logprobs])

    def score(*_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        values = next(scored)
        return torch.zeros(rows, length) if values is None else torch.tensor(values), None, None

    ids = [[1] * length] * rows
    texts = [""] * rows
    completions = {
        GRPOTrainer: ([[1]] * rows, ids, None, texts, None, {}, None, None),
        RLOOTrainer: ([[1]] * rows, ids, texts),
    }
    trainer = make_trainer(
        kind, attributes | {
            "num_generations": group_size, "reward_weights": torch.ones(functions),
            "reward_funcs": [None] * functions,
            "reward_func_names": [str(i) for i in range(functions)],
        },
        _generate=lambda *_: completions[kind],
        _calculate_rewards=lambda *_: torch.tensor(rewards.T),
        _get_per_token_logps_and_entropies=score,
    )  # fmt: skip
    return trainer._generate_and_score_completions([{"prompt": ""}] * rows)["advantages"].numpy()
