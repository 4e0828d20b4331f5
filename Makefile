# Every target sets itself up from a fresh clone: it makes .venv and installs the versions of constraints.txt once.
PROFILE ?= quick
CORES   ?= 2
FORCE   ?=
WORLD   ?= shapes
PYTHON  ?= python3

export PATH            := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_OFFLINE  := 1
export PYTHONUNBUFFERED := 1
STAMP    := .venv/installed
WORKERS  := $(if $(shell nvidia-smi -L 2>/dev/null),1,2)

.PHONY: reproduce test docs lint retrain verify readme

reproduce: $(STAMP) ## train, score, and draw every table and figure at size PROFILE
	snakemake -q rules host reason -s workflow/Snakefile --cores $(CORES) --nolock --rerun-incomplete --rerun-triggers mtime --config profile=$(PROFILE) $(if $(FORCE),force=1 --forceall)
	@cat results/$(PROFILE)/summary.txt 2>/dev/null || true

test: $(STAMP) lint ## the export check, every notebook, what crosses notebooks, and the installed set
	OMP_NUM_THREADS=1 nbdev_test --n_workers $(WORKERS) --timing
	pytest -q -n $(WORKERS) --dist loadgroup tests
	pip check

lint: $(STAMP) ## lasro/ is what the notebooks export, and the notebooks are clean
	python workflow/check_notebooks.py

docs: $(STAMP) ## a site of the executed notebooks, in _docs/
	python workflow/docs.py

retrain: $(STAMP) ## make the shipped weights of WORLD again from nothing; resumes
	python workflow/run.py nbs/experiments/retrain.ipynb results/retrain/executed/retrain-$(WORLD).ipynb -p WORLD $(WORLD) -p PROFILE lab

verify: $(STAMP) ## recompute every committed table from the committed runs and compare
	python workflow/verify.py

readme: $(STAMP) ## README.md from nbs/index.ipynb, and results/README.md
	python workflow/readme.py
	python workflow/results_readme.py

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lasro needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@
