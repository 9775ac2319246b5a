# Sourced by the other scripts: makes the virtual environment once, installs the project, activates it.
# VENV: where it lives (default .venv). PYTHON: what makes it (default python3, 3.11 or newer).
VENV="${VENV:-.venv}"
if [ ! -e "$VENV/installed" ] || [ setup.py -nt "$VENV/installed" ] || [ constraints.txt -nt "$VENV/installed" ]; then
  "${PYTHON:-python3}" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet -c constraints.txt -e "${EXTRAS:-.[tests]}"
  touch "$VENV/installed"
fi
. "$VENV/bin/activate"
