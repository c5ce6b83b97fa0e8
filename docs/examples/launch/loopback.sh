#!/bin/sh
# Several processes on one machine, to try out what several machines will do.
#   docs/examples/launch/loopback.sh COUNT CONFIG [key=value ...]
# On a CPU each has JAX_NUM_CPU_DEVICES devices. On GPUs give each process its own, by
# JAX_LOCAL_DEVICE_IDS, or start one process for all of them (one_host.sh).
# Ends with the largest exit code of them.
set -eu
count=$1 config=$2
shift 2
export JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-2}"
address=127.0.0.1:${PORT:-12345}
started=
index=0
while [ "$index" -lt "$count" ]; do
    "${PYTHON:-python}" -m corl_jax.train --config "$config" \
        distributed.coordinator_address="$address" distributed.num_processes="$count" \
        distributed.process_id="$index" "$@" &
    started="$started $!"
    index=$((index + 1))
done
trap 'kill $started' INT TERM
worst=0
for process in $started; do
    code=0
    wait "$process" || code=$?
    [ "$code" -le "$worst" ] || worst=$code
done
exit "$worst"
