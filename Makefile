# Each target prepares what it needs by itself.  `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MIN := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: demo test check bdd bench train docs format lock clean

$(VENV)/.runtime: requirements/runtime.txt requirements/build.txt pyproject.toml
	@$(PYTHON) -c '$(MIN)' || { echo "arriero needs Python 3.11 or newer; set PYTHON=… to one."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --require-hashes -r requirements/runtime.txt -r requirements/build.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python tools/check_system.py
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.runtime
	$(PIP) install --quiet --require-hashes -r requirements/dev.txt
	@touch $@

## One answer from the demo model, through CLI, orchestrator, agent, worker and engine.
demo: $(VENV)/.runtime
	@home=$$(mktemp -d); trap 'rm -rf $$home' EXIT; \
		echo '$$ arriero infer --ephemeral --model demo --temperature 0 "Count from 5 to 25."'; \
		ARRIERO_HOME=$$home ARRIERO_ORCHESTRATOR_PORT=0 ARRIERO_AGENT_PORT=0 \
		$(BIN)/arriero infer --ephemeral --model demo --temperature 0 "Count from 5 to 25."

## All tests.
test: $(VENV)/.dev
	$(BIN)/python tools/run_tests.py

## Format, lint, types, imports, unit tests: under 45 s.
check: $(VENV)/.dev
	@$(BIN)/python tools/check.py

## The behaviour suite, with its pass rate and an HTML report.
bdd: $(VENV)/.dev
	$(BIN)/python -m tests.bdd.run

## Speed, as ratios measured in one run; a JSON line is appended to reports/bench.jsonl.
bench: $(VENV)/.dev
	$(BIN)/python -m tests.bench.run

## Trains the demo model anew (about a quarter of an hour on two cores).
train:
	@test -x .venv-train/bin/python || $(PYTHON) -m venv .venv-train
	.venv-train/bin/python -m pip install --quiet -r requirements/train.txt
	.venv-train/bin/python -m tools.train_demo.train

## Makes docs/reference anew from the tables in the code.
docs: $(VENV)/.dev
	$(BIN)/python -m tools.docs

format: $(VENV)/.dev
	$(BIN)/ruff format src tests tools
	$(BIN)/ruff check --fix src tests tools

## Resolves the dependencies anew (needs uv).
lock:
	uv pip compile --universal --generate-hashes --no-header --no-annotate --python-version 3.11 --upgrade pyproject.toml -o requirements/runtime.txt
	uv pip compile --universal --generate-hashes --no-header --no-annotate --python-version 3.11 --upgrade --extra dev -c requirements/runtime.txt pyproject.toml -o requirements/dev.txt
	uv pip compile --universal --generate-hashes --no-header --no-annotate --python-version 3.11 -c requirements/dev.txt requirements/build.in -o requirements/build.txt

clean:
	rm -rf $(VENV) .venv-train build dist reports .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
