# Needs make, bash and Python 3.9 or newer; on Debian and Ubuntu the rest is fetched when it is first needed.
# All of it lands in .stack/, except for Debian's packages of PostgreSQL and PgBouncer.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# Makes the tools; PYTHON is what runs Odoo, see "up".
BASE_PYTHON ?= python3
# Additional arguments of the program that a target runs: make test ARGS="-k outage -x"
ARGS ?=
# How long "soak" is to take.
MINUTES ?= 10

TOOLS := .stack/tools
TOOLS_PYTHON := $(TOOLS)/bin/python
TOOLS_STAMP := $(TOOLS)/stamp

.PHONY: help demo test soak lint up tools clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# "exec": a signal to make reaches the program itself, not a shell that waits for it.

demo: $(TOOLS_STAMP) ## see the problem, and the addon solve it, on real servers
	@exec $(TOOLS_PYTHON) -m demo $(ARGS)

test: $(TOOLS_STAMP) ## run the tests (ARGS="..." goes to pytest)
	@exec $(TOOLS_PYTHON) -m pytest $(ARGS)

soak: $(TOOLS_STAMP) ## random faults for MINUTES=10, many clients: is anything lost or doubled?
	@exec $(TOOLS_PYTHON) -m tests.soak $(MINUTES) $(ARGS)

lint: $(TOOLS_STAMP) ## check style, that the addon runs on Python 3.5, and README.rst
	$(TOOLS)/bin/ruff check .
	$(TOOLS)/bin/ruff format --check .
	$(TOOLS_PYTHON) -m tests.syntax 3.5 bus_alt_connection
	$(TOOLS)/bin/vermin --target=3.5- --no-tips --violations --quiet bus_alt_connection
	$(TOOLS_PYTHON) -m docutils --report=warning --halt=warning README.rst /dev/null

up: $(TOOLS_STAMP) ## start PostgreSQL, PgBouncer and Odoo with the addon, until Ctrl-C
	@exec $(TOOLS_PYTHON) -m tests.stack.up $(ARGS)

tools: $(TOOLS_STAMP) ## install the tools of the other targets

clean: ## remove all that was downloaded, installed and cached
	rm -rf .stack .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# A virtual environment does not survive a move of the folder that it is in. So the stamp has its path, and is out of
# date elsewhere.
ifneq ($(file < $(TOOLS_STAMP)),$(CURDIR))
.PHONY: $(TOOLS_STAMP)
endif
$(TOOLS_STAMP): tests/requirements/tools.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9) and "Python 3.9 or newer is needed")'
	@# A fresh Debian has python3, but not what makes virtual environments.
	@$(BASE_PYTHON) -c 'import ensurepip' 2> /dev/null || $(BASE_PYTHON) -m tests.stack.system python3-venv
	@echo 'installing the tools ...' >&2
	@$(BASE_PYTHON) -m venv --clear $(TOOLS)
	@$(TOOLS_PYTHON) -m pip install --quiet --disable-pip-version-check --no-input -r $<
	@printf '%s' '$(CURDIR)' > $@
