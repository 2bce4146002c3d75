# Everything runs in .venv, which `make install` makes; once it exists, no target needs the network.
PYTHON ?= python3
BIN ?= .venv/bin
DEMO ?= demo
RUN ?= runs/quickstart

.PHONY: install quickstart test coverage check gpu-report

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch .venv/installed

quickstart: install
	"$(BIN)/python" tools/make_demo.py "$(DEMO)/raw"
	"$(BIN)/python" tools/make_shards.py pack "$(DEMO)/raw" "$(DEMO)/shards" --samples-per-shard 180
	"$(BIN)/python" tools/compute_pca.py "$(DEMO)/shards"
	"$(BIN)/python" -m train.run --config train/configs/quickstart.yaml --data.shards "$(DEMO)/shards" --run.dir "$(RUN)"

# A process per core with one thread each, as further threads of OpenMP would wait by spinning.
test: install
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest --numprocesses auto --dist loadfile

# A report about this machine, to be attached to an issue; takes ten minutes at most on one GPU.
gpu-report: install
	"$(BIN)/python" tools/bench.py report --out gpu-report

# Branch coverage of all tests, also slow ones, except those that kill, train or measure memory for many minutes, and one that
# fills a disk, on which coverage could not write either.
LONG = --deselect tests/test_run.py::test_disk_full_at_the_end --ignore tests/test_chaos.py --ignore tests/test_quickstart.py \
	--deselect 'tests/test_pack.py::test_kills[raw-3-50]' --deselect tests/test_loader.py::test_memory_stays_flat

coverage: install
	"$(BIN)/python" -m coverage erase
	OMP_NUM_THREADS=1 "$(BIN)/python" -m coverage run -m pytest -m "" $(LONG) --numprocesses auto --dist loadfile
	"$(BIN)/python" -m coverage combine --quiet
	"$(BIN)/python" -m coverage report

check: install
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m mypy
