#!/usr/bin/env bash
# One GPU, at most a quarter of an hour: the functions of BAGEL-7B-MoT's sizes against what the card can do, and against PyTorch.
#   ./benchmarks/gpu_quarter_hour.sh OUT         # the folder of figures and logs
#   TINY=1 ./benchmarks/gpu_quarter_hour.sh OUT  # the shipped model on a CPU: whether it all runs
# It needs an environment with jax for the card and PyTorch (pip install -c constraints.txt -e '.[tests,cuda]'; PYTHON names another
# interpreter). A part that fails or takes too long leaves the others their time; SECONDS_IN_ALL (default 820) bounds all of them.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 1 ] || { echo "usage: $0 OUT" >&2; exit 2; }
OUT=$1 PYTHON=${PYTHON:-python} END=$((SECONDS + ${SECONDS_IN_ALL:-820})) FAILED=0
mkdir -p "$OUT" || exit 2
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
SPEED=(--repeat=3) PEER=(--sizes=7b --device=cuda --repeats=2 --no-compile) FUSED=cudnn
if [ -n "${TINY:-}" ]; then
  SPEED=(--sizes=package:umm --side=48 --rows=2 --prompt=16 --text=16 --points=3 --dtype=float32 --repeat=1)
  PEER=(--sizes=package:umm --side=48 --rows=2 --prompt=16 --text=16 --points=3 --dtype=float32 --repeats=1 --no-compile) FUSED=plain
fi

# part NAME SECONDS COMMAND...: runs a command for at most so long; its output goes into NAME.log.
part() {
  local name=$1 limit=$2 left=$((END - SECONDS)) began=$SECONDS code=0
  shift 2
  [ "$left" -gt 20 ] || { echo "$name: no time left"; FAILED=1; return; }
  timeout --kill-after=10 $((limit < left ? limit : left)) "$@" >"$OUT/$name.log" 2>&1 || code=$?
  [ "$code" -eq 0 ] || FAILED=1
  echo "$name: exit code $code after $((SECONDS - began)) s"
  tail -n 12 "$OUT/$name.log" | sed 's/^/  /'
}

{ "$PYTHON" -VV; nvidia-smi; "$PYTHON" -m pip list; git rev-parse HEAD; cat /proc/loadavg; } >"$OUT/machine.txt" 2>&1
# Text, drawing and gradients: of the kernels only the last two know a difference.
part plain 300 "$PYTHON" -m benchmarks.policy_speed "${SPEED[@]}" --attention=plain --out="$OUT/plain.json"
part torch 240 env -u XLA_PYTHON_CLIENT_MEM_FRACTION "$PYTHON" -m benchmarks.torch_peer "${PEER[@]}" --out="$OUT/torch.json"
part fused_draw 120 "$PYTHON" -m benchmarks.policy_speed "${SPEED[@]}" --attention=$FUSED --only=draw --out="$OUT/fused_draw.json"
part fused_gradient 200 "$PYTHON" -m benchmarks.policy_speed "${SPEED[@]}" --attention=$FUSED --only=gradient --out="$OUT/fused_gradient.json"

# An iteration of configs/bagel_7b_rt2i.py by its parts: 513 tokens, 15 image steps drawn (two of them
# without guidance), 10 trained. Both branches of every image step are in policy_speed's figures.
"$PYTHON" - "$OUT" <<'SUM' | tee "$OUT/iteration.txt"
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
read = lambda name: json.loads(path.read_text()) if (path := folder / f"{name}.json").exists() else {}
plain = read("plain")
texts = {name: figure for name, figure in plain.items() if name.startswith("write text/")}
for kernel, rates in (("plain", plain), ("fused", texts | read("fused_draw") | read("fused_gradient"))):
    amounts = {"write text": 513, "draw": 14, "gradient of a text's log-probs": 513, "gradient of an image step's log-prob": 10}
    try:
        seconds = {name: count / rates[f"{name}/per_second"] for name, count in amounts.items()}
    except KeyError as missing:
        print(f"{kernel}: no figure of {missing}")
        continue
    parts = ", ".join(f"{name} {spent:.2f} s" for name, spent in seconds.items())
    print(f"{kernel}: {1 / sum(seconds.values()):.3f} images/s by the sum of the parts ({parts} per image)")
SUM
exit "$FAILED"
