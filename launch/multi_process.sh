#!/usr/bin/env bash
# Several processes on this machine, as on several hosts: PROCESSES (default 2), each with its own CPU device.
#   PROCESSES=2 ./launch/multi_process.sh --config.mesh.fsdp=2
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" COORDINATOR_ADDRESS="127.0.0.1:${PORT:-9876}" NUM_PROCESSES="${PROCESSES:-2}"
case " $* " in *" --config="*) ;; *) set -- --config=configs/grpo.py "$@" ;; esac
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for ((rank = 1; rank < NUM_PROCESSES; rank++)); do
  PROCESS_ID=$rank python -m alphagrpo_jax.train "$@" &
done
PROCESS_ID=0 python -m alphagrpo_jax.train "$@"
