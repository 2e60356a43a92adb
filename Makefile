# make demo: install, train a small model, plot, restore a held-out text.  make test: ruff and pytest.
# make install: only their common set-up. make docs: the site, into site/. Nothing is installed twice.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test install docs options tree report clean

demo: install
	$(BIN)/difftrain train demo --overwrite
	$(BIN)/difftrain plot runs/demo
	$(BIN)/difftrain sample runs/demo --held_out --temperature 0 --seed 1

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

install: .venv/.plot

# One stamp a set of extras, made anew when what is to be installed changes.
.venv/.plot .venv/.test .venv/.docs: .venv/.%: setup.py constraints.txt pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(PIP) install --no-compile --constraint constraints.txt --editable ".[$*]"
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
	rm -rf .venv build site *.egg-info .pytest_cache .ruff_cache .hypothesis
