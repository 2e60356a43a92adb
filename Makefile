# make demo: install, train a small model, plot, restore and repair a held-out text.  make test: ruff and pytest.
# make test-all: with the tests that repeat at length.  make test-core: each kernel and command once.
# make install: only their common set-up. make docs: the site, into site/. Nothing is installed twice.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-all test-hf test-core lint types install install-dev docs options tree report clean

demo: export PYTHONUNBUFFERED = 1
demo:
	@echo "demo, 1 of 5: installing into .venv, if that is not done yet"
	@$(MAKE) --no-print-directory install
	@echo "demo, 2 of 5: training (loading torch first)"
	$(BIN)/difftrain train demo --overwrite
	@echo "demo, 3 of 5: drawing the curves"
	$(BIN)/difftrain plot runs/demo
	@echo "demo, 4 of 5: masking and restoring a held-out text"
	$(BIN)/difftrain sample runs/demo --held_out --temperature 0 --seed 1
	@echo "demo, 5 of 5: planting errors in a held-out text and repairing it"
	$(BIN)/difftrain repair runs/demo --held_out --seed 1
	@echo "curves: runs/demo/plots/curves.png"

test: lint types
	$(PYTEST) -n auto

test-all: lint types
	$(PYTEST) -n auto -m ""

# The tests that need transformers, which others skip.
test-hf: .venv/.test .venv/.hf
	$(PYTEST) -n auto -m "" tests/difftrain/exchange tests/difftrain/hf tests/examples

test-core: lint
	$(PYTEST) -m core tests/house

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What users import, and a program of theirs, strictly; pyproject.toml lists the files.
types: .venv/.test
	$(BIN)/mypy

install: .venv/.plot

# For who changes the code: what the tests need, and ruff before each commit.
install-dev: .venv/.test .venv/.dev
	if git rev-parse --git-dir > /dev/null 2>&1; then $(BIN)/pre-commit install; fi

# One stamp a set of extras, made anew when what is to be installed changes. pip is silent while it
# fetches into a pipe and while it unpacks: every ten seconds a line says how much is there.
.venv/.plot .venv/.test .venv/.dev .venv/.docs .venv/.hf: .venv/.%: setup.py constraints.txt pyproject.toml
	@echo "making .venv with the extra $*"
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@mkdir -p .venv/fetched
	@while sleep 10 >&- 2>&- && kill -0 $$$$; do echo "installing: $$(du -sh .venv | cut -f1) in .venv"; done & \
	trap "kill $$! 2>&-" EXIT; \
	TMPDIR="$(CURDIR)/.venv/fetched" \
	$(PIP) install --no-compile --constraint constraints.txt --editable ".[$*]"
	@rm -rf .venv/fetched
	touch $@

# The site from README.md, docs/ and the docstrings; a broken link, or a page that would fetch something, fails.
docs: .venv/.docs
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build

# The table of options, written from the configuration.
options: install
	$(BIN)/python -c "import re, pathlib; from difftrain.config import options_table as table; \
	p = pathlib.Path('docs/options.md'); mark = r'(?s)(<!-- options -->\n).*(<!-- end of options -->)'; \
	p.write_text(re.sub(mark, lambda m: m[1] + table() + '\n' + m[2], p.read_text()))"

# The tree on docs/architecture.md, written from git and the files' first lines.
tree:
	$(PYTHON) docs/tree.py

# The GPU figures and their picture, written from the newest results file.
report: install
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf .venv build site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
