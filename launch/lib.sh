# shellcheck shell=bash
# Sourced by the scripts that start judges and a run: flags, dry runs, starting judges, waiting for their health.
#
# Flags of all these scripts (what is none of theirs goes to alphagrpo_jax.train):
#   --dry-run               print what would run, and run nothing
#   --judge=SERVER          ours, vllm or sglang; without it no judges are started
#   --judge-model=MODEL     their model, as the server takes it
#   --judge-args="..."      further arguments of the server, split at blanks; 'what stands in single quotes' is taken as it is
#   --judge-seconds=N       deadline for the judges to be healthy (default 1200: large models load for minutes)
#   --endpoints=URL[,URL]   judges that run already, http://HOST:PORT/v1
# XLA_PYTHON_CLIENT_MEM_FRACTION: the share of a card's memory that JAX takes (default here 0.92, which a plan counts on).
# JUDGE_END_SECONDS (default 20): what judges of this machine have to end, before they are killed.
# FIRST_PORT (default 8000) is the first judge's; the others on its machine follow.

DRY_RUN="" JUDGE="" JUDGE_MODEL="" JUDGE_ARGS="" JUDGE_SECONDS=1200 ENDPOINTS="" FIRST_PORT="${FIRST_PORT:-8000}"
JUDGE_END_SECONDS="${JUDGE_END_SECONDS:-20}"
JUDGE_WORDS=() # JUDGE_ARGS, split
TRAIN=() # arguments of alphagrpo_jax.train
JUDGE_PIDS=() JUDGE_PORTS=() JUDGE_LOGS=() # of the judges that start_judges has started

fail() {
  echo "error: $*" >&2
  exit 2
}

say() { echo "$*" >&2; }

# Writes words so that a shell reads them back.
quoted() {
  local word text=""
  for word in "$@"; do
    case "$word" in
      "" | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/\'\\\'\'}'" ;;
    esac
    text+="${text:+ }$word"
  done
  printf '%s' "$text"
}

# Runs a command; in a dry run it prints it.
run() {
  if [ -n "$DRY_RUN" ]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# Takes a flag of all scripts; returns 1 if it is none.
common_flag() {
  case "$1" in
    --dry-run) DRY_RUN=1 ;;
    --judge=*) JUDGE="${1#*=}" ;;
    --judge-model=*) JUDGE_MODEL="${1#*=}" ;;
    --judge-args=*) JUDGE_ARGS="${1#*=}" ;;
    --judge-seconds=*) JUDGE_SECONDS="${1#*=}" ;;
    --endpoints=*) ENDPOINTS="${1#*=}" ;;
    *) return 1 ;;
  esac
}

# Splits JUDGE_ARGS into JUDGE_WORDS. Double quotes stay, since JSON has them.
split_judge_args() {
  local text="$JUDGE_ARGS" blank=$'[ \t\n]' plain=$'[^ \t\n\']' word
  local pattern="^$blank*(($plain|'[^']*')+)($blank.*)?\$"
  while [[ "$text" =~ [^[:space:]] ]]; do
    [[ "$text" =~ $pattern ]] || fail "got --judge-args=$JUDGE_ARGS, whose single quotes do not match"
    word="${BASH_REMATCH[1]}" text="${BASH_REMATCH[3]-}"
    case "$word" in '"'*) fail "got $word in --judge-args; expected single quotes around what has blanks (double quotes stay)" ;; esac
    JUDGE_WORDS+=("${word//\'/}")
  done
}

check_common_flags() {
  case "$JUDGE" in
    "") ;;
    ours | vllm | sglang) [ -n "$JUDGE_MODEL" ] || fail "--judge=$JUDGE needs --judge-model=MODEL, what it serves" ;;
    *) fail "got --judge=$JUDGE, expected ours, vllm or sglang" ;;
  esac
  case "$JUDGE_SECONDS" in
    "" | *[!0-9]*) fail "got --judge-seconds=$JUDGE_SECONDS, expected whole seconds" ;;
  esac
  case "$JUDGE_END_SECONDS" in
    "" | *[!0-9]*) fail "got JUDGE_END_SECONDS=$JUDGE_END_SECONDS, expected whole seconds" ;;
  esac
  split_judge_args
  case " ${TRAIN[*]-} " in *" --config="*) ;; *) TRAIN=(--config=configs/grpo.py ${TRAIN[@]+"${TRAIN[@]}"}) ;; esac
}

# Adds a judge's URL to those that the run asks.
add_endpoint() { ENDPOINTS+="${ENDPOINTS:+,}$1"; }

# The name that a server gives its model: ours takes it from the folder.
served_name() {
  if [ "$JUDGE" = ours ]; then basename "${JUDGE_MODEL#package:}"; else echo "$JUDGE_MODEL"; fi
}

# Hands the judges over to the run: its verifiers are these endpoints. Fields of the user's stand behind and win.
use_endpoints() {
  [ -n "$ENDPOINTS" ] || return 0
  local word config=() fields=()
  for word in "${TRAIN[@]}"; do
    case "$word" in --config=*) config+=("$word") ;; *) fields+=("$word") ;; esac
  done
  config+=(--config.verifier.kind=openai "--config.verifier.endpoints=(\"${ENDPOINTS//,/\",\"}\",)")
  [ -z "$JUDGE" ] || config+=("--config.verifier.model=$(served_name)")
  TRAIN=("${config[@]}" ${fields[@]+"${fields[@]}"})
}

# Waits until a server answers GET /health or /v1/models: wait_for_judge URL LOG [PID]. With its process id the wait ends
# with the process. On failure the end of its log is shown.
wait_for_judge() {
  local base="${1%/v1}" log=$2 pid=${3:-} deadline=$((SECONDS + JUDGE_SECONDS))
  if [ -n "$DRY_RUN" ]; then
    echo "# wait until $base/health or $base/v1/models answers, $JUDGE_SECONDS s at most"
    return
  fi
  say "waiting for the judge $1 (log: $log) ..."
  until curl -sf -m 5 -o /dev/null "$base/health" || curl -sf -m 5 -o /dev/null "$base/v1/models"; do
    check_judges
    if [ -n "$pid" ] && ! kill -0 "$pid" 2>/dev/null; then
      judge_failed "$1 has ended before it was healthy" "$log"
    elif [ "$SECONDS" -ge "$deadline" ]; then
      judge_failed "$1 was not healthy within $JUDGE_SECONDS s (--judge-seconds)" "$log"
    fi
    sleep "${POLL_SECONDS:-2}"
  done
  say "the judge $1 is healthy"
}

# Fails if a judge of this machine has ended, whichever is waited for.
check_judges() {
  local number
  for number in "${!JUDGE_PIDS[@]}"; do
    kill -0 "${JUDGE_PIDS[$number]}" 2>/dev/null ||
      judge_failed "http://127.0.0.1:${JUDGE_PORTS[$number]}/v1 has ended before it was healthy" "${JUDGE_LOGS[$number]}"
  done
}

judge_failed() {
  say "error: the judge $1; the end of its log $2:"
  tail -n 20 "$2" >&2 || true
  exit 1
}

# Starts a judge on this machine: start_judge CARDS PORT LOG. CARDS are its cards, joined by "+" ("4+5"); "" leaves them.
start_judge() {
  local cards="${1//+/,}" port=$2 log=$3 words=()
  local count=$(($(tr -cd , <<<"$cards" | wc -c) + 1))
  case "$JUDGE-$count" in
    ours-1 | vllm-1 | sglang-1) ;;
    ours-*) words=(--device auto) ;;
    vllm-*) words=(--tensor-parallel-size "$count") ;;
    sglang-*) words=(--tp "$count") ;;
  esac
  [ "$JUDGE-$count" != ours-1 ] || [ -z "$cards" ] || words=(--device cuda)
  words+=(${JUDGE_WORDS[@]+"${JUDGE_WORDS[@]}"})
  local command=(env "PORT=$port" "HOST=${JUDGE_HOST:-127.0.0.1}")
  [ -z "$cards" ] || command+=("CUDA_VISIBLE_DEVICES=$cards")
  command+=(./launch/verifiers.sh "$JUDGE" "$JUDGE_MODEL" ${words[@]+"${words[@]}"})
  if [ -n "$DRY_RUN" ]; then
    echo "$(quoted "${command[@]}") > $log 2>&1 &"
    return
  fi
  mkdir -p "$(dirname "$log")"
  "${command[@]}" >"$log" 2>&1 &
  JUDGE_PIDS+=($!)
}

# Ctrl-C and SIGTERM end the script, and run what it does at its end. A shell by itself outlives Ctrl-C where the program that
# it waits for does.
end_by_signals() {
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

# Ends the judges of this machine that were started here, and waits until they have: their cards are free for what comes next.
# One that does not end within JUDGE_END_SECONDS is killed; it may then leave processes that it has started itself.
end_judges() {
  [ "${#JUDGE_PIDS[@]}" -gt 0 ] || return 0
  local pid deadline=$((SECONDS + JUDGE_END_SECONDS))
  trap '' INT TERM # a further signal must not leave judges behind
  kill "${JUDGE_PIDS[@]}" 2>/dev/null || true
  for pid in "${JUDGE_PIDS[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do
      if [ "$SECONDS" -ge "$((deadline + 5))" ]; then # it hangs in the kernel: nothing ends it
        say "error: the judge of process $pid could not be killed"
        break
      fi
      [ "$SECONDS" -lt "$deadline" ] || kill -KILL "$pid" 2>/dev/null || true
      sleep 0.05
    done
  done
}

# Starts one judge per entry of a list of cards and adds its URL: start_judges "4+5,6+7" HOSTNAME LOGS.
start_judges() {
  local cards port=$FIRST_PORT
  for cards in ${1//,/ }; do
    start_judge "$cards" "$port" "$3/judge_$2_$port.log"
    add_endpoint "http://$2:$port/v1"
    JUDGE_PORTS+=("$port")
    JUDGE_LOGS+=("$3/judge_$2_$port.log")
    port=$((port + 1))
  done
}

# Waits for the judges that start_judges has started, on their own machine.
wait_for_judges() {
  local number
  for number in "${!JUDGE_PORTS[@]}"; do
    wait_for_judge "http://127.0.0.1:${JUDGE_PORTS[$number]}/v1" "${JUDGE_LOGS[$number]}"
  done
}

# Splits a machine's cards into groups for judges: card_groups 8 2 gives 0+1,2+3,4+5,6+7.
card_groups() {
  local first groups="" cards
  for ((first = 0; first + $2 <= $1; first += $2)); do
    cards=$(seq -s + "$first" $((first + $2 - 1)))
    groups+="${groups:+,}$cards"
  done
  [ -n "$groups" ] || fail "a judge of $2 cards does not fit on a machine of $1"
  echo "$groups"
}

# Tells the processes of a run to save and end.
stop_run() { kill -TERM "$@" 2>/dev/null || true; }

# Waits for the processes of a run, hands SIGTERM on to them (stop_run), and returns the worst code: a failure, else 75, else 0.
# Ctrl-C reaches them by itself.
SIGNALED="" HELD=""
# Keeps a SIGTERM that comes while the processes are started for wait_for_run.
hold_stop() { trap 'HELD=1' TERM; }
wait_for_run() {
  local pid code worst=0
  # shellcheck disable=SC2064 # these processes
  trap "SIGNALED=1; stop_run $*" TERM
  trap 'SIGNALED=1' INT
  [ -z "$HELD" ] || stop_run "$@"
  for pid in "$@"; do
    code=0
    wait "$pid" || code=$?
    while [ -n "$SIGNALED" ]; do # the signal has ended the wait, not the process
      SIGNALED="" code=0
      wait "$pid" || code=$?
    done
    if [ "$code" -ne 0 ] && { [ "$worst" -eq 0 ] || [ "$worst" -eq 75 ]; }; then worst=$code; fi
  done
  trap - TERM INT
  return "$worst"
}
