# Two commands do all: `make demo` and `make test`. Both make their own virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
PROFILE ?= smoke
BIN     = $(VENV)/bin
RUN     = runs/$(PROFILE)

.PHONY: demo table test test-slow test-browser lab site course figures lint types format clean

$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e ".[video,figures]"
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/pip install -q -e ".[test]"
	@touch $@

demo: $(VENV)/.core          ## four specialists, one student, several draws: a table with intervals, and figures
	$(BIN)/gdviz experiment benchmarks/plans/demo.toml --out runs/demo
	$(BIN)/gdviz figures runs/demo/main/101 --out runs/demo/figures

table: $(VENV)/.core         ## the headline table of docs/results.md, ten draws: about an hour on two cores
	$(BIN)/gdviz experiment benchmarks/plans/specialists.toml --out runs/table

test: $(VENV)/.test          ## the default test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.test     ## the slow tests: kill and resume, real clips, every notebook
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

test-browser: $(VENV)/.test  ## explorers in JupyterLab and on the site, in an installed Chromium
	$(BIN)/pip install -q -e ".[browser]"
	$(BIN)/python -m pytest -rs -m browser tests/browser

lab: $(VENV)/.test           ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

site: $(VENV)/.test          ## executes every notebook; build/site opens from disk, without a network
	$(BIN)/python tools/build_site.py

course: $(VENV)/.test        ## the notebooks without solutions, and an instructor's page, into build/course
	$(BIN)/python tools/course.py build/course

figures: $(VENV)/.core       ## rewrites figures/ from a run of general teachers
	$(BIN)/gdviz run --profile $(PROFILE) --out $(RUN)
	$(BIN)/gdviz figures $(RUN) --out figures

lint: $(VENV)/.test          ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.test         ## types, by pyright
	$(BIN)/pyright gdviz

format: $(VENV)/.test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:                       ## removes what can be made again; runs and data stay
	rm -rf build $(VENV)
