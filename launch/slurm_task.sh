#!/usr/bin/env bash
# One process of launch/slurm.sh. A stop (75, or 143 in its first seconds) is told by the file STOPPED_FILE and ends with 0: srun
# would take another code for a failure, and kill the processes that still save.
set -euo pipefail
export PROCESS_ID="$SLURM_PROCID"
if [ "${1:-}" = --per-card ]; then
  export CUDA_VISIBLE_DEVICES="$SLURM_LOCALID"
  shift
fi
trap : TERM # it reaches the process by itself; this shell must outlive it
if [ "$PROCESS_ID" -eq 0 ]; then echo "$SLURM_JOB_ID.$SLURM_STEP_ID" >"$STEP_FILE"; fi
code=0
python -m alphagrpo_jax.train "$@" || code=$?
if [ "$code" -eq 75 ] || [ "$code" -eq 143 ]; then # 143: it was stopped before it could listen
  touch "$STOPPED_FILE"
  exit 0
fi
exit "$code"
