# `make env` installs, `make demo` shows what the project does, `make test` checks it. See locks/README.md for the pins.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# What pip installs first, with torch's own needs: also a wheel's path, or "torch==2.13.0 --index-url URL" for a CPU build.
TORCH ?= torch==2.13.0
# cpu or gpu: which of locks/ is installed.
LOCK ?= cpu

BIN := .venv/bin
STAMP := .venv/installed-$(LOCK)

.PHONY: env demo test lint clean

env: $(STAMP)

# Another lock's packages would stay behind in the environment, so changing LOCK begins anew.
$(STAMP): locks/$(LOCK).txt pyproject.toml
	@set -- .venv/installed-*; if [ -e "$$1" ] && [ ! -e $@ ]; then rm -rf .venv; fi
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint locks/$(LOCK).txt $(TORCH) setuptools
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --requirement locks/$(LOCK).txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
