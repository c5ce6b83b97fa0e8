"""What a run attends with, on devices that need not be those present."""

from __future__ import annotations

from jax.sharding import Mesh

from corl_jax.config.schema import Config
from corl_jax.devices.compiling import has_deterministic_flag
from corl_jax.models import attention
from corl_jax.models.attention import KERNELS, AttentionKernel, can_run, choose_training_kernel
from corl_jax.policies.janus.network import JanusConfig


def of_update(config: Config, model: JanusConfig, mesh: Mesh) -> AttentionKernel:
    """What `model.attention` comes to on the mesh's devices."""
    wanted, device = config.model.attention, mesh.devices.flat[0]
    if wanted != "auto":
        return wanted
    return choose_training_kernel(config.model.dtype, model.llama.head_dim, device)


def of_samplers(config: Config, model: JanusConfig, mesh: Mesh) -> attention.DecodeKernel:
    """What a decode step attends with."""
    return attention.choose_decode_kernel(
        config.model.dtype, model.llama.head_dim, mesh.devices.flat[0]
    )


def problems(config: Config, model: JanusConfig, mesh: Mesh) -> list[str]:
    """Why the devices cannot attend as `model.attention` says."""
    wanted, dtype, device = config.model.attention, config.model.dtype, mesh.devices.flat[0]
    size = model.llama.head_dim
    if wanted != "auto" and not can_run(wanted, dtype, size, device):
        return [
            f"model.attention: {wanted}, which {device.platform} with model.dtype {dtype} and "
            f"heads of {size} cannot run; expected {KERNELS[wanted].needs}; set it to xla"
        ]
    if wanted == "cudnn" and has_deterministic_flag() and _has_alike_calls(config):
        return [
            "model.attention: cudnn, whose gradients XLA's xla_gpu_deterministic_ops (XLA_FLAGS) "
            "breaks with guided log-probs and in sft (openxla/xla#46500); set it to auto or xla"
        ]
    return []


def _has_alike_calls(config: Config) -> bool:
    """Whether an update attends to several sequences of the same shapes.

    Guidance does with and without the prompt; supervised training may for its kinds of rows.
    """
    guided = config.algorithm.tasks != "mm2t" and config.algorithm.image_logprobs == "guided"
    return {"rl": guided, "sft": True, "vq": False}[config.stage]
