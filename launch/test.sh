#!/usr/bin/env bash
# Installs on the first call, then runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
# The longest files come first in the order of collection (end to end), so that no worker idles at the end.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
