#!/usr/bin/env bash
# Installs on the first call, then runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
exec python -m pytest -n 2 --dist loadfile "$@"
