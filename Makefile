# Needs make, bash and Python 3.9 or newer; on Debian and Ubuntu the rest is fetched when it is first needed.
# All of it lands in .stack/, except for Debian's packages and what pip keeps in a cache of its own.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# Makes the tools; PYTHON is what runs Odoo, see "up".
BASE_PYTHON ?= python3
# Additional arguments of the program that a target runs: make test ARGS="-k outage -x"
ARGS ?=
# How long "soak" and "simulate" are to take; empty: 10, and as long as its seeds need.
MINUTES ?=
# Which seeds "simulate" runs: 7, 1-300, or 1- for as many as there is time for; empty: those of "test".
SEEDS ?= $(if $(MINUTES),1-)
# How many tests run at a time.
JOBS ?= 2
# Major version of PostgreSQL, one that is installed; empty: the newest. The programs read it from the environment.
export POSTGRESQL ?=
# Where "matrix" finds source trees of Odoo, as TREES/*/odoo-bin; empty: it gets all series itself.
TREES ?=
# Not empty: "bench" takes few samples.
QUICK ?=

TOOLS := .stack/tools
TOOLS_PYTHON := $(TOOLS)/bin/python
TOOLS_STAMP := $(TOOLS)/stamp
# An old release of pylint-odoo, which can't be installed beside the tools.
PYLINT_7 := .stack/pylint-7
PYLINT_7_STAMP := $(PYLINT_7)/stamp

# Debian's packages that a target needs: who has neither root nor sudo is told of all of them at once.
PACKAGES = python3-venv
demo test test-all matrix odoo-tests soak bench up: PACKAGES += debian-archive-keyring postgresql pgbouncer
test-all: PACKAGES += iproute2
matrix: PACKAGES += $(if $(TREES),,git)
bench: PACKAGES += wrk
fresh containers: PACKAGES += mmdebstrap
containers: PACKAGES += podman podman-compose runc containernetworking-plugins catatonit iptables iproute2 openssl git \
	golang-github-containernetworking-plugin-dnsname procps

.PHONY: help packages demo unit simulate test test-all matrix odoo-tests soak fresh containers bench mutants lint lint-python lint-addon lint-texts readme up tools clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# "exec": a signal to make reaches the program itself, not a shell that waits for it.

demo: $(TOOLS_STAMP) ## see the problem, and the addon solve it, on real servers
	@exec $(TOOLS_PYTHON) -m demo $(ARGS)

unit: $(TOOLS_STAMP) ## run the tests that need no server, in seconds (ARGS="..." goes to pytest)
	@exec $(TOOLS_PYTHON) -m pytest tests/unit $(ARGS)

simulate: $(TOOLS_STAMP) ## simulated servers, processes and faults for a minute, or MINUTES=10; ARGS="--seed N": a trace
	@exec $(TOOLS_PYTHON) -m tests.simulation $(if $(SEEDS),--seeds "$(SEEDS)") $(if $(MINUTES),--minutes "$(MINUTES)") $(ARGS)

test: $(TOOLS_STAMP) ## what each change has to pass: unit tests, a simulation, Odoo 19.0; ARGS="...": these tests instead
ifeq ($(ARGS),)
	@$(TOOLS_PYTHON) -m tests.simulation
	@exec $(TOOLS_PYTHON) -m pytest -n $(JOBS) -m "not rest"
else
	@exec $(TOOLS_PYTHON) -m pytest -n $(JOBS) $(ARGS)
endif

test-all: $(TOOLS_STAMP) ## the rest: Odoo 14.0, other poolers, packages (ARGS="..." goes to pytest)
	@exec $(TOOLS_PYTHON) -m pytest -n $(JOBS) -m rest $(ARGS)

matrix: $(TOOLS_STAMP) ## the main tests on all series, or on all source trees in TREES=/folder
	@exec $(TOOLS_PYTHON) -m tools.matrix -n $(JOBS) $(if $(TREES),--trees "$(TREES)") $(ARGS)

odoo-tests: $(TOOLS_STAMP) ## Odoo's own tests behind PgBouncer with the addon, against those without both
	@exec $(TOOLS_PYTHON) -m tools.odoo_tests $(ARGS)

soak: $(TOOLS_STAMP) ## random faults for MINUTES=10, many clients: is anything lost or doubled?
	@exec $(TOOLS_PYTHON) -m tools.soak $(or $(MINUTES),10) $(ARGS)

fresh: $(TOOLS_STAMP) ## "demo" and "test" in minimal systems of Debian, as a newcomer has them; as root
	@exec $(TOOLS_PYTHON) -m tools.fresh $(ARGS)

containers: $(TOOLS_STAMP) ## demo/compose.yaml and parts of docs/kubernetes.yaml in containers, with Podman; as root
	@exec $(TOOLS_PYTHON) -m tools.containers $(ARGS)

bench: $(TOOLS_STAMP) ## measure the addon and its alternatives side by side; QUICK=1: few samples
	@exec $(TOOLS_PYTHON) -m benchmarks $(if $(QUICK),--quick) $(ARGS)

mutants: $(TOOLS_STAMP) ## plant faults in the addon, JOBS=2 at a time: are they found? (ARGS="names of some")
	@exec $(TOOLS_PYTHON) -m tests.mutants --jobs "$(JOBS)" $(ARGS)

lint: lint-python lint-addon lint-texts ## check style, conventions of addons, Python 3.5, and the texts

lint-python: $(TOOLS_STAMP)
	$(TOOLS)/bin/ruff check .
	$(TOOLS)/bin/ruff format --check .

# Exceptions of pylint-odoo. except-pass: an exception may be the answer that was asked for, such as "nothing there to
# read", and none for the log. missing-manifest-dependency, of 7 only: check.py is a program, and has to import its own
# package by its name.
# The options of 7 are those in .pylintrc, as it spells them. It tells the series from the manifest's version, in which
# "()" finds none, so that it is the one named here.
lint-addon: $(TOOLS_STAMP) $(PYLINT_7_STAMP)
	$(TOOLS)/bin/vermin --target=3.5- --no-tips --violations --quiet bus_alt_connection setup
	$(TOOLS)/bin/pylint --disable=except-pass bus_alt_connection
	$(PYLINT_7)/bin/pylint --rcfile=/dev/null --load-plugins=pylint_odoo --score=no \
		--disable=all --enable=odoolint --disable=except-pass,missing-manifest-dependency --valid_odoo_versions=12.0 \
		--manifest_version_format='()\d+\.\d+\.\d+$$' \
		--manifest_required_authors='bus_alt_connection contributors' bus_alt_connection

lint-texts: $(TOOLS_STAMP)
	@# What a program has made a table of may be wider. It finds the exception for absolute paths only.
	$(TOOLS)/bin/doc8 --quiet --no-sphinx --max-line-length 120 --ignore-path-errors 'docs/matrix.rst;D001' \
		--ignore-path-errors 'docs/containers.rst;D001' \
		*.rst $(CURDIR)/docs benchmarks/README.rst tests/README.rst tests/simulation bus_alt_connection
	$(TOOLS_PYTHON) -m tools.readme --check

readme: $(TOOLS_STAMP) ## make the addon's README.rst and index.html from its folder readme/
	@$(TOOLS_PYTHON) -m tools.readme

up: $(TOOLS_STAMP) ## start PostgreSQL, PgBouncer and Odoo with the addon, until Ctrl-C
	@exec $(TOOLS_PYTHON) -m stack.up $(ARGS)

tools: $(TOOLS_STAMP) ## install the tools of the other targets

clean: ## remove all that was downloaded, installed and cached
	rm -rf .stack .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# A virtual environment does not survive a move of the folder that it is in. So the stamp has its path, and is out of
# date elsewhere.
define is_out_of_date_elsewhere
ifneq ($$(file < $(1)),$$(CURDIR))
.PHONY: $(1)
endif
endef
$(foreach stamp,$(TOOLS_STAMP) $(PYLINT_7_STAMP),$(eval $(call is_out_of_date_elsewhere,$(stamp))))
# Does not know the syntax trees of Python 3.14 and later, so that the tools look for an older one.
$(PYLINT_7_STAMP): | $(TOOLS_STAMP)
packages:
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9) and "Python 3.9 or newer is needed")'
	@$(BASE_PYTHON) -m stack.system $(PACKAGES)

$(TOOLS_STAMP) $(PYLINT_7_STAMP): .stack/%/stamp: tools/requirements/%.txt | packages
	@echo 'installing $* ...' >&2
	@python=$(if $(filter pylint-7,$*),$$($(TOOLS_PYTHON) -m stack.pythons 3.13 3.12 3.11 3.10 3.9),$(BASE_PYTHON)); \
		$$python -m venv --clear .stack/$*
	@.stack/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-input -r $<
	@printf '%s' '$(CURDIR)' > $@
