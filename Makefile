# make demo | test | lint | parity | test-all | clean | lock. Each installs what it needs into $(VENV) first.
# Another Python: make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= workdir/demo
PY := $(VENV)/bin/python
PARITY := .venv-parity

# Exact versions with hashes for this Python; LOCK=requirements-dev.txt takes the newest that the ranges allow instead.
LOCK ?= $(shell $(PYTHON) -c 'import sys; print("requirements/py311.txt" if sys.version_info < (3, 12) else "requirements/py312.txt")')

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Tests use virtual CPU devices: XLA's thread pool must be at least twice as large as their number or collectives deadlock.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PYTEST := NPROC=16 $(PY) -m pytest $(PARALLEL)

# Debian's python has no ensurepip, so `venv` fails there; then the pip that comes with it installs into the new folder.
define create_venv
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(1) >/dev/null 2>&1 || $(PYTHON) -m venv --without-pip $(1)
	@if $(1)/bin/python -m pip --version >/dev/null 2>&1; then pip="$(1)/bin/python -m pip"; \
	else pip="$(PYTHON) -m pip --python $(1)/bin/python"; fi; \
	set -x; $$pip install --quiet -r $(2)
	@touch $(1)/.installed
endef

.PHONY: demo test lint parity test-all venv lock clean

demo: venv
	$(PY) train.py --config configs/autoencoder_kl.py:emoji --workdir $(WORKDIR)/autoencoder
	$(PY) train.py --config configs/ldm_text.py:emoji --config.first_stage.workdir=$(WORKDIR)/autoencoder \
	  --config.first_stage.cache=$(WORKDIR)/latents --workdir $(WORKDIR)/ldm
	$(PY) sample.py --workdir $(WORKDIR)/ldm --prompts_file docs/demo_prompts.txt --output $(WORKDIR)/samples --overwrite
	@echo "Reconstructions of held-out pictures: $(WORKDIR)/autoencoder/reconstructions.png"
	@echo "Samples, each under its caption:      $(WORKDIR)/samples/samples.png"
	@echo "Curves and pictures of both runs:     $(VENV)/bin/tensorboard --logdir $(WORKDIR)"

test: venv
	$(PYTEST) -m "not slow and not parity" tests

test-all: venv
	$(PYTEST) tests

lint: venv
	$(PY) -m ruff check .
	$(VENV)/bin/lint-imports

# Compares with PyTorch and diffusers, in an environment of its own (2 GB).
parity: $(PARITY)/.installed
	NPROC=16 $(PARITY)/bin/python -m pytest $(PARALLEL) tests/parity

venv: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt $(wildcard requirements/*.txt)
	$(call create_venv,$(VENV),$(LOCK))

$(PARITY)/.installed: requirements.txt requirements-dev.txt requirements-parity.txt
	$(call create_venv,$(PARITY),requirements-parity.txt)

# Needs uv (pip install uv). Valid on every platform; py312.txt serves Python 3.12 and newer.
lock:
	for line in 3.11 3.12; do \
	  uv pip compile --quiet --upgrade --universal --fork-strategy fewest --python-version $$line --generate-hashes \
	    --default-index https://pypi.org/simple --no-emit-index-url --custom-compile-command "make lock" \
	    requirements-dev.txt --output-file requirements/py$$(echo $$line | tr -d .).txt || exit 1; \
	done

clean:
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
