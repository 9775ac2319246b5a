#!/usr/bin/env bash
# One process of launch/slurm.sh. A stop (75) is told by the file STOPPED_FILE and ends with 0: srun would take another code for a
# failure, and kill the processes that still save.
set -euo pipefail
export PROCESS_ID="$SLURM_PROCID"
if [ "${1:-}" = --per-card ]; then
  export CUDA_VISIBLE_DEVICES="$SLURM_LOCALID"
  shift
fi
trap : TERM # it reaches the process by itself; this shell must outlive it
code=0
python -m alphagrpo_jax.train "$@" || code=$?
if [ "$code" -eq 75 ]; then
  touch "$STOPPED_FILE"
  exit 0
fi
exit "$code"
