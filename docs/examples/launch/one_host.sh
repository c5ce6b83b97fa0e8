#!/bin/sh
# One machine, whatever its number of devices: one process drives them all.
#   docs/examples/launch/one_host.sh CONFIG [key=value ...]
# Flags of XLA and NCCL are yours to set; the program sets none. On GPUs, for example:
#   export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92   # share of the memory that JAX takes at the start
#   export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true"
set -eu
config=$1
shift
exec "${PYTHON:-python}" -m corl_jax.train --config "$config" "$@"
