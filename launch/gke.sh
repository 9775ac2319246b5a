#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster by xpk; its judges are pods on nodes with GPUs of the same cluster.
#   ./launch/gke.sh --name=NAME --cluster=CLUSTER --zone=ZONE --project=PROJECT --tpu-type=v5p-128 --image=IMAGE \
#     --judge=vllm --judge-model=Qwen/Qwen3-VL-30B-A3B-Instruct --judge-accelerator=nvidia-h100-80gb --judges=8 \
#     --config=configs/bagel_7b_rt2i.py --workdir=/mnt/shared/run
# --image=IMAGE               has this repository in its working folder, and the extra tpu; xpk mounts storage (--storage there)
# --slices=N                  slices (default 1)
# --restarts=N                restarts after a stop (75) or a lost node (default 100)
# --judge-image=IMAGE         default vllm/vllm-openai:latest, lmsysorg/sglang:latest, or that of the run
# --judge-accelerator=NAME    label of the nodes with GPUs (cloud.google.com/gke-accelerator)
# --judges=N --judge-gpus=N   judges (default 1), cards of each (default 1)
# The other flags stand in launch/lib.sh. kubectl must point at the cluster.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
NAME="" CLUSTER="" ZONE="" PROJECT="" TYPE="" IMAGE="" SLICES=1 RESTARTS=100
JUDGE_IMAGE="" ACCELERATOR="" JUDGES=1 JUDGE_GPUS=1
for word in "$@"; do
  case "$word" in
    --name=*) NAME="${word#*=}" ;;
    --cluster=*) CLUSTER="${word#*=}" ;;
    --zone=*) ZONE="${word#*=}" ;;
    --project=*) PROJECT="${word#*=}" ;;
    --tpu-type=*) TYPE="${word#*=}" ;;
    --image=*) IMAGE="${word#*=}" ;;
    --slices=*) SLICES="${word#*=}" ;;
    --restarts=*) RESTARTS="${word#*=}" ;;
    --judge-image=*) JUDGE_IMAGE="${word#*=}" ;;
    --judge-accelerator=*) ACCELERATOR="${word#*=}" ;;
    --judges=*) JUDGES="${word#*=}" ;;
    --judge-gpus=*) JUDGE_GPUS="${word#*=}" ;;
    *) common_flag "$word" || TRAIN+=("$word") ;;
  esac
done
check_common_flags
case "$JUDGE_GPUS" in "" | *[!0-9]*) fail "got --judge-gpus=$JUDGE_GPUS, expected the number of cards of a judge" ;; esac
for name in NAME CLUSTER ZONE PROJECT TYPE IMAGE; do
  [ -n "${!name}" ] || fail "expected --name, --cluster, --zone, --project, --tpu-type and --image; $name is missing"
done
[ -z "$JUDGE" ] || [ -n "$ACCELERATOR" ] || fail "--judge=$JUDGE needs --judge-accelerator=NAME, the GPUs of its nodes"

manifest() { # judges with an address each
  local words=() arguments="" word device=cuda
  [ "$JUDGE_GPUS" -eq 1 ] || device=auto
  case "$JUDGE" in # as launch/verifiers.sh does; images of other runtimes do not have it
    vllm) words=(vllm serve "$JUDGE_MODEL" --host 0.0.0.0 --port 8000 --enable-request-id-headers
      --limit-mm-per-prompt '{"image": 1}' --tensor-parallel-size "$JUDGE_GPUS") ;;
    sglang) words=(python3 -m sglang.launch_server --model-path "$JUDGE_MODEL" --host 0.0.0.0 --port 8000 --tp "$JUDGE_GPUS") ;;
    ours) words=(python -m alphagrpo_jax.serve_verifier --model "$JUDGE_MODEL" --host 0.0.0.0 --port 8000 --device "$device") ;;
  esac
  words+=(${JUDGE_WORDS[@]+"${JUDGE_WORDS[@]}"})
  for word in "${words[@]}"; do
    word="${word//\\/\\\\}"
    arguments+="${arguments:+, }\"${word//\"/\\\"}\""
  done
  cat <<YAML
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: $NAME-judge}
spec:
  serviceName: $NAME-judge
  podManagementPolicy: Parallel
  replicas: $JUDGES
  selector: {matchLabels: {app: $NAME-judge}}
  template:
    metadata: {labels: {app: $NAME-judge}}
    spec:
      nodeSelector: {cloud.google.com/gke-accelerator: $ACCELERATOR}
      containers:
        - name: judge
          image: $JUDGE_IMAGE
          command: [$arguments]
          ports: [{containerPort: 8000}]
          readinessProbe: {httpGet: {path: /health, port: 8000}, periodSeconds: 5, timeoutSeconds: 5}
          resources: {limits: {nvidia.com/gpu: $JUDGE_GPUS}}
          volumeMounts: [{name: shm, mountPath: /dev/shm}]
      volumes: [{name: shm, emptyDir: {medium: Memory}}]
---
apiVersion: v1
kind: Service
metadata: {name: $NAME-judge}
spec:
  clusterIP: None
  selector: {app: $NAME-judge}
  ports: [{port: 8000}]
YAML
}

HANDED_OVER="" # to a run: until then the judges end with this script
end_judges_of_cluster() {
  [ -n "$HANDED_OVER" ] || kubectl delete "statefulset,service" "$NAME-judge" >&2 || true
}
if [ -n "$JUDGE" ]; then
  [ -n "$DRY_RUN" ] || trap end_judges_of_cluster EXIT
  end_by_signals
  case "$JUDGE" in
    vllm) JUDGE_IMAGE="${JUDGE_IMAGE:-vllm/vllm-openai:latest}" ;;
    sglang) JUDGE_IMAGE="${JUDGE_IMAGE:-lmsysorg/sglang:latest}" ;;
    ours) JUDGE_IMAGE="${JUDGE_IMAGE:-$IMAGE}" ;;
  esac
  if [ -n "$DRY_RUN" ]; then
    echo "kubectl apply -f - <<'YAML'"
    manifest
    echo YAML
  else
    manifest | kubectl apply -f -
  fi
  if ! run kubectl rollout status "statefulset/$NAME-judge" "--timeout=${JUDGE_SECONDS}s"; then
    say "error: the judges were not healthy within $JUDGE_SECONDS s (--judge-seconds); the end of their log:"
    kubectl logs "statefulset/$NAME-judge" --tail=20 >&2 || true
    exit 1
  fi
  for ((number = 0; number < JUDGES; number++)); do
    add_endpoint "http://$NAME-judge-$number.$NAME-judge.default.svc.cluster.local:8000/v1"
  done
fi
use_endpoints

run xpk workload create "--workload=$NAME" "--cluster=$CLUSTER" "--zone=$ZONE" "--project=$PROJECT" "--tpu-type=$TYPE" \
  "--num-slices=$SLICES" "--docker-image=$IMAGE" "--max-restarts=$RESTARTS" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=300 \
  "--command=exec env JAX_PLATFORMS=tpu DISTRIBUTED=1 $(quoted python -m alphagrpo_jax.train "${TRAIN[@]}")" # SIGTERM must reach it
HANDED_OVER=1
[ -z "$JUDGE" ] || [ -n "$DRY_RUN" ] || say "the judges stay: kubectl delete statefulset,service $NAME-judge"
