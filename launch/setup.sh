# shellcheck shell=bash
# Sourced by the other scripts: makes the virtual environment once, installs the project, activates it.
# VENV: where it lives (default .venv). PYTHON: what makes it (default python3, 3.11 or newer).
# EXTRAS: what is installed (default ".[tests]", or what it was last time), e.g. ".[tests,cuda]" for a GPU.
VENV="${VENV:-.venv}"
wanted="${EXTRAS:-$(cat "$VENV/installed" 2>/dev/null || true)}"
wanted="${wanted:-.[tests]}"
if [ ! -e "$VENV/installed" ] || [ "$(cat "$VENV/installed")" != "$wanted" ] ||
  [ setup.py -nt "$VENV/installed" ] || [ constraints.txt -nt "$VENV/installed" ]; then
  echo "installing $wanted into $VENV: once, some minutes ..." >&2
  began=$SECONDS
  "${PYTHON:-python3}" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet -c constraints.txt -e "$wanted"
  echo "$wanted" > "$VENV/installed"
  echo "installing ... $((SECONDS - began)) s" >&2
fi
unset wanted began
# shellcheck disable=SC1091 # made above
. "$VENV/bin/activate"
