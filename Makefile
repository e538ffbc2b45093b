# `make` lists the targets. Each makes .venv by itself when it has to; PYTHON=/path/to/python3 names the interpreter.

VENV := .venv
FLOOR := .venv-floor

# Two processes with one thread each: on small machines PyTorch's own threads only get in each other's way.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup setup-floor demo test test-core test-all test-floor gpu gpu-wheels wheels docs docs-serve docs-pages docs-figures lint format

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' Makefile

setup: ## make .venv and install everything; nothing to do when it is up to date
	@PYTHON='$(PYTHON)' sh tools/setup.sh $(VENV)

setup-floor: ## the same with the oldest supported versions, in .venv-floor
	@PYTHON='$(PYTHON)' PYTHONS='python3.10 python3.11 python3.12 python3.13 python3 python' \
		sh tools/setup.sh $(FLOOR) 'torch==2.10.*' 'transformers==5.14.*'

demo: setup ## draw a dataset, train a small DINO on it, evaluate it, show a detection
	$(VENV)/bin/python examples/demo.py

test: setup ## the tests (PYTEST_ARGS="-k denoising" replaces the arguments)
	$(call PYTEST,$(VENV))

test-core: setup ## the tests of the flat core alone, in a minute
	$(call PYTEST,$(VENV)) tests/core

test-all: setup ## the tests, the slow ones too
	$(call PYTEST,$(VENV)) -m ""

test-floor: setup-floor ## the tests on the oldest supported versions of torch and transformers
	$(call PYTEST,$(FLOOR))

gpu: ## build, test and measure the CUDA code on this machine's GPU, in 8 minutes at most; no .venv (OUT=directory)
	$(or $(PYTHON),python3) benchmarks/gpu.py $(GPU_ARGS)

gpu-wheels: ## fetch what a GPU machine without network may lack, into wheels/
	$(or $(PYTHON),python3) benchmarks/gpu_stages/wheels.py wheels

wheels: setup ## build wheels with the compiled kernel into dist/, for CPUs and, where nvcc is, for CUDA
	$(VENV)/bin/python tools/wheels.py

docs: setup ## build the site of the docs into site/, without a warning
	$(VENV)/bin/python tools/docs_site.py

docs-serve: docs ## build the site and show it at http://localhost:8000
	$(VENV)/bin/python -m http.server --bind localhost --directory site

docs-pages: setup ## write what the docs take from the code: the table of options and the notebooks
	$(VENV)/bin/python tools/docs_site.py --pages
	$(VENV)/bin/python tools/notebooks.py

docs-figures: setup ## draw the images of the docs from the model and the dataset of `make demo`
	$(VENV)/bin/python docs/figures.py

lint: setup ## formatting, style and types; changes nothing
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check
	$(VENV)/bin/python -m mypy

format: setup ## put the code in order
	$(VENV)/bin/python -m ruff check --fix
	$(VENV)/bin/python -m ruff format
