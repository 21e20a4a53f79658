# Needs Python 3.11+, git and make; everything else comes by pip into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BROWSER := $(VENV)/.browser
ECOSYSTEM := .venv-ecosystem/.installed
ORCHESTRATORS := .venv-orchestrators/.installed

.PHONY: demo test test-contract test-acceptance test-nightly test-browser test-ops test-ecosystem drill nights screenshots docs lint bench bench-gpu bench-peers clean

$(INSTALLED): pyproject.toml constraints.txt
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); \
	found=$$($$python -c 'import sys; print("%d.%d %s" % (sys.version_info[:2] + (sys.version_info >= (3, 11),)))' 2>/dev/null); \
	case "$$found" in \
		*True) ;; \
		"") echo "there is no $$python; vectormill needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1;; \
		*) echo "$$python is Python $${found% *}; vectormill needs 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1;; \
	esac
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[worker,embedded,dev]'
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/vectormill demo

# Two modules at a time, in their order (the drill of `make test`, which is the longest, comes first), on servers of
# their own: tests wait more than they compute.
TWO := --numprocesses 2 --dist loadscope --no-loadscope-reorder

test: $(INSTALLED)
	$(BIN)/python -m pytest $(TWO)

# The api as OpenAI's clients and others use it, and held against its OpenAPI schema.
test-contract: $(INSTALLED)
	$(BIN)/python -m pytest $(TWO) tests/contract

# Whole jobs by every way in and out, through gateways, from SQL; single faults, mutants. A short drill is in `make test`.
# Two tests at a time, of whatever module: each has a fleet of its own. Then those that measure how fast a fleet is.
test-acceptance: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/acceptance tests/chaos -m 'not alone and not nightly' \
		--ignore tests/chaos/test_drill.py
	$(BIN)/python -m pytest tests/acceptance -m alone

# What CI has no time for: the same as some of those, but larger, or by another way. Then a week of nights.
test-nightly: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/acceptance -m nightly
	$(MAKE) nights

SEED ?= $(shell date +%s)
MINUTES ?= 60

# A week of nightly syncs of a table that changes, by processes that are killed.
nights: $(INSTALLED)
	NIGHTS_ROWS=$(or $(ROWS),200000) $(BIN)/python -m pytest --timeout 10800 tests/acceptance/test_collections.py

# Faults for as long as you like, on servers of its own; with DEFAULTS=1 a few kinds at default settings, and their time
# limits. Root has disks that fill up, and a clock that is ahead.
drill: $(INSTALLED)
	@test "$$(id -u)" != 0 || test -e /usr/lib/*/faketime/libfaketime.so.1 || ! command -v apt-get >/dev/null || { \
		apt-get update -qq && apt-get install -y -qq faketime >/dev/null; }
	$(BIN)/python -m tests.chaos --seed $(SEED) --minutes $(MINUTES) $(if $(DEFAULTS),--defaults)

# Chromium isn't on PyPI: Debian's is installed by root, who else has it already or is told what is missing.
$(BROWSER): $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[browser]'
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null || { \
			echo "the browser tests need Chromium: apt-get install chromium" >&2; exit 1; }; \
		echo "Installing Chromium …"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends chromium fonts-inter >/dev/null; }
	@touch $@

test-browser: $(BROWSER)
	$(BIN)/python -m pytest tests/browser

# Debian's prometheus brings promtool. Its service isn't wanted.
# Compose file, images, doctor, Flower, metrics, rules, and every command in README, runbooks and guides.
test-ops: $(INSTALLED)
	@command -v promtool >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null || { \
			echo "the rules are tested by promtool: apt-get install prometheus" >&2; exit 1; }; \
		echo "Installing promtool …"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
			apt-get install -y -qq --no-install-recommends prometheus >/dev/null; }
	promtool check config ops/prometheus/prometheus.yml
	promtool test rules ops/prometheus/rules_test.yml
	$(BIN)/python -m pytest $(TWO) tests/deployment

# Airflow, dbt and LiteLLM; Dagster and Prefect. Their requirements are neither ours nor each other's.
$(ECOSYSTEM): tests/ecosystem/requirements.txt
$(ORCHESTRATORS): tests/ecosystem/requirements-orchestrators.txt
$(ECOSYSTEM) $(ORCHESTRATORS):
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "Installing into $(@D) …"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --requirement $<
	@touch $@

test-ecosystem: $(INSTALLED) $(ECOSYSTEM) $(ORCHESTRATORS)
	$(BIN)/python -m pytest tests/ecosystem

screenshots: $(BROWSER)
	$(BIN)/python -m tests.browser.screenshots

# Reference pages from the code that defines what they list; then the site, in .vectormill/docs/site.
docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/site.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive pipeline workers migrations ops
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks
	$(BIN)/python -m tests.benchmarks.dry_run

# Other ways to embed on this CPU, beside ours.
bench-peers: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.peers

# On one NVIDIA GPU, in eight minutes. Beside a torch of one's own: python -m tests.benchmarks.gpu --help
bench-gpu: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.gpu

clean:
	-@test ! -x $(BIN)/vectormill || VECTORMILL_HOME=$(CURDIR)/.vectormill $(BIN)/vectormill down --delete --yes
	rm -rf $(VENV) .venv-ecosystem .venv-orchestrators .vectormill .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
