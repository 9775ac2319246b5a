#!/usr/bin/env bash
#SBATCH --job-name=alphagrpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=TERM@300
# One process per node on a Slurm cluster; a requeued job continues from its last checkpoint.
#   EXTRAS='.[tests,cuda]' sbatch launch/slurm.sh --config=FILE --workdir=SHARED_FOLDER
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
. launch/setup.sh
export NUM_PROCESSES="$SLURM_NTASKS"
COORDINATOR_ADDRESS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):${PORT:-9876}"
export COORDINATOR_ADDRESS
exec srun --kill-on-bad-exit=1 bash -c 'PROCESS_ID=$SLURM_PROCID exec python -m alphagrpo_jax.train "$@"' train "$@"
