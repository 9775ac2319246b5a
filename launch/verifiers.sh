#!/usr/bin/env bash
# A server of verifiers on this machine, for the pools of others: our own (any Hugging Face folder), vLLM or SGLang (installed apart).
# PORT: where it listens (default 8000). HOST: for whom (default 127.0.0.1: this machine; 0.0.0.0: all). Arguments go to the server.
#   ./launch/verifiers.sh ours package:verifier
#   HOST=0.0.0.0 PORT=8001 ./launch/verifiers.sh vllm Qwen/Qwen3-VL-30B-A3B-Instruct --tensor-parallel-size 4
#   ./launch/verifiers.sh sglang Qwen/Qwen3-VL-30B-A3B-Instruct --tp 4
# vLLM echoes request ids, so that every answer is checked to be its question's.
set -euo pipefail
usage() {
  echo "usage: $0 ours|vllm|sglang MODEL [ARGUMENTS]" >&2
  exit 2
}
[ $# -ge 2 ] || usage
SERVER=$1 MODEL=$2 HOST="${HOST:-127.0.0.1}" PORT="${PORT:-8000}"
shift 2
case "$SERVER" in
  ours)
    cd "$(dirname "$0")/.."
    . launch/setup.sh
    exec python -m alphagrpo_jax.serve_verifier --model "$MODEL" --host "$HOST" --port "$PORT" "$@"
    ;;
  vllm)
    exec vllm serve "$MODEL" --host "$HOST" --port "$PORT" --enable-request-id-headers --limit-mm-per-prompt '{"image": 1}' "$@"
    ;;
  sglang)
    exec python -m sglang.launch_server --model-path "$MODEL" --host "$HOST" --port "$PORT" "$@"
    ;;
  *)
    usage
    ;;
esac
