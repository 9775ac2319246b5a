#!/usr/bin/env bash
# The runs behind docs/results.md, one after another, then the studies and the pictures: three seeds of the default, one run
# of each ablation, images alone, and two seeds of refinement with and without rectified rewards. Finished runs are skipped; interrupted, the
# same command continues. Arguments go to every run.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
RUNS=runs/study OUT=docs/study

run() {
  if [ ! -e "$RUNS/$1/DONE" ]; then
    python -m alphagrpo_jax.train --config="${CONFIG:-configs/grpo.py}" --workdir="$RUNS/$1" "${@:2}"
  fi
}

run seed0 --config.seed=0 "$@"
run seed1 --config.seed=1 "$@"
run seed2 --config.seed=2 "$@"
run no_text_loss --config.loss.text=none "$@"
run no_image_loss --config.loss.image=none "$@"
run full_weights --config.train.trainable=full --config.optimizer.learning_rate=2e-4 "$@"

python -m alphagrpo_jax.studies.rt2i --out "$OUT" --run "$RUNS/seed0" --run "$RUNS/seed1" --run "$RUNS/seed2"
for name in no_text_loss no_image_loss full_weights; do
  python -m alphagrpo_jax.studies.rt2i --out "$OUT" --run "$RUNS/$name" --name "$name"
done
python -m alphagrpo_jax.studies.curves --run "$RUNS/seed0" --run "$RUNS/seed1" --run "$RUNS/seed2" --out docs/curves.png \
  --samples "$RUNS/seed0" --out2 docs/samples.png

export CONFIG=configs/t2i.py
run t2i "$@"
run t2i_large_steps --config.loss.image_beta=0.03 --config.optimizer.learning_rate=1.2e-3 --config.optimizer.decay_steps=500 --config.train.steps=500 "$@"

export CONFIG=configs/srr.py
REFINED=()
for seed in 0 1; do
  run "srr$seed" --config.seed="$seed" "$@"
  run "srr_without$seed" --config.seed="$seed" --config.srr.rectification=none "$@"
  REFINED+=(--run "srr=$RUNS/srr$seed" --run "srr_without=$RUNS/srr_without$seed")
done
python -m alphagrpo_jax.studies.srr --out "$OUT" "${REFINED[@]}"
