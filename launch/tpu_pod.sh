#!/usr/bin/env bash
# One process per host of a TPU pod slice; JAX finds the other hosts by itself. The run folder is one that all hosts mount.
# Run it on every host:
#   gcloud compute tpus tpu-vm ssh NAME --worker=all --command \
#     "cd alphagrpo_jax && ./launch/tpu_pod.sh --config=FILE --workdir=/mnt/shared/run"
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="${EXTRAS:-.[tests,tpu]}"
. launch/setup.sh
export JAX_PLATFORMS=tpu DISTRIBUTED=1
exec python -m alphagrpo_jax.train "$@"
