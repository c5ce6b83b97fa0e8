#!/bin/sh
# All hosts of a TPU slice made by `gcloud compute tpus tpu-vm create` or as a queued resource.
#   NAME=my-slice ZONE=us-central2-b docs/examples/launch/tpu_vm.sh CONFIG [key=value ...]
# Once before, on all workers: clone this repository into ~/corl and pip install -e '.[tpu,gcs]'.
# JAX asks the metadata server who is who. The hosts share no disk, so the checkpoints want a
# bucket: checkpoint.directory=gs://BUCKET/run/checkpoints; all the rest is on the first host.
set -eu
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all \
    --command "cd corl && python3 -m corl_jax.train --config $*"
