#!/usr/bin/env bash
# One machine with GPUs: judges on some cards, the run on the others, in one process (--per-card: one per card).
#   EXTRAS='.[tests,cuda]' ./launch/gpus.sh --config=FILE
#   EXTRAS='.[tests,cuda]' ./launch/gpus.sh --judge=vllm --judge-model=Qwen/Qwen3-VL-30B-A3B-Instruct \
#     --judge-cards=6,7 --config=configs/bagel_7b_rt2i.py
# --cards=0,1,2        cards of the run (default: all that no judge has)
# --judge-cards=4+5,6  cards of the judges: here two, of two cards and of one
# --per-card           a process for each card of the run, instead of one for all
# The other flags stand in launch/lib.sh; LOGS is the folder of the judges' logs (default runs/logs).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
CARDS="" JUDGE_CARDS="" PER_CARD="" LOGS="${LOGS:-runs/logs}"
for word in "$@"; do
  case "$word" in
    --cards=*) CARDS="${word#*=}" ;;
    --judge-cards=*) JUDGE_CARDS="${word#*=}" ;;
    --per-card) PER_CARD=1 ;;
    *) common_flag "$word" || TRAIN+=("$word") ;;
  esac
done
check_common_flags
[ -z "$JUDGE" ] || [ -n "$JUDGE_CARDS" ] || fail "--judge=$JUDGE needs --judge-cards=LIST: the run must not share their memory"
[ -n "$JUDGE" ] || [ -z "$JUDGE_CARDS" ] || fail "--judge-cards=$JUDGE_CARDS needs --judge=SERVER"

taken=",${JUDGE_CARDS//+/,},"
if [ -z "$CARDS" ]; then
  all=$(nvidia-smi --query-gpu=index --format=csv,noheader) || fail "nvidia-smi lists no cards; give --cards=LIST"
  for card in $all; do
    case "$taken" in *",$card,"*) ;; *) CARDS+="${CARDS:+,}$card" ;; esac
  done
fi
[ -n "$CARDS" ] || fail "the judges have all cards ($JUDGE_CARDS); leave one to the run"
for card in ${CARDS//,/ }; do
  case "$taken" in *",$card,"*) fail "card $card is in --cards=$CARDS and in --judge-cards=$JUDGE_CARDS" ;; esac
done

[ -n "$DRY_RUN" ] || . launch/setup.sh
trap end_judges EXIT
end_by_signals
if [ -n "$JUDGE" ]; then
  start_judges "$JUDGE_CARDS" 127.0.0.1 "$LOGS"
  wait_for_judges
fi
use_endpoints

processes=() variables=("CUDA_VISIBLE_DEVICES=$CARDS")
if [ -n "$PER_CARD" ]; then
  # shellcheck disable=SC2086 # one word per card
  read -ra variables <<<"$(printf 'CUDA_VISIBLE_DEVICES=%s ' ${CARDS//,/ })"
fi
[ -n "$DRY_RUN" ] || hold_stop
for number in "${!variables[@]}"; do
  command=(env "${variables[$number]}" "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}")
  if [ "${#variables[@]}" -gt 1 ]; then
    command+=("COORDINATOR_ADDRESS=127.0.0.1:${PORT:-9876}" "NUM_PROCESSES=${#variables[@]}" "PROCESS_ID=$number")
  fi
  command+=(python -m alphagrpo_jax.train "${TRAIN[@]}")
  if [ -n "$DRY_RUN" ]; then
    echo "$(quoted "${command[@]}") &"
  else
    "${command[@]}" &
    processes+=($!)
  fi
done
[ -n "$DRY_RUN" ] || wait_for_run "${processes[@]}"
