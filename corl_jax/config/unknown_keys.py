"""Answers unknown keys: with their new name, with the option that was meant, or with a remedy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from corl_jax.config.options import (
    Location,
    find_section,
    find_type,
    group_keys_by_name,
    join_key,
    list_keys,
)
from corl_jax.nearest import find_near_name

RENAMED = {
    "algorithm.plan_loss_weight": "algorithm.earlier_loss_weight",
    "grpo": "algorithm",
    "objective": "stage, with the value rl, sft or vq",
}
"""Key of an earlier version -> its name now."""
REMOVED = {
    "algorithm.multi_objective_aggregation": "algorithm.name gdpo normalizes each reward",
    "algorithm.scale_by_std": "set algorithm.scale to group, batch or none",
    "algorithm.std_eps": "the value is 1e-4",
    "algorithm.t2i_loss_weight": "the value is 1; set algorithm.mm2t_loss_weight",
    "data.prefetch": "the value is 2",
    "data.system_prompt": "prompts have no system text",
    "export.base": "the model of model.path supplies the tensors that training drops",
    "log.fixed_prompts": "the value is 4",
    "optimizer.eps": "the value is 1e-8",
    "rollout.pixel_dtype": "the value is float32",
    "sft.answer_column": "the column is sft_answer; data.columns gives it another name",
    "sft.caption_weight": "the value is 1; sft.caption_column: null leaves captions out",
    "sft.cfg_dropout": "the value is 0.1",
    "sft.mm2t_weight": "the value is 1; set sft.t2i_weight",
    "vq": "the weights are constants of corl_jax/policies/FAMILY/tokenizer_training.py",
}
"""Key of an earlier version that has no successor -> what holds instead."""
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    # TRL's GRPOConfig
    "beta": ("algorithm.kl_coef",),
    "delta": ("algorithm.dual_clip",),
    "entropy_coef": (),
    "epsilon": ("algorithm.clip_low", "algorithm.clip_high"),
    "epsilon_high": ("algorithm.clip_high",),
    "generation_batch_size": ("rollout.batch_prompts",),
    "importance_sampling_level": ("algorithm.name",),
    "loss_type": ("algorithm.name", "algorithm.reduction"),
    "max_completion_length": ("rollout.max_new_tokens",),
    "multi_objective_aggregation": ("algorithm.name",),
    "normalize_advantages": ("algorithm.scale",),
    "num_generations": ("rollout.group_size",),
    "num_generations_eval": (),
    "ref_model_mixup_alpha": ("algorithm.reference_decay",),
    "ref_model_sync_steps": ("algorithm.reference_every",),
    "reward_weights": ("rewards",),
    "sapo_temperature_neg": (),
    "sapo_temperature_pos": (),
    "scale_rewards": ("algorithm.scale",),
    "sync_ref_model": ("algorithm.reference_every",),
    "top_entropy_quantile": ("algorithm.image_token_share",),
    "vllm_importance_sampling_cap": ("algorithm.importance_cap",),
    "vllm_importance_sampling_clip_max": ("algorithm.importance_cap",),
    "vllm_importance_sampling_correction": ("algorithm.importance_cap",),
    # TRL's ModelConfig and ScriptArguments, PEFT's LoraConfig
    "attn_implementation": ("model.attention",),
    "dataset_config": ("data.name",),
    "dataset_name": ("data.path",),
    "dataset_test_split": ("eval.split",),
    "dataset_train_split": ("data.split",),
    "lora_alpha": ("lora.alpha",),
    "lora_r": ("lora.rank",),
    "lora_target_modules": ("lora.targets",),
    "model_name_or_path": ("model.path",),
    "r": ("lora.rank",),
    "target_modules": ("lora.targets",),
    "torch_dtype": ("model.dtype",),
    "use_peft": ("lora.rank",),
    # TrainingArguments of transformers
    "adam_beta1": ("optimizer.b1",),
    "adam_beta2": ("optimizer.b2",),
    "bf16": ("model.dtype",),
    "data_seed": ("seed",),
    "ddp_timeout": (),
    "deepspeed": (),
    "do_eval": ("eval.suite",),
    "do_train": (),
    "eval_steps": ("eval.every",),
    "fp16": ("model.dtype",),
    "gradient_accumulation_steps": ("train.micro_batch",),
    "gradient_checkpointing": ("model.remat",),
    "logging_steps": ("log.every",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "num_train_epochs": ("train.epochs",),
    "optim": ("optimizer.name",),
    "per_device_eval_batch_size": ("eval.batch_prompts",),
    "per_device_train_batch_size": ("train.prompts_per_step", "train.micro_batch"),
    "save_steps": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "warmup_ratio": ("optimizer.warmup_steps",),
    # other trainers
    "adv_clip_max": ("algorithm.advantage_clip",),
    "adv_estimator": ("algorithm.name",),
    "batch_size": ("train.prompts_per_step",),
    "cfg_weight": ("rollout.cfg_scale",),
    "clip_range": ("algorithm.clip_low", "algorithm.clip_high"),
    "clip_ratio": ("algorithm.clip_low", "algorithm.clip_high"),
    "clip_ratio_c": ("algorithm.dual_clip",),
    "dataset": ("data.path",),
    "dp": ("mesh.data",),
    "ema": ("train.ema_decay",),
    "filter_groups": ("algorithm.redraws",),
    "grad_clip": ("optimizer.max_grad_norm",),
    "global_std": ("algorithm.scale",),
    "guidance": ("rollout.cfg_scale",),
    "guidance_scale": ("rollout.cfg_scale",),
    "kl_loss_type": ("algorithm.kl_estimator",),
    "loss_agg_mode": ("algorithm.reduction",),
    "max_num_gen_batches": ("algorithm.redraws",),
    "norm_adv_by_std_in_grpo": ("algorithm.scale",),
    "ppo_epochs": ("algorithm.num_iterations",),
    "save_freq": ("checkpoint.every",),
    "test_freq": ("eval.every",),
    "tis_imp_ratio_cap": ("algorithm.importance_cap",),
    "total_epochs": ("train.epochs",),
    "tp": ("mesh.tensor",),
    "train_batch_size": ("train.prompts_per_step",),
    "train_files": ("data.path",),
    "use_ema": ("train.ema_decay",),
    "use_kl_in_reward": ("algorithm.kl_in",),
    # names that mean something else within a block
    "algorithm.kl": ("algorithm.kl_coef",),
    "eval.batch_size": ("eval.batch_prompts",),
    "export.format": ("export.layout",),
    "lora.enabled": ("lora.rank",),
    "model.name": ("model.path",),
    "optimizer.beta": ("optimizer.b1", "optimizer.b2"),
    "optimizer.betas": ("optimizer.b1", "optimizer.b2"),
    "rollout.n": ("rollout.group_size",),
}
"""Name of an option in another library -> our options for it. Without one, none is suggested."""
REMEDIES = {
    "report_to": "metrics are in metrics.jsonl of output_dir; log.trackers names other places",
    "resume_from_checkpoint": "the same command again resumes its run",
}
"""Name of an option in another library -> what to do without one."""
SIMILAR_ELSEWHERE = 0.7  # of 1; with so many names some are similar by chance
MAX_KEYS = 20  # of an unknown block that are answered one by one


def explain_unknown_key(location: Location, value: Any) -> Iterator[tuple[Location, str]]:
    """Yields (location, problem) for an unknown key, or for the keys of an unknown block."""
    key, paths = join_key(location), list(itertools.islice(_list_paths(value), MAX_KEYS))
    if reason := REMOVED.get(key):
        yield location, f"is no option any more; {reason}; remove it"
        return
    if find_type(tuple(key.split("."))) is not None:
        # Only the command line splits a key at its dots.
        block, _, name = key.rpartition(".")
        yield location, f"unknown key; write {name} within the block {block}"
        return
    meant = _find_block(location)
    texts = {
        (*location, *path): suggest_option((*location, *path))
        for path in paths
        if meant is None or find_type((*meant, *path)) is None
    }
    yield from ((place, f"unknown key; {text}") for place, text in texts.items() if text)
    # modle.path and modle.dtype are answered by one line for modle, but modle.lr by its own.
    if paths and all(texts.get((*location, *path)) for path in paths):
        return
    if key in RENAMED:
        yield location, f"has a new name; use {RENAMED[key]}"
    elif paths and meant:
        yield location, f"unknown key; did you mean {join_key(meant)}?"
    else:
        yield location, f"unknown key; {suggest_option(location) or list_known_keys(location)}"


def _find_block(location: Location) -> Location | None:
    """Returns the location of the block that an unknown name of a block means."""
    *parent, name = location
    section = find_section(tuple(parent))
    near = RENAMED.get(join_key(location)) or find_near_name(
        str(name), section.model_fields if section else ()
    )
    return (*parent, near) if near and find_section((*parent, near)) else None


def suggest_option(location: Location) -> str | None:
    """Returns "did you mean train.max_steps?" or a remedy for an unknown key; None if none is near.

    The order: names of other libraries, options of the same name in other blocks, similar names in
    the key's own block, similar names in all blocks.
    """
    *parent, last = location
    name = str(last).lower().replace("-", "_")
    if remedy := REMEDIES.get(name):
        return remedy
    section = find_section(tuple(parent))
    siblings = list(section.model_fields) if section else []
    if any(isinstance(part, int) for part in parent):
        near = find_near_name(name, siblings)  # a reward has no option of another block
        keys = (join_key((*parent, near)),) if near else ()
    else:
        keys = _find_keys(tuple(map(str, parent)), name, siblings)
    return f"did you mean {_join_choices(keys)}?" if keys else None


def _find_keys(parent: tuple[str, ...], name: str, siblings: list[str]) -> Sequence[str]:
    """Returns the whole keys of the options that an unknown name of a block may mean."""
    key, by_name = join_key((*parent, name)), group_keys_by_name()
    for other_name in (key, name):
        if other_name in OTHER_NAMES:
            return OTHER_NAMES[other_name]
    whole_keys = {known.replace(".", "_"): known for known in list_keys()}
    if known := whole_keys.get(key.replace(".", "_")):
        return (known,)  # lora_rank -> lora.rank
    if name in by_name:
        return by_name[name]
    # A block is the last choice, because it takes no value of its own.
    own_options = [other for other in siblings if not find_section((*parent, other))]
    if near := find_near_name(name, own_options):
        return (join_key((*parent, near)),)
    if near := find_near_name(name, by_name, SIMILAR_ELSEWHERE):
        return by_name[near]
    near = find_near_name(name, siblings, SIMILAR_ELSEWHERE)
    return (join_key((*parent, near)),) if near else ()


def list_known_keys(location: Location) -> str:
    """Returns the known keys of the block of an unknown key."""
    section = find_section(location[:-1])
    place = f" in {join_key(location[:-1])}" if location[:-1] else ""
    return f"known{place}: {', '.join(section.model_fields if section else ())}"


def _list_paths(value: Any, prefix: Location = ()) -> Iterator[Location]:
    """Yields the location of each value in a block; none for a value that is no block."""
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _list_paths(inner, (*prefix, name))
        else:
            yield (*prefix, name)


def _join_choices(keys: Sequence[str]) -> str:
    """Returns "a, b or c"."""
    return " or ".join(filter(None, [", ".join(keys[:-1]), keys[-1]]))
