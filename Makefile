# The commands of the project. `.venv` is made on first use; PYTHON picks the interpreter that it is made with.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= .

README := $(BIN)/jupyter nbconvert --to markdown --output README --log-level ERROR --RegexRemovePreprocessor.patterns='.\| hide' \
    --TagRemovePreprocessor.remove_input_tags=remove_input

.PHONY: demo test versions soak sweep bench experiments notebooks readme clean

.venv/installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/bnfreeze demo

test: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-test --n-workers 2
	$(BIN)/pytest --numprocesses 2 tests

# The quick tests on the oldest and newest versions, on each Python of PATH; every environment is several GB for its time
versions: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nox

soak: .venv/installed
	$(BIN)/python -m soak

sweep: .venv/installed
	$(BIN)/python -m sweep

experiments: .venv/installed
	$(BIN)/python -m experiments

bench: .venv/installed
	$(BIN)/python -m bench

# After an edit in a notebook: export the modules, run and clean the notebooks, and make the README anew
notebooks: .venv/installed
	$(BIN)/nbdev-export
	for nb in nbs/*.ipynb nbs/tutorials/*.ipynb; do PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/exec_nb $$nb --dest $$nb --exc-stop || exit 1; done
	$(BIN)/nbdev-clean
	$(MAKE) readme

readme: .venv/installed
	$(README) --output-dir $(OUT) nbs/index.ipynb

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .nox .ruff_cache
