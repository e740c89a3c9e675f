# Everything runs in .venv, which each target creates if it is missing or older than requirements.txt.
# `make train ARGS="optimizer.lr=3e-4"` passes ARGS to the command; most other targets do the same.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
comma := ,
ADAPTERS ?= demo/adapters/decoupled_global.safetensors,demo/adapters/simple_global.safetensors
EVALUATION ?= runs/evaluation/demo
# what the demo base learns: two more styles than the adapters, each picture moved by a few pixels
LEARNED := --data demo/data/train demo/build/data/styles --shift 3 --batch 32 --align demo/encoder
VARIANTS := decoupled_global,decoupled_fine_grained,simple_global,simple_fine_grained

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv train ablation paper evaluate test test-slow test-quantization test-commands test-cluster bench bench-data docs lint format type lock demo-world clean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  \033[1mmake %-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## create .venv with the pinned dependencies; requires only Python 3.11 or newer

# uv installs in parallel and from its cache; if it is missing, pip installs it into the environment.
# Other packages in the environment are kept.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ipa needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || uv venv --clear --python $(PYTHON) $(VENV)
	@command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	PATH="$$PATH:$(BIN)" uv pip install --python $(BIN)/python --requirement requirements.txt
	PATH="$$PATH:$(BIN)" uv pip install --python $(BIN)/python --no-deps --editable .
	@touch $@

train: $(READY) ## train the paper's adapter in the demo world
	$(BIN)/python train.py experiment=decoupled_global $(ARGS)

# Twelve runs, two at a time with one thread each: faster on two cores than one run with two threads.
ablation: $(READY) ## train and compare all variants with three seeds (docs/ablation.md); about an hour on two cores
	$(BIN)/python train.py -m experiment=$(VARIANTS) seed=1,2,3 name=ablation hydra.launcher.jobs=2 $(ARGS)
	$(BIN)/python -m ipa.tools.ablation sweep=runs/ablation out=docs/ablation.md notes=docs/ablation_notes.md \
		adapters=demo/adapters

paper: $(READY) ## measure every claim of the paper and write docs/paper/; about an hour on two cores; resumable
	$(BIN)/python -m demo.paper $(ARGS)

evaluate: $(READY) ## compare adapters and the base in the demo world and write a report; minutes
	$(BIN)/python evaluate.py -m adapter=$(ADAPTERS) $(ARGS)
	$(BIN)/python evaluate.py adapter=$(firstword $(subst $(comma), ,$(ADAPTERS))) sampling.scale=0 $(ARGS)
	$(BIN)/python -m ipa.tools.report $(EVALUATION)

# Two processes with one thread each are faster than one process with two threads.
test: $(READY) ## run the tests; minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(READY) ## run the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(ARGS)

# In a folder of their own, since diffusers imports these packages, with warnings, wherever they are installed.
test-quantization: $(READY) ## test quantized bases; downloads 150 MB
	PATH="$$PATH:$(BIN)" uv pip install --python $(BIN)/python --target $(VENV)/quantization --no-deps \
		torchao==0.18.0 bitsandbytes==0.50.2 gguf==0.19.0
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/quantization $(BIN)/python -m pytest tests/families/test_quantization.py $(ARGS)

# Commands as a user starts them, with several processes, full disks and secrets: slow, but part of CI.
test-commands: $(READY) ## test complete commands and several ranks; minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests/training/test_secrets.py \
		tests/training/test_console.py tests/training/test_failures.py tests/training/test_shared_previews.py $(ARGS)
	PATH="$$PATH:$(CURDIR)/$(BIN)" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_wheel.py \
		tests/test_documented_commands.py $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/tools/test_app_browser.py $(ARGS)

# Real daemons, and nodes made of network namespaces; skipped without slurm-wlm and munge, or without root.
test-cluster: $(READY) ## test with a real Slurm and two nodes on this machine; minutes; needs root, slurm-wlm and munge
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -m "slow or not slow" $(ARGS)

bench: $(READY) ## compare our speed with the public script and diffusers; half an hour on an idle machine
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/sample.py
	$(BIN)/python benchmarks/step.py --each
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/curve.py
	$(BIN)/python benchmarks/memory.py

bench-data: $(READY) ## compare the speed of the data pipeline with a plain dataset; minutes on an idle machine
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/data.py --memory $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pairs.py

docs: $(READY) ## build the documentation into site/ and check its links; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

lint: $(READY) ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY) ## fix what lint reports
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

type: $(READY) ## check types
	$(BIN)/mypy

lock: $(READY) ## compile requirements.txt from pyproject.toml for all platforms and Python versions
	PATH="$$PATH:$(BIN)" uv pip compile pyproject.toml --extra app --extra demo --extra dev --extra docs --extra slurm \
		--output-file requirements.txt --universal --python-version 3.11 --no-header --annotation-style line $(ARGS)

demo-world: $(READY) ## rebuild the data and models of the demo world; hours on a CPU, resumable
	$(BIN)/python demo/make_data.py
	$(BIN)/python demo/make_clip.py encoder --threads 2
	$(BIN)/python demo/make_clip.py judge --threads 2
	$(BIN)/python demo/make_base.py unet $(LEARNED) --threads 2
	$(BIN)/python demo/make_base.py vae --threads 2
	$(BIN)/python demo/make_base.py export
	$(BIN)/python demo/make_base.py vae --start demo/base --build demo/build/decoder --minutes 22 --threads 2
	$(BIN)/python demo/make_base.py export --start demo/base --build demo/build/decoder
	$(BIN)/python demo/measure.py clip
	$(BIN)/python demo/measure.py vae
	$(BIN)/python demo/measure.py base
	$(BIN)/python demo/make_control.py --threads 2
	$(BIN)/python demo/make_control.py --kind t2i_adapter --minutes 25 --threads 2
	$(BIN)/python demo/make_concept.py embedding
	$(BIN)/python demo/make_concept.py lora

clean: ## remove caches; keeps .venv, runs and demo/build
	rm -rf .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
