# `make run` and `make test` install everything they need. Requirements: Linux, make, and Python 3.11 or newer with venv.
# ARGS is passed to the program that a target starts: make run ARGS="--workers 2", make test ARGS="-k lane",
# make bench ARGS=--quick.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
# Packages that only compute and the command line need, which the gateway's image leaves out.
NOT_OF_THE_GATEWAY := numpy jaxtyping wadler-lindig threadpoolctl msgspec shtab
# protoc finds its plugins for typed stubs through PATH.
protoc = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I. --python_out=$(1) \
	--grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) unlatch/protos/inference.proto unlatch/protos/unlatch.proto

RULES := deploy/k8s/components/plain-prometheus/rules.yml
OPERATORS_RULES := deploy/k8s/components/monitoring/prometheus-rule.yaml

CONTAINER ?= $(shell command -v docker || command -v podman || echo docker)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION = $(shell git rev-parse HEAD 2> /dev/null || echo unknown)
build_image = $(CONTAINER) build --file deploy/docker/Dockerfile --target $(1) --tag unlatch-$(1):$(VERSION) \
	--build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(BASE_IMAGE:%=--build-arg BASE_IMAGE=%) $(ARGS) .

.PHONY: help setup run test unit lint check fmt protos rules dashboards bench bench-peers soak demo image deploy lock clean
.DEFAULT_GOAL := help

help: ## print this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name says; do printf '  %-11s%s\n' "$$name" "$$says"; done

setup: $(READY) ## create .venv with the versions in the lock file

run: setup ## serve on this machine: gateway and compute, on all cores
	@$(BIN)/unlatch serve $(ARGS)

test: setup ## run the tests, two files at a time; ARGS="-n 0" for one at a time
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

unit: setup ## run the tests that need no mesh, in less than a minute
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/common tests/compute tests/gateway tests/structure $(ARGS)

lint: setup ## check style, types and import contracts
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy . && $(BIN)/lint-imports

check: lint ## lint, and check stubs and docs
	$(BIN)/python -m pytest -q tests/docs/test_docs.py tests/docs/test_readme.py tests/structure

fmt: setup ## format the code, and fix what the linter can fix
	$(BIN)/ruff check --fix-only . && $(BIN)/ruff format .

protos: setup ## generate the stubs of protos/*.proto, and Envoy's descriptor set
	$(call protoc,$(or $(OUT),.))
	@mkdir -p $(or $(OUT),.)/deploy/envoy
	$(BIN)/python -m grpc_tools.protoc -I. -I "$$(echo .venv/lib/python3*/site-packages)" --include_imports \
		--descriptor_set_out=$(or $(OUT),.)/deploy/envoy/inference.binpb protos/inference.proto google/rpc/error_details.proto

rules: ## generate the operator's PrometheusRule from Prometheus' rules
	@sed -i '/^spec:/q' $(OPERATORS_RULES) && sed -n '/^groups:/,$$ { s/^./  &/; p }' $(RULES) >> $(OPERATORS_RULES)

dashboards: setup ## generate Grafana's boards from deploy/dashboards
	@$(BIN)/python -m deploy.dashboards $(or $(OUT),deploy/k8s/components/monitoring/dashboards)

bench: setup ## run all benchmarks; ARGS=--quick takes a minute
	@$(BIN)/python -m bench $(ARGS)

bench-peers: setup ## compare with servers of other projects, which are installed in .peers; takes five minutes
	@$(BIN)/python -m bench.peers $(ARGS)

soak: setup ## kill a worker every second under load and check all replies; ARGS="--seconds 600", "--units 2", "--units 2 --kill-units", "--fleet"
	@$(BIN)/python -m bench.soak $(ARGS)

demo: setup ## blur a photograph and find its edges on all workers; pictures in demo/
	@$(BIN)/python examples/photograph.py $(ARGS)

image: ## build both images; CONTAINER=docker or podman, BASE_IMAGE=…, ARGS for its build
	for target in gateway compute; do $(call build_image,$$target) || exit; done

deploy: ## apply OVERLAY (dev, prod, or a directory of your own) to kubectl's cluster, if that has what it needs
	@deploy/k8s/deploy.sh $(OVERLAY)

lock: setup ## resolve dependencies and write all lock files; ARGS=--upgrade for the newest versions
	$(LOCK) $(ARGS) pyproject.toml --extra dev -o requirements-dev.lock
	$(LOCK) -c requirements-dev.lock pyproject.toml --extra otel -o requirements.lock
	$(LOCK) -c requirements.lock pyproject.toml --extra otel $(NOT_OF_THE_GATEWAY:%=--no-emit-package %) -o deploy/docker/gateway.lock
	echo hatchling | $(LOCK) -c requirements-dev.lock - -o deploy/docker/build.lock

clean: ## remove all generated files, .venv too
	rm -rf .venv .peers .*_cache .hypothesis .coverage* bench/out demo dist

# Our modules are compiled here once. Else each process compiles them again where Python may not write bytecode.
$(READY): requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; make PYTHON=…")'
	$(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -q common compute gateway protos unlatch && touch $@
