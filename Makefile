# Two commands do all: `make demo` and `make test`. Both make their own virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
PROFILE ?= smoke
BIN     = $(VENV)/bin
RUN     = runs/$(PROFILE)

.PHONY: demo test test-slow lab notebooks figures lint types format clean

$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e ".[video,figures]"
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/pip install -q -e ".[test]"
	@touch $@

demo: $(VENV)/.core          ## teachers, both graphs and students on the embedded data; ends with a table and figures
	$(BIN)/gdviz run --profile $(PROFILE) --out $(RUN)

test: $(VENV)/.test          ## the default test suite
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.test     ## the slow tests: kill and resume, real clips, every notebook
	$(BIN)/python -m pytest -m slow

lab: $(VENV)/.test           ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

notebooks: $(VENV)/.test     ## executes every notebook into build/notebooks, as HTML
	env -u MPLBACKEND OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/jupyter nbconvert --to html --execute \
	    --ExecutePreprocessor.timeout=120 --output-dir build/notebooks notebooks/*.ipynb

figures: demo                ## rewrites figures/ from the demo's run
	$(BIN)/gdviz figures $(RUN) --out figures

lint: $(VENV)/.test          ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.test         ## types, by pyright: not clean yet
	$(BIN)/pyright gdviz

format: $(VENV)/.test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:                       ## removes what can be made again; runs and data stay
	rm -rf build $(VENV)
