#!/usr/bin/env bash
# Installs the trainers that the adapters are for into a virtual environment of their own (2 GB), unless it is there.
#   UV=.venv/bin/uv tests/peers/install.sh FOLDER
set -euo pipefail
folder=$1
cd "$(dirname "$0")/../.."
if [ -e "$folder/.installed" ]; then
  exit 0
fi
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
# pip knows where this system gets its torch from: a CPU wheel.
"$folder/bin/python" -m pip install --quiet --no-compile --constraint constraints-peers.txt torch
packages=("$UV" pip install --quiet --python "$folder/bin/python" --constraint constraints-peers.txt)
mapfile -t asked < <(sed -E '/^(#|areal|verl==|$)/d' constraints-peers.in)
"${packages[@]}" '.[lora,ray]' "${asked[@]}"
# What these two require are other builds of torch, engines and kernels; what their modules import is in the list above.
"${packages[@]}" --no-deps areal verl
# The tests run on the sources that they lie beside.
"$UV" pip uninstall --quiet --python "$folder/bin/python" oldlogits
"$folder/bin/python" tools/lock.py check constraints-peers.txt
touch "$folder/.installed"
