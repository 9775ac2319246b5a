#!/usr/bin/env bash
# The judges of one machine, for runs on other machines: one server per entry of --judge-cards, from port 8000 on.
#   ./launch/node_judges.sh --judge=vllm --judge-model=Qwen/Qwen3-VL-30B-A3B-Instruct --judge-cards=0,1,2+3
# One that ends before it is healthy, or is late, ends all of them with code 1 and the end of its log.
# They listen on all addresses and have no keys: start them where a firewall lets only the run in.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
JUDGE_CARDS="" LOGS="${LOGS:-runs/logs}" JUDGE_HOST=0.0.0.0
for word in "$@"; do
  case "$word" in
    --judge-cards=*) JUDGE_CARDS="${word#*=}" ;;
    *) common_flag "$word" || fail "unknown flag $word; see launch/lib.sh" ;;
  esac
done
check_common_flags
[ -n "$JUDGE" ] && [ -n "$JUDGE_CARDS" ] || fail "expected --judge=SERVER --judge-model=MODEL --judge-cards=LIST"
trap end_judges EXIT
end_by_signals
start_judges "$JUDGE_CARDS" "${SLURMD_NODENAME:-$(hostname)}" "$LOGS"
wait_for_judges
[ -n "$DRY_RUN" ] || wait
