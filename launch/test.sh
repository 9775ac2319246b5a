#!/usr/bin/env bash
# Installs on the first call, then runs the tests; arguments go to pytest.
#   ./launch/test.sh            all but the slow ones
#   ./launch/test.sh -m slow    the slow ones
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
# In the order of collection the longest files, end to end, come first, so that no worker idles at the end.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
