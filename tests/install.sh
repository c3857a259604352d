#!/usr/bin/env bash
# Installs the packages of other projects that are tested into a virtual environment of their own, unless it is there: those of
# constraints-KIND.in, at the versions of constraints-KIND.txt, beside this package's extras. Those that are named last come without
# what they require. uv is several times as fast as pip, which knows where this system gets its torch from: a CPU wheel.
#   UV=.venv/bin/uv tests/install.sh KIND FOLDER EXTRAS PACKAGE...
set -euo pipefail
kind=$1 folder=$2 extras=$3
shift 3
cd "$(dirname "$0")/.."
if [ -e "$folder/.installed" ]; then
  exit 0
fi
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --no-compile --constraint "constraints-$kind.txt" torch
packages=("$UV" pip install --quiet --python "$folder/bin/python" --constraint "constraints-$kind.txt")
alone=$(IFS='|'; echo "$*")
mapfile -t asked < <(sed -E "s/ *#.*//; /^($alone)==/d; /^$/d" "constraints-$kind.in")
"${packages[@]}" ".[$extras]" "${asked[@]}"
"${packages[@]}" --no-deps "$@"
# The tests run on the sources that they lie beside.
"$UV" pip uninstall --quiet --python "$folder/bin/python" oldlogits
"$folder/bin/python" tools/lock.py check "constraints-$kind.txt"
touch "$folder/.installed"
