PYTHON_IN_VENV := .venv/bin/python
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))
INPUTS := pyproject.toml constraints.txt tools/setup.sh tools/torch_source.sh

# One thread per worker is the fastest and the only repeatable setting for models this small.
export OMP_NUM_THREADS := 1

help:  ## this list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ {printf "  make %-11s %s\n", $$1, $$2}' Makefile

lab: .venv/lab.stamp  ## set up, then open JupyterLab on notebooks/00_start_here.ipynb (PORT=8890, BROWSER=none)
	@tools/lab.sh

app: .venv/lab.stamp  ## set up, then show the bench alone as an app (PORT=8890, BROWSER=none)
	@$(PYTHON_IN_VENV) tools/app.py

test: .venv/test.stamp  ## set up, then run unit tests, notebooks under strict nbval and browser tests
	@echo "test: the package and the notebooks, on two cores"
	@$(PYTHON_IN_VENV) -m pytest -n 2 --dist worksteal -m "not browser"
	@echo "test: JupyterLab in a browser"
	@$(PYTHON_IN_VENV) -m pytest -m browser

test-slow: .venv/test.stamp  ## the tests that need real data (FEDLAB_DATA=folder) or minutes
	@$(PYTHON_IN_VENV) -m pytest --run-slow -m slow

mutants: .venv/test.stamp  ## put known faults into a copy and see the tests notice them (15 minutes)
	@$(PYTHON_IN_VENV) tools/mutants.py

bench: .venv/lab.stamp  ## measure speed and accuracy on this machine (FEDLAB_DATA=folder)
	@$(PYTHON_IN_VENV) -m benchmarks

bench-quick: .venv/lab.stamp  ## the part of it that takes less than 10 minutes
	@$(PYTHON_IN_VENV) -m benchmarks --quick

lint: .venv/test.stamp  ## ruff and mypy
	@$(PYTHON_IN_VENV) -m ruff check
	@$(PYTHON_IN_VENV) -m ruff format --check
	@$(PYTHON_IN_VENV) -m mypy

wheels: .venv/lab.stamp  ## fill wheels/, from which machines like this one set up without a network
	@tools/wheels.sh

answers: .venv/lab.stamp  ## write answers.md for instructors: every exercise with its solution
	@$(PYTHON_IN_VENV) tools/answers.py

notebooks: .venv/lab.stamp  ## run every notebook from an empty store and write its outputs back
	@$(PYTHON_IN_VENV) tools/notebooks.py $(NOTEBOOKS)

federation: .venv/scale.stamp  ## set up, then run the hospitals on Flower: a server and four clients as processes, over TLS
	@$(PYTHON_IN_VENV) tools/federation.py

setup: .venv/lab.stamp  ## install only

.venv/lab.stamp: $(INPUTS)
	@tools/setup.sh
	@touch $@

.venv/test.stamp: $(INPUTS)
	@tools/setup.sh '[test,scale]'
	@touch .venv/lab.stamp .venv/scale.stamp $@

.venv/scale.stamp: $(INPUTS)
	@tools/setup.sh '[scale]'
	@touch .venv/lab.stamp $@

.PHONY: federation help lab app test test-slow mutants bench bench-quick lint wheels answers notebooks setup
