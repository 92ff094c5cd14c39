# `make env` installs, `make demo` shows what the project does, `make test` checks it. See locks/README.md for the pins.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The torch that pip installs first, with its own dependencies. For a CPU build, give the path of a wheel, or
# "torch==2.13.0 --index-url URL".
TORCH ?= torch==2.13.0
# Which lock file is installed, cpu or gpu; dev.txt, with what tests and checks need, is installed with either.
LOCK ?= cpu

BIN := .venv/bin
STAMP := .venv/installed-$(LOCK)

.PHONY: env demo test test-all test-lab test-manifests test-image lint clean

env: $(STAMP)

# With another LOCK, the environment is built again, because packages of the previous lock would remain in it.
$(STAMP): locks/$(LOCK).txt locks/dev.txt pyproject.toml
	@set -- .venv/installed-*; if [ -e "$$1" ] && [ ! -e $@ ]; then rm -rf .venv; fi
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check -c locks/$(LOCK).txt -c locks/dev.txt $(TORCH) setuptools
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation \
		-r locks/$(LOCK).txt -r locks/dev.txt
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
	@echo "== Full ranking of the test split; in brackets the best possible ranking, known because the shop is generated"
	$(BIN)/distrec evaluate $(addprefix $(DEMO)/runs/,popularity-demo lightgcn-demo alignrec-demo) \
		--beside $(DEMO)/shop/oracle.json

# CI runs `make test`. `make test-all` adds the `wide` tests, which repeat its properties with more seeds, sizes,
# workers and kills.
test: SCOPE := and not wide
test test-all: lint
	@echo "== Tests, two at a time; those of several processes start gloo workers and Ray clusters on this machine"
	$(PYTEST) -n 2 --no-loadscope-reorder -m "not realdata and not lab and not image $(SCOPE)"
	@echo "== Tests on real data: the datasets in shared/data next to the repository"
	$(PYTEST) -m "realdata $(SCOPE)"

# Several hosts on this machine, made of network namespaces. Needs root and iproute2. The hosts end with the tests,
# however these end.
test-lab: env
	@echo "== Tests on several hosts: head, three workers, client and storage"
	$(PYTEST) -m lab tests/lab --ignore tests/lab/test_rayjob.py

# Manifests of Kubernetes on the same hosts, as its operator would run them. Needs kubectl too.
test-manifests: env
	@echo "== A RayJob and a Job on several hosts"
	$(PYTEST) -m lab tests/lab/test_rayjob.py

# The image, really built and used. Needs root, package registries and 10 GB of free disk.
test-image: env
	@command -v buildah mmdebstrap >/dev/null || apt-get install -y -qq buildah mmdebstrap >/dev/null 2>&1 || true
	@echo "== Tests in the image"
	TORCH="$(TORCH)" $(PYTEST) -m image tests/image

# Each process has one thread, since several processes run at the same time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

lint: env
	@echo "== Style: ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== Dockerfile: hadolint"
	$(BIN)/hadolint Dockerfile
	@echo "== Types: mypy"
	$(BIN)/mypy

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache *.egg-info
