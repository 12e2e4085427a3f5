# The commands of the README. Everything Berth makes lies in .venv (controller) and .berth (state).
STRATEGY ?= pack
SCENARIO ?= default
HOST ?= gpu01
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PLAYBOOK := $(BIN)/ansible-playbook

# What `make wheelhouse` fetches, and for which Python and platform (empty: this machine's).
LOCKS ?= agent.txt runtime-light.txt
WHEELHOUSE ?= .berth/wheelhouse
HOST_PYTHON ?=
HOST_PLATFORM ?=

.PHONY: help setup up down verify preflight status test lint unit runtime e2e e2e-main e2e-faults e2e-serving e2e-runtime \
	docs molecule lab-engine lab-up lab-down lab-ssh wheelhouse clean
.DEFAULT_GOAL := help

help: ## This list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: ## .venv with ansible and the berth command
	@PYTHON="$(PYTHON)" ./setup.sh

up: setup ## The main job: place, serve and prove on this machine (STRATEGY=pack|spread|strict_pack|strict_spread|balanced)
	@$(PLAYBOOK) site.yml -e strategy=$(STRATEGY) $(ARGS)

verify: setup ## Compare plan, Ray and driver
	@$(PLAYBOOK) playbooks/verify.yml $(ARGS)

preflight: setup ## What would fail later, all in one list; changes nothing
	@$(PLAYBOOK) playbooks/preflight.yml $(ARGS)

down: setup ## Stop exactly what `make up` started
	@$(PLAYBOOK) playbooks/teardown.yml $(ARGS)

# Side by side: what waits for Ray in one lane leaves the processors to the other. The unit tests have them to themselves.
test: setup ## The whole gate: lint, unit tests, the main job end to end, the lab's default scenario
	@docker info >/dev/null 2>&1 && lab=molecule || lab=; export MAKE="$(MAKE)"; \
	  tests/lanes.sh lint runtime && tests/lanes.sh unit && tests/lanes.sh "e2e-main e2e-serving e2e-runtime" "e2e-faults $$lab" && \
	  { [ "$$lab" ] || echo "SKIPPED the lab's scenario: no Docker engine answers (make lab-engine)"; }

lint: setup ## ruff, mypy, yamllint, ansible-lint
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy berth
	@$(BIN)/yamllint .
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-lint --offline

unit: setup ## Unit and property tests (a minute)
	@$(BIN)/pytest tests/unit -m "not runtime" --numprocesses=logical --dist=loadfile $(ARGS)

e2e: e2e-main e2e-faults e2e-serving e2e-runtime ## The main job, its faults and the unit tests that need Ray: real Ray, real engine

# Tests side by side share the environments: one of them installs, the others wait.
runtime: setup
	@flock .berth/runtime.lock $(PLAYBOOK) site.yml --tags runtime

e2e-main: runtime
	@$(BIN)/pytest tests/e2e/test_main_job.py -v --durations=12 $(ARGS)

e2e-faults: runtime
	@$(BIN)/pytest tests/e2e/test_faults.py -v --durations=12 $(ARGS)

# Brings tiny environments of its own.
e2e-runtime: setup
	@$(BIN)/pytest tests/e2e/test_ray_runtime.py -v --durations=12 $(ARGS)

e2e-serving: runtime
	@$(BIN)/pytest tests/unit -m runtime -v --durations=12 $(ARGS)

molecule: setup ## One scenario on lab hosts: SCENARIO=default|driver|upgrade|faults|secrets|ingress|gpu
	@$(MAKE) --no-print-directory wheelhouse ARGS= LOCKS="$(LOCKS) $(wildcard molecule/$(SCENARIO)/files/runtime-*.txt)"
	@molecule/shared/run.sh $(SCENARIO) $(ARGS)

lab-engine: ## A Docker engine, where none answers (root, Debian or Ubuntu)
	@molecule/shared/engine.sh

lab-up: setup wheelhouse ## Hosts with real systemd and simulated GPUs, in containers; then: ansible-playbook -i inventories/lab site.yml
	@$(PLAYBOOK) -i inventories/lab molecule/shared/create.yml $(ARGS)

lab-down: setup ## Remove the lab's hosts
	@$(PLAYBOOK) -i inventories/lab molecule/shared/destroy.yml $(ARGS)

lab-ssh: ## A shell on a lab host: HOST=gpu01
	@ssh -F .berth/lab/ssh/config $(HOST)

wheelhouse: setup ## Wheels of the locks in .berth/wheelhouse, for hosts without a package index (LOCKS="agent.txt runtime-gpu.txt" HOST_PYTHON=3.12)
	@$(BIN)/python -m berth.host.wheelhouse $(WHEELHOUSE) $(foreach lock,$(LOCKS),$(or $(wildcard roles/*/files/$(lock)),$(lock))) \
	  $(if $(HOST_PYTHON),--python $(HOST_PYTHON)) $(foreach tag,$(HOST_PLATFORM),--platform $(tag)) $(ARGS)

docs: setup ## docs/VARIABLES.md from the roles' argument specs
	@$(BIN)/python -m berth.report.variables

clean: down ## Also remove everything that was installed
	@rm -rf .venv .berth
