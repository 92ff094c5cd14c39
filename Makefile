# `make env` installs, `make demo` shows what the project does, `make test` checks it. See locks/README.md for the pins.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# What pip installs first, with torch's own needs: also a wheel's path, or "torch==2.13.0 --index-url URL" for a CPU build.
TORCH ?= torch==2.13.0
# cpu or gpu: which of locks/ is installed.
LOCK ?= cpu

BIN := .venv/bin
STAMP := .venv/installed-$(LOCK)

.PHONY: env demo test test-all lint clean

env: $(STAMP)

# Another lock's packages would stay behind in the environment, so changing LOCK begins anew.
$(STAMP): locks/$(LOCK).txt pyproject.toml
	@set -- .venv/installed-*; if [ -e "$$1" ] && [ ! -e $@ ]; then rm -rf .venv; fi
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check -c locks/$(LOCK).txt $(TORCH) setuptools
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -r locks/$(LOCK).txt
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

DEMO := build/demo

demo: env
	$(BIN)/distrec demo-data --out $(DEMO)/shop
	$(BIN)/distrec prepare configs/data/demo.yaml --source $(DEMO)/shop --out $(DEMO)/data
	$(BIN)/distrec encode $(DEMO)/data
	@echo "== The main job: AlignRec on 2 Ray Train workers"
	$(BIN)/distrec train configs/alignrec/demo.yaml
	@echo "== For comparison, in one process: LightGCN (no content) and popularity"
	$(BIN)/distrec train configs/lightgcn/demo.yaml train.workers=0
	$(BIN)/distrec train configs/popularity/demo.yaml train.workers=0
	@echo "== Full ranking of the test split; in brackets the best that is possible, known because the shop is generated"
	$(BIN)/distrec evaluate $(addprefix $(DEMO)/runs/,popularity-demo lightgcn-demo alignrec-demo) --beside $(DEMO)/shop/oracle.json

# What CI runs. `wide` tests repeat its properties with more seeds, sizes, workers and kills: `make test-all`.
test: SCOPE := and not wide
test test-all: lint
	@echo "== Each room by itself, in two processes"
	$(PYTEST) -n 2 -m "not multiprocess and not realdata $(SCOPE)"
	@echo "== Several processes: gloo workers and Ray clusters on this machine"
	$(PYTEST) -m "multiprocess and not realdata $(SCOPE)"
	@echo "== Real data: the datasets in shared/data beside the repository"
	$(PYTEST) -m "realdata $(SCOPE)"

# One thread per process, since several run at once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

lint: env
	@echo "== Style: ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== Types: mypy"
	$(BIN)/mypy

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache *.egg-info
