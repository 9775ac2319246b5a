#!/usr/bin/env bash
#SBATCH --job-name=alphagrpo
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
# A run on nodes of a Slurm cluster, and its judges on other nodes of the same job. Outside a job it submits itself:
#   EXTRAS='.[tests,cuda]' ./launch/slurm.sh --nodes=7 --judge-nodes=1 --judge=vllm \
#     --judge-model=Qwen/Qwen3-VL-30B-A3B-Instruct --config=configs/bagel_7b_rt2i.py --workdir=SHARED_FOLDER
# --nodes=N             nodes of the run (default 2)
# --judge-nodes=N       nodes of the judges, the last of the job (default 0)
# --gpus=N              cards of a node (default 8)
# --cpus=N              cores of a node (default 64); its tasks share them
# --judge-gpus=N        cards of one judge (default 1); a node has as many judges as fit
# --per-card            a process for each card, instead of one for each node
# --sbatch="..."        further flags of sbatch, such as a partition and a time limit
# --judge-sbatch="..."  flags of sbatch for the judges' nodes: the job is then a heterogeneous one, whose second part they are
# The other flags stand in launch/lib.sh. Five minutes before the time limit the run is told to stop; it saves and ends with 75,
# and the job is put into the queue again, where it continues. Earlier: scancel --signal=TERM --batch JOB.
# LOGS (default runs/logs) must be on a shared file system.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
. launch/lib.sh
NODES=2 JUDGE_NODES=0 GPUS=8 CPUS=64 JUDGE_GPUS=1 PER_CARD="" SBATCH="" JUDGE_SBATCH="" LOGS="${LOGS:-runs/logs}"
for word in "$@"; do
  case "$word" in
    --nodes=*) NODES="${word#*=}" ;;
    --judge-nodes=*) JUDGE_NODES="${word#*=}" ;;
    --gpus=*) GPUS="${word#*=}" ;;
    --cpus=*) CPUS="${word#*=}" ;;
    --judge-gpus=*) JUDGE_GPUS="${word#*=}" ;;
    --per-card) PER_CARD=1 ;;
    --sbatch=*) SBATCH="${word#*=}" ;;
    --judge-sbatch=*) JUDGE_SBATCH="${word#*=}" ;;
    *) common_flag "$word" || TRAIN+=("$word") ;;
  esac
done
for number in "$NODES" "$JUDGE_NODES" "$GPUS" "$CPUS" "$JUDGE_GPUS"; do
  case "$number" in "" | *[!0-9]*) fail "got $number for a number of nodes, cards or cores" ;; esac
done
check_common_flags
[ -z "$JUDGE" ] || [ "$JUDGE_NODES" -gt 0 ] || fail "--judge=$JUDGE needs --judge-nodes=N"
[ -n "$JUDGE" ] || [ "$JUDGE_NODES" -eq 0 ] || fail "--judge-nodes=$JUDGE_NODES needs --judge=SERVER"
[ -z "$JUDGE_SBATCH" ] || [ "$JUDGE_NODES" -gt 0 ] || fail "--judge-sbatch needs --judge-nodes=N"
tasks=$([ -n "$PER_CARD" ] && echo "$GPUS" || echo 1)

# ------------------------------------------------------------------------------------------------------- submit
if [ -z "${SLURM_JOB_ID:-}" ]; then
  resources=("--gpus-per-node=$GPUS" "--ntasks-per-node=$tasks" "--cpus-per-task=$((CPUS / tasks))")
  # shellcheck disable=SC2206 # words of the user
  if [ -n "$JUDGE_SBATCH" ]; then
    command=(sbatch "--nodes=$NODES" "${resources[@]}" $SBATCH
      : "--nodes=$JUDGE_NODES" "--gpus-per-node=$GPUS" --ntasks-per-node=1 "--cpus-per-task=$CPUS" $JUDGE_SBATCH)
  else
    command=(sbatch "--nodes=$((NODES + JUDGE_NODES))" "${resources[@]}" $SBATCH)
  fi
  submitted=()
  for word in "$@"; do [ "$word" = --dry-run ] || submitted+=("$word"); done
  run "${command[@]}" launch/slurm.sh ${submitted[@]+"${submitted[@]}"}
  [ -n "$DRY_RUN" ] || exit 0
  echo "# In the job, whose nodes are called node1, node2, ... here:"
  mapfile -t nodes < <(seq -f 'node%g' $((NODES + JUDGE_NODES)))
  [ -z "$JUDGE_SBATCH" ] || SLURM_HET_SIZE=2
# ------------------------------------------------------------------------------------------------------ in a job
elif [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0" && scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
else
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
fi
NODES=$((${#nodes[@]} - JUDGE_NODES))
[ "$NODES" -gt 0 ] || fail "the job has ${#nodes[@]} nodes, and the judges have $JUDGE_NODES: leave one to the run"
joined() { (IFS=, && echo "$*"); }

part() { # of a heterogeneous job, or the nodes of an ordinary one: part NUMBER NODE...
  if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then echo "--het-group=$1"; else echo "--nodelist=$(joined "${@:2}")"; fi
}
[ -n "$DRY_RUN" ] || . launch/setup.sh
judges_pid=""
trap '[ -z "$judges_pid" ] || kill "$judges_pid" 2>/dev/null || true' EXIT
end_by_signals
if [ -n "$JUDGE" ]; then
  groups=$(card_groups "$GPUS" "$JUDGE_GPUS")
  command=(srun "$(part 1 "${nodes[@]:$NODES}")" "--nodes=$JUDGE_NODES" "--ntasks=$JUDGE_NODES" --ntasks-per-node=1
    "--gpus-per-node=$GPUS" "--cpus-per-task=$CPUS" --kill-on-bad-exit=1 ./launch/node_judges.sh
    "--judge=$JUDGE" "--judge-model=$JUDGE_MODEL" "--judge-args=$JUDGE_ARGS" "--judge-seconds=$JUDGE_SECONDS" "--judge-cards=$groups")
  if [ -n "$DRY_RUN" ]; then
    echo "$(quoted "${command[@]}") &"
  else
    mkdir -p "$LOGS"
    LOGS="$LOGS" "${command[@]}" &
    judges_pid=$!
  fi
  count=$(tr -cd , <<<"$groups" | wc -c)
  for node in "${nodes[@]:$NODES}"; do
    for ((port = FIRST_PORT; port <= FIRST_PORT + count; port++)); do
      add_endpoint "http://$node:$port/v1"
      wait_for_judge "http://$node:$port/v1" "$LOGS/judge_${node}_$port.log" "$judges_pid"
    done
  done
fi
use_endpoints

stopped="$LOGS/stopped_${SLURM_JOB_ID:-JOB}" # a task makes it where the run ends with 75
step="$LOGS/step_${SLURM_JOB_ID:-JOB}"       # the first task writes JOB.STEP, by which Slurm knows the run
command=(env "NUM_PROCESSES=$((NODES * tasks))" "COORDINATOR_ADDRESS=${nodes[0]}:${PORT:-9876}" "STOPPED_FILE=$stopped"
  "STEP_FILE=$step" "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
  srun "$(part 0 "${nodes[@]:0:$NODES}")" "--nodes=$NODES" "--ntasks=$((NODES * tasks))" "--ntasks-per-node=$tasks"
  "--gpus-per-node=$GPUS" "--cpus-per-task=$((CPUS / tasks))" --kill-on-bad-exit=1
  ./launch/slurm_task.sh ${PER_CARD:+--per-card} "${TRAIN[@]}")
if [ -n "$DRY_RUN" ]; then
  quoted "${command[@]}"
  echo
  echo "# on SIGTERM: scancel --signal=TERM \$(cat $step)"
  echo "# if the run was stopped (exit code 75): scontrol requeue JOB"
  exit 0
fi
# srun itself must not get the signal: it would kill all tasks at once. Slurm hands it to the tasks of the step.
stop_run() {
  until [ -s "$step" ]; do # the tasks do not run yet
    kill -0 "$1" 2>/dev/null || return 0
    sleep "${POLL_SECONDS:-2}"
  done
  told=1
  say "the run, step $(cat "$step"), is told to save and end"
  scancel --signal=TERM "$(cat "$step")" || say "error: scancel could not tell the run to stop; it goes on until the time limit"
}
mkdir -p "$LOGS"
rm -f "$stopped" "$step"
told=""
hold_stop
"${command[@]}" &
code=0
wait_for_run $! || code=$?
rm -f "$step"
if [ -n "$told" ] && [ "$code" -eq 143 ]; then code=0 && touch "$stopped"; fi # before the tasks could listen
if [ "$code" -eq 0 ] && [ -e "$stopped" ]; then
  rm -f "$stopped"
  # A job that is canceled as a whole tells its run to save, too.
  case "$(scontrol show job "$SLURM_JOB_ID" || true)" in
    "" | *JobState=RUNNING*) ;;
    *)
      say "the run was stopped and has saved; job $SLURM_JOB_ID was canceled, so it does not go into the queue again"
      exit 75
      ;;
  esac
  say "the run was stopped and has saved; job $SLURM_JOB_ID goes into the queue again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
fi
exit "$code"
