#!/usr/bin/env bash
# One process on this machine: installs on the first call, then trains.
#   ./launch/local.sh                                        the embedded default, configs/grpo.py
#   ./launch/local.sh --config=FILE --config.some.field=1    another config, changed fields
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
case " $* " in *" --config="*) ;; *) set -- --config=configs/grpo.py "$@" ;; esac
echo "starting python -m alphagrpo_jax.train $*" >&2  # its libraries take some seconds before its own first line
exec python -m alphagrpo_jax.train "$@"
