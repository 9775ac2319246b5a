#!/usr/bin/env bash
# A run on a TPU pod slice, started from a machine with gcloud; its judges run on VMs with GPUs.
#   ./launch/tpu.sh --name=NAME --zone=ZONE --config=configs/bagel_7b_rt2i.py --workdir=/mnt/shared/run \
#     --judge=vllm --judge-model=Qwen/Qwen3-VL-30B-A3B-Instruct --judge-vms=VM,VM --judge-cards=0,1,2,3,4,5,6,7
# --name=NAME --zone=ZONE [--project=PROJECT]   the slice
# --create=TYPE        first ask for it as a queued resource of this type (v5p-128), and wait until it is there. One that is there
#                      already is used; one that has failed or was taken away (SUSPENDED) is deleted and asked for again
# --version=VERSION    its software (default: that of the type's generation)
# --spot               it may be taken away at any moment; the same command continues then
# --setup=COMMAND      run on every host of the slice first, such as one that mounts the run's folder and clones the repository:
#                      a new slice has neither
# --judge-vms=VM,VM    VMs with GPUs, in the same zone and network (--judge-zone=ZONE: in another); they have this folder, too
# --judge-cards=LIST   cards of the judges of each VM (default 0)
# --folder=FOLDER      where the repository is on all of these machines (default alphagrpo_jax, below the home)
# The judges end with the run, and with this script. The other flags stand in launch/lib.sh. The run's folder is one that all hosts mount. Exit code 75: stopped and saved.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
NAME="" ZONE="" PROJECT="" TYPE="" VERSION="" SPOT="" SETUP="" VMS="" JUDGE_ZONE="" JUDGE_CARDS=0 FOLDER=alphagrpo_jax
for word in "$@"; do
  case "$word" in
    --name=*) NAME="${word#*=}" ;;
    --zone=*) ZONE="${word#*=}" ;;
    --project=*) PROJECT="${word#*=}" ;;
    --create=*) TYPE="${word#*=}" ;;
    --version=*) VERSION="${word#*=}" ;;
    --setup=*) SETUP="${word#*=}" ;;
    --spot) SPOT=--spot ;;
    --judge-vms=*) VMS="${word#*=}" ;;
    --judge-zone=*) JUDGE_ZONE="${word#*=}" ;;
    --judge-cards=*) JUDGE_CARDS="${word#*=}" ;;
    --folder=*) FOLDER="${word#*=}" ;;
    *) common_flag "$word" || TRAIN+=("$word") ;;
  esac
done
check_common_flags
[ -n "$NAME" ] && [ -n "$ZONE" ] || fail "expected --name=NAME and --zone=ZONE, the slice"
[ -z "$JUDGE" ] || [ -n "$VMS" ] || fail "--judge=$JUDGE needs --judge-vms=VM,VM: a TPU host has no GPU"
[ -n "$JUDGE" ] || [ -z "$VMS" ] || fail "--judge-vms=$VMS needs --judge=SERVER"
project=(${PROJECT:+"--project=$PROJECT"})
where=("--zone=$ZONE" ${project[@]+"${project[@]}"})
judge_where=("--zone=${JUDGE_ZONE:-$ZONE}" ${project[@]+"${project[@]}"})

on_slice() { # on_slice WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" "--worker=$1" "--command=$2"
}

# Sets now to the state of the queued resource, NONE where there is none; fails where gcloud fails five times in a row.
ask_state() {
  local attempt errors
  errors=$(mktemp)
  for attempt in 1 2 3 4 5; do
    if now=$("${state[@]}" 2>"$errors") && [ -n "$now" ]; then break; fi
    if grep -q NOT_FOUND "$errors"; then now=NONE && break; fi
    say "gcloud does not tell the state of the queued resource $NAME ($attempt of 5): $(cat "$errors")"
    [ "$attempt" -lt 5 ] || fail "the state of the queued resource $NAME is not known; this failed five times: $(quoted "${state[@]}")"
    sleep "${POLL_SECONDS:-30}"
  done
  rm -f "$errors"
}

# Waits until the slice is there. It is asked for once: where that fails, it would fail again.
get_slice() {
  local created="" now=""
  for (( ; ; )); do
    ask_state
    say "the queued resource $NAME: $now"
    case "$now" in
      ACTIVE) return ;;
      NONE | FAILED | SUSPENDED)
        [ -z "$created" ] || fail "the queued resource $NAME is $now; its reasons: ${resource[*]} describe $NAME $(quoted "${where[@]}")"
        [ "$now" = NONE ] || "${delete[@]}"
        "${create[@]}"
        created=1
        ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

if [ -n "$TYPE" ]; then
  if [ -z "$VERSION" ]; then
    case "$TYPE" in
      v4-*) VERSION=tpu-ubuntu2204-base ;;
      v5p-*) VERSION=v2-alpha-tpuv5 ;;
      v5litepod-*) VERSION=v2-alpha-tpuv5-lite ;;
      v6e-*) VERSION=v2-alpha-tpuv6e ;;
      *) fail "got --create=$TYPE, whose software is not known here; give --version=VERSION" ;;
    esac
  fi
  resource=(gcloud compute tpus queued-resources)
  create=("${resource[@]}" create "$NAME" "--node-id=$NAME" "${where[@]}" "--accelerator-type=$TYPE" "--runtime-version=$VERSION" ${SPOT:+"$SPOT"})
  delete=("${resource[@]}" delete "$NAME" "${where[@]}" --force --quiet)
  state=("${resource[@]}" describe "$NAME" "${where[@]}" "--format=value(state.state)")
  if [ -n "$DRY_RUN" ]; then
    echo "# where this says ACTIVE, nothing is asked for: $(quoted "${state[@]}")"
    echo "# where it says FAILED or SUSPENDED, first: $(quoted "${delete[@]}")"
    quoted "${create[@]}"
    echo
    echo "# until it says ACTIVE: $(quoted "${state[@]}")"
  else
    get_slice
  fi
fi

[ -z "$SETUP" ] || on_slice all "$SETUP"

RUNNING="" STARTED=() # VMs with judges of this start
# shellcheck disable=SC2329 # called by the trap
end_judges_on_vms() {
  local vm
  if [ -n "$RUNNING" ]; then # only this end of the connection has gone
    say "the run goes on on $NAME, and the judges with it; to stop it: pkill -f alphagrpo_jax.train on all of its hosts"
    return
  fi
  for vm in ${STARTED[@]+"${STARTED[@]}"}; do
    # The process is the first of its session, and of its group: the judges end with it.
    run gcloud compute ssh "$vm" "${judge_where[@]}" "--command=cd $FOLDER && kill -- -\$(cat runs/logs/judges.pid)" ||
      say "the judges on $vm may still run: end them by pkill -f node_judges.sh there, or delete the VM"
  done
}
trap end_judges_on_vms EXIT
end_by_signals
port_last=$((FIRST_PORT + $(tr -cd , <<<"$JUDGE_CARDS" | wc -c)))
for vm in ${VMS//,/ }; do
  judges="$(quoted ./launch/node_judges.sh "--judge=$JUDGE" "--judge-model=$JUDGE_MODEL" "--judge-args=$JUDGE_ARGS" "--judge-seconds=$JUDGE_SECONDS" "--judge-cards=$JUDGE_CARDS")"
  run gcloud compute ssh "$vm" "${judge_where[@]}" "--command=cd $FOLDER && mkdir -p runs/logs && { nohup setsid $judges > runs/logs/judges.log 2>&1 < /dev/null & echo \$! > runs/logs/judges.pid; }"
  STARTED+=("$vm")
  address=(gcloud compute instances describe "$vm" "${judge_where[@]}" "--format=value(networkInterfaces[0].networkIP)")
  if [ -n "$DRY_RUN" ]; then
    echo "# address of $vm: $(quoted "${address[@]}")"
    ip="ADDRESS_OF_$vm"
  else
    ip=$("${address[@]}")
  fi
  for ((port = FIRST_PORT; port <= port_last; port++)); do
    add_endpoint "http://$ip:$port/v1"
    # From the slice: it is what must reach them.
    wait="for i in \$(seq $((JUDGE_SECONDS / 5 + 1))); do curl -sf -m 5 -o /dev/null http://$ip:$port/health || curl -sf -m 5 -o /dev/null http://$ip:$port/v1/models && exit 0; sleep 5; done; exit 1"
    if ! on_slice 0 "$wait"; then
      say "error: the judge http://$ip:$port/v1 on $vm was not healthy within $JUDGE_SECONDS s; the ends of its logs:"
      run gcloud compute ssh "$vm" "${judge_where[@]}" "--command=cd $FOLDER && tail -n 20 runs/logs/*.log" >&2 || true
      exit 1
    fi
  done
done
use_endpoints

code=0 RUNNING=1
on_slice all "cd $FOLDER && $(quoted ./launch/tpu_pod.sh "${TRAIN[@]}")" || code=$?
RUNNING=""
exit "$code"
