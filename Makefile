# The commands of the project. `.venv` is made on first use; PYTHON picks the interpreter that it is made with.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= .
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.PHONY: demo test versions soak sweep bench experiments notebooks readme docs docs-serve dist chromium clean

.venv/installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/bnfreeze demo

test: .venv/installed chromium
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-test --n-workers 2
	$(BIN)/pytest --numprocesses 2 tests

# For the tests of the site: root gets Debian's Chromium; for others those tests are skipped until they install one
chromium:
	@which chromium chromium-browser google-chrome | grep -q . || [ $$(id -u) != 0 ] || \
	    (apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends chromium fonts-dejavu-core)

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
	$(BIN)/python -W ignore -m docs readme $(OUT)

docs: .venv/installed
	$(BIN)/python -W ignore -m docs pages $(OUT)/_proc
	PAGES=$(abspath $(OUT))/_proc $(MKDOCS) build --config-file docs/mkdocs.yml --strict --site-dir $(abspath $(OUT))/_docs

docs-serve: docs
	$(MKDOCS) serve --config-file docs/mkdocs.yml

dist: .venv/installed
	$(BIN)/python -m build --no-isolation --outdir $(OUT)/dist
	$(BIN)/twine check --strict $(OUT)/dist/*

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .nox .ruff_cache
