# Everything runs in .venv, which any target makes when it is missing or older than requirements.txt.
# `make train ARGS="optimizer.lr=3e-4"` hands ARGS to the command; so do test, test-slow and demo-world's scripts.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
comma := ,
ADAPTERS ?= demo/adapters/decoupled_global.safetensors,demo/adapters/simple_global.safetensors
EVALUATION ?= runs/evaluation/demo
VARIANTS := decoupled_global,decoupled_fine_grained,simple_global,simple_fine_grained

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv train ablation evaluate test test-slow test-commands test-cluster bench bench-data lint format type lock demo-world clean

help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  \033[1mmake %-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## the environment .venv with the pinned dependencies, needs only Python 3.11 or newer

# uv installs in parallel and from its cache; where it is missing, pip brings it into the environment.
# What else stands in the environment is left there.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ipa needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || uv venv --clear --python $(PYTHON) $(VENV)
	@command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	PATH="$$PATH:$(BIN)" uv pip install --python $(BIN)/python --requirement requirements.txt
	PATH="$$PATH:$(BIN)" uv pip install --python $(BIN)/python --no-deps --editable .
	@touch $@

train: $(READY) ## train the paper's adapter in the demo world and show that it worked
	$(BIN)/python train.py experiment=decoupled_global $(ARGS)

# Twelve runs, two at a time with one thread each, which does more on two cores than one run with two.
ablation: $(READY) ## all four variants, three seeds each, compared in docs/ablation.md; about an hour on two cores
	$(BIN)/python train.py -m experiment=$(VARIANTS) seed=1,2,3 name=ablation hydra.launcher.jobs=2 $(ARGS)
	$(BIN)/python -m ipa.tools.ablation sweep=runs/ablation out=docs/ablation.md notes=docs/ablation_notes.md \
		adapters=demo/adapters

evaluate: $(READY) ## compare adapters and the base in the demo world, with a report; minutes
	$(BIN)/python evaluate.py -m adapter=$(ADAPTERS) $(ARGS)
	$(BIN)/python evaluate.py adapter=$(firstword $(subst $(comma), ,$(ADAPTERS))) sampling.scale=0 $(ARGS)
	$(BIN)/python -m ipa.tools.report $(EVALUATION)

# Two processes with one thread each do more than one process with two threads.
test: $(READY) ## the tests, minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(READY) ## the tests that take longer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(ARGS)

# As a user starts them, with processes, full disks and secrets: too long for the default suite, too important to be left out by CI.
test-commands: $(READY) ## whole commands and several ranks, minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests/training/test_secrets.py \
		tests/training/test_console.py tests/training/test_failures.py tests/training/test_shared_previews.py $(ARGS)

# Real daemons and nodes of namespaces; without slurm-wlm and munge, or without root, those tests say so and are skipped.
test-cluster: $(READY) ## a real Slurm and two nodes on this machine; minutes, as root, with slurm-wlm and munge
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -m "slow or not slow" $(ARGS)

bench: $(READY) ## our speed beside the public script's and diffusers'; half an hour, nothing else should run
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/sample.py
	$(BIN)/python benchmarks/step.py --each
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/curve.py
	$(BIN)/python benchmarks/memory.py

bench-data: $(READY) ## how fast samples come, beside a plain dataset; minutes, nothing else should run
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/data.py --memory $(ARGS)

lint: $(READY) ## style and formatting, changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY) ## mend what lint complains about
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

type: $(READY) ## check the types
	$(BIN)/mypy

lock: $(READY) ## compile requirements.txt from pyproject.toml, for all platforms and Python versions
	PATH="$$PATH:$(BIN)" uv pip compile pyproject.toml --extra demo --extra dev --extra slurm --output-file requirements.txt \
		--universal --python-version 3.11 --no-header --annotation-style line $(ARGS)

demo-world: $(READY) ## make the demo world again, data and models; hours on a CPU, resumable
	$(BIN)/python demo/make_data.py
	$(BIN)/python demo/make_base.py unet --threads 2
	$(BIN)/python demo/make_base.py vae --threads 2
	$(BIN)/python demo/make_base.py export
	$(BIN)/python demo/make_base.py vae --start demo/base --build demo/build/decoder --minutes 22 --threads 2
	$(BIN)/python demo/make_base.py export --start demo/base --build demo/build/decoder
	$(BIN)/python demo/make_clip.py encoder --threads 2
	$(BIN)/python demo/make_clip.py judge --threads 2
	$(BIN)/python demo/style.py
	$(BIN)/python demo/measure.py clip
	$(BIN)/python demo/measure.py vae
	$(BIN)/python demo/measure.py base

clean: ## remove what tools leave behind; keeps .venv, runs and demo/build
	rm -rf .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
