# Two commands: `make demo` and `make test`. Both set up .venv on a machine that has Python 3.11 (or newer) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo docs test test-interop test-semantics test-timm browser lint clean

# ttsem executes kernels on a CPU. Its metadata asks for Python 3.12, but it runs with 3.11; its one need is NumPy.
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --ignore-requires-python ttsem \
	  || echo "no ttsem: the tests that need it are skipped" >&2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m vmoe_torch.demo

# One thread a process and a process a core: the tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(or $(WORKERS),2)

test: $(STAMP) lint
	$(PYTEST) tests --ignore=tests/interpreter --ignore=tests/semantics
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter
	$(SEMANTICS) --part quick tests/semantics tests/gpu
	$(BIN)/python -m benchmarks.compile.report --check --processes 2 > /dev/null

# Other people's tools on our models; `make test` runs these tests too.
test-interop: $(STAMP)
	$(PYTEST) tests/interop

# The GPU tests on the CPU: every launch compiled, executed and judged by ttsem. `make test` has a part of it.
SEMANTICS := $(PYTEST) -p tests.semantics.plugin
test-semantics: $(STAMP)
	$(SEMANTICS) --write tests/semantics tests/gpu
	for chip in 80 90 100; do $(SEMANTICS) --write --lowered --chip $$chip tests/semantics || exit; done

test-timm: $(STAMP)
	$(BIN)/python tests/timm_suite/run.py

# As root, on Debian and its kin. Some tests open the reports in it; other systems: any Chromium on the PATH.
browser:
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends chromium > /dev/null

# Pages into site/; needs no network, and a warning is an error.
docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check src kernels tests benchmarks docs/*.py setup.py
	$(BIN)/ruff format --check src kernels tests benchmarks docs/*.py setup.py

clean:
	rm -rf $(VENV) site build dist *.egg-info src/*.egg-info
