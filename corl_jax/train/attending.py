"""Chooses the attention kernels of a run. Devices need not be present: a description is enough."""

from __future__ import annotations

from jax.sharding import Mesh

from corl_jax.config.schema import Config
from corl_jax.devices.compiling import has_deterministic_flag
from corl_jax.models import attention
from corl_jax.models.attention import KERNELS, AttentionKernel, can_run, choose_training_kernel
from corl_jax.tasks import image_tasks
from corl_jax.train.stages import STAGES


def choose_update_kernel(config: Config, head_dim: int, mesh: Mesh) -> AttentionKernel:
    """Returns the kernel that `model.attention` selects on this mesh for the update."""
    # The devices of a mesh are of one kind, so the first one speaks for all.
    choice, device = config.model.attention, mesh.devices.flat[0]
    if choice != "auto":
        return choice
    return choose_training_kernel(config.model.dtype, head_dim, device)


def choose_sampler_kernel(config: Config, head_dim: int, mesh: Mesh) -> attention.DecodeKernel:
    """Returns the kernel of a decode step."""
    return attention.choose_decode_kernel(config.model.dtype, head_dim, mesh.devices.flat[0])


def find_kernel_problems(config: Config, head_dim: int, mesh: Mesh) -> list[str]:
    """Returns why the devices cannot run the kernel that `model.attention` names."""
    choice, dtype, device = config.model.attention, config.model.dtype, mesh.devices.flat[0]
    if choice != "auto" and not can_run(choice, dtype, head_dim, device):
        return [
            f"model.attention: {choice}, which {device.platform} with model.dtype {dtype} and "
            f"heads of {head_dim} cannot run; expected {KERNELS[choice].needs}; set it to xla"
        ]
    if choice == "cudnn" and has_deterministic_flag() and _attends_to_alike_shapes(config):
        return [
            "model.attention: cudnn, whose gradients XLA's xla_gpu_deterministic_ops (XLA_FLAGS) "
            "breaks with guided log-probs and in sft (openxla/xla#46500); set it to auto or xla"
        ]
    return []


def _attends_to_alike_shapes(config: Config) -> bool:
    """Returns whether an update attends to several sequences of the same shapes."""
    # Guidance reads each row with and without its prompt. Supervised training may pad two kinds
    # of completions, such as answers and captions, to the same length.
    stage = STAGES[config.stage]
    if not stage.samples:
        return stage.uses_language_model
    guided = config.algorithm.image_logprobs == "guided"
    return guided and bool(image_tasks(stage.tasks(config)))
