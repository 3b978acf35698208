# SPDX-License-Identifier: GPL-2.0-or-later
#
# The front door; `make` alone prints what there is. The work is done by the
# scripts in scripts/ and the programs in lab/, everything that is made goes
# below build/.

.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# Binaries that the tests need besides QEMU itself.
test_binaries = tests/qtest/migration-test tests/qtest/sparse-lab-test \
                $(patsubst %.c,%,$(wildcard tests/unit/test-*.c))

PYTHON ?= /usr/bin/python3
export PYTHON

# The QEMU series to work with; the scripts take it from the environment.
BASE ?= $(shell cat patches/default)
export BASE

# What "make help" leaves out, besides all that is in brackets.
rare = deps source install check-build check-qemu check-old-new check-sanitize faults check-mutations \
       check-guests real-guest check-disk fuzz fuzz-ram random plot port reference check-series dsc \
       distclean
short = if (index(rare, " " $$1 " ")) next; sub(/ [(].*|: .*,.*/, "", $$2);

# $(call targets,ACTION): what there is; ACTION of awk: on the name $$1, the text $$2
define targets
	@awk -F ':.*## ' -v rare=' $(rare) ' '/^[a-z-]+:.*## / { $(1) \
		gsub("/BASE", "/$(BASE)", $$2); printf "  %-15s %s\n", $$1, $$2 }' \
		$(MAKEFILE_LIST)
endef

.PHONY: help
help: ## Print what is needed most
	@echo "Usage: make TARGET [BASE=SERIES] [QEMU_SRC=DIR] [CC=COMPILER] [JOBS=N]"
	@echo "       [CONFIGURE_ARGS=OPTIONS]"
	$(call targets,$(short))
	@echo
	@echo "BASE is the QEMU series, one of: $(notdir $(patsubst %/suites,%,$(wildcard patches/*/suites))) (default: $(file <patches/default))."
	@echo "QEMU_SRC=DIR takes the tree of that series in DIR (which is copied, not changed)"
	@echo "instead of Debian's source package; it is remembered until QEMU_SRC= is said."

.PHONY: help-all
help-all: ## Print all targets, and what can be said to them
	$(call targets)

.PHONY: deps
deps: ## Install the Debian packages that are missing (needs root only then)
	@scripts/deps

.PHONY: source
source: deps ## Fetch, verify and unpack QEMU's source
	@scripts/get-source

.PHONY: qemu
qemu: deps ## Build the patched QEMU: build/BASE/patched/qemu-system-x86_64
	@scripts/build-qemu patched

.PHONY: stock
stock: deps ## Build the same QEMU without the patches: build/BASE/stock/
	@scripts/build-qemu stock

.PHONY: install
install: qemu ## Install the patched QEMU and its tools: PREFIX=/opt/sparse-ram, DESTDIR=
	@scripts/install-qemu

.PHONY: demo
demo: qemu stock ## Show a memfd guest migrating, patched and stock
	@$(PYTHON) -m lab.demo

.PHONY: check
check: test-binaries rig ## Run all tests that do not take hours (scripts/run-tests --help lists them)
	@$(PYTHON) -m lab.run_tests all

.PHONY: check-long
check-long: test-binaries rig ## Run what takes hours: random, faults, old and new, guests, Linux, sanitizers
	@$(PYTHON) -m lab.run_tests long

.PHONY: check-unit
check-unit: deps ## Run the unit tests, plain and with sanitizers (no QEMU needed)
	@$(PYTHON) -m lab.run_tests unit

.PHONY: check-qtest
check-qtest: test-binaries ## Run this project's migration tests, patched and stock
	@$(PYTHON) -m lab.run_tests qtest

.PHONY: check-qemu
check-qemu: deps ## Run QEMU's own migration-test (its default set) on the patched build
	@scripts/build-qemu patched $(test_binaries)
	@$(PYTHON) -m lab.run_tests qemu

.PHONY: check-old-new
check-old-new: test-binaries ## Migrate between old and new QEMUs (also 7.2), compare streams (minutes)
	@$(PYTHON) -m lab.run_tests old-new-long

.PHONY: check-sanitize
check-sanitize: test-binaries ## Run our migration tests with sanitizers, which takes two more builds (an hour)
	@$(PYTHON) -m lab.run_tests asan tsan

.PHONY: check-build
check-build: deps ## Build all that QEMU's build makes, as Debian does and smaller (an hour; TARGETS=)
	@scripts/check-build

.PHONY: check-style
check-style: source ## Check style of code, patches, scripts; run scripts' tests
	@scripts/apply-series
	@$(PYTHON) -m lab.run_tests scripts style

.PHONY: lint
lint: ## Check lab/ with mypy and flake8
	@scripts/deps mypy flake8
	@mypy --config-file lab/setup.cfg lab
	@flake8 --config lab/setup.cfg lab scripts/dep3

.PHONY: test-binaries
test-binaries: deps
	@scripts/build-qemu patched $(test_binaries)
	@scripts/build-qemu stock

.PHONY: rig
rig: deps build/$(BASE)/rig/fail-calls.so

build/$(BASE)/rig/fail-calls.so: lab/faults/fail-calls.c
	@mkdir -p $(@D)
	@$(CC) -O2 -Wall -Wextra -shared -fPIC -o $@ $<

.PHONY: faults
faults: qemu rig ## Let migrations fail in all ways (FAULTS_ARGS='--cases 500'; --help has more)
	@$(PYTHON) -m lab.faults $(FAULTS_ARGS)

.PHONY: check-mutations
check-mutations: deps ## Break the code on purpose; the stress test has to notice (minutes)
	@scripts/check-mutations

.PHONY: check-guests
check-guests: test-binaries ## Stress all modes with guests that write, TCG and KVM (half an hour)
	@$(PYTHON) -m lab.run_tests guests-long

.PHONY: real-guest
real-guest: qemu stock ## Migrate Linux back and forth, 64 GiB (minutes; REAL_GUEST_ARGS=--rounds 5)
	@$(PYTHON) -m lab.guest $(REAL_GUEST_ARGS)

.PHONY: check-disk
check-disk: qemu ## Migrate Linux with a vhost-user disk by postcopy (minutes; DISK_ARGS=--mode preempt)
	@$(PYTHON) -m lab.guest.disk $(DISK_ARGS)

.PHONY: check-stack
check-stack: qemu ## Migrate with libvirt, virtiofsd and storage daemon in a Debian (minutes; RELEASE=12 STACK_ARGS=--quick)
	@scripts/check-stack $(STACK_ARGS)

.PHONY: check-kernels
check-kernels: test-binaries ## Run unit tests and qtests on the kernels of Debian 12, 13 and sid, in VMs (an hour)
	@scripts/check-kernels

.PHONY: fuzz
fuzz: qemu ## Feed damaged migration streams to the patched QEMU (FUZZ_ARGS=--seconds 600)
	@$(PYTHON) -m lab.fuzz $(FUZZ_ARGS)

.PHONY: fuzz-ram
fuzz-ram: qemu ## The same with libFuzzer and sanitizers, in another build (FUZZ_SECONDS=600)
	@scripts/fuzz-ram $(FUZZ_SECONDS)

.PHONY: random
random: qemu stock ## Migrate at random, compare with a model (RANDOM_ARGS='--cases 4000')
	@$(PYTHON) -m lab.random $(RANDOM_ARGS)

.PHONY: bench
bench: qemu stock ## Measure stock and patched QEMU side by side (BENCH_ARGS=--quick to try it)
	@$(PYTHON) -m lab.bench $(BENCH_ARGS)

.PHONY: plot
plot: qemu stock ## Measure and draw docs/results/*.svg (PLOT_ARGS=--draw only draws them)
	@scripts/deps gnuplot-nox fonts-dejavu-core
	@$(PYTHON) -m lab.plot $(PLOT_ARGS)

.PHONY: docs
docs: source ## Build QEMU's manual with our pages; a warning is a failure
	@scripts/build-docs

.PHONY: edit
edit: source ## Make a git tree, one commit a patch: build/BASE/edit
	@scripts/edit-series

.PHONY: save
save: ## Write the commits in build/BASE/edit to patches/ and our files
	@scripts/save-series

.PHONY: port
port: source ## Carry patches/ over to another base, in build/BASE/edit: BASE=NEW
	@scripts/port-series

.PHONY: reference
reference: source ## Make BASE, the newest, what patches/ is for: BASE=NEW
	@scripts/make-reference

.PHONY: series
series: source ## Write a topic, or all, as patches to mail: build/series/ (TOPIC=core)
	@scripts/format-series $(TOPIC)

.PHONY: check-series
check-series: test-binaries ## Build and test each step of the series (hours; TOPIC=core STEPS=5-9 QUICK=1)
	@scripts/series-tree
	@$(PYTHON) -m lab.ci.check_series $(if $(QUICK),--quick) $(if $(TOPIC),--topic $(TOPIC)) $(STEPS)

.PHONY: dsc
dsc: deps ## Put the series into Debian's source package: build/BASE/dsc/
	@scripts/deps git lintian quilt
	@scripts/make-dsc

.PHONY: clean
clean: ## Remove what was built; the downloaded source package stays
	@scripts/clean

.PHONY: distclean
distclean: ## Remove everything below build/
	@scripts/clean all
