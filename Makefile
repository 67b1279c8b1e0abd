PYTHON ?= python3
min_python := $(shell sed -n 's/^min_python *= *//p' settings.ini)
in_venv := . .venv/bin/activate &&

.PHONY: help setup demo results test test-slow kill-resume fuzz export readme docs why sound ablations ablations-long finetune-table bench
.DEFAULT_GOAL := help

help:  ## list these commands
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

setup: .venv/.installed  ## install everything into .venv, once

.venv/.installed: settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= tuple(map(int, "$(min_python)".split("."))) or sys.exit("pcrl needs Python $(min_python) or newer, and $(PYTHON) is %d.%d: name another one, as in make setup PYTHON=python3.12." % sys.version_info[:2])'
	@echo "Installing into .venv: once, some minutes, about 7 GB."
	$(PYTHON) -m venv .venv
	$(in_venv) python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## pretrain and finetune on the embedded brain, report in demo/, or demo-2/ where that is taken
	$(in_venv) out=demo n=1; while [ -e $$out ]; do n=$$((n+1)) out=demo-$$n; done; pcrl demo --out $$out

results: setup  ## run all demonstrations, table in results/demo.csv; the larger ones read PCRL_DATA
	$(in_venv) python tools/results.py

# Notebooks and then files of tests run side by side, as many as cores; a second thread helps the long notebooks that finish last.
test: setup  ## run every notebook and every test
	$(in_venv) python -m pytest -q -m drift
	$(in_venv) OMP_NUM_THREADS=2 nbdev-test --timing --cell-timing-min 5
	$(in_venv) python tools/docs.py
	$(in_venv) OMP_NUM_THREADS=1 python -m pytest -q -n $$(nproc) --maxprocesses 8 --dist loadfile

test-slow: setup  ## run the long forms that make test leaves out
	$(in_venv) nbdev-test --flags slow --n-workers 1 --timing
	$(in_venv) python -m pytest -q -m slow

kill-resume: setup  ## kill runs of every kind at random moments and continue them, table in results/kill_resume.csv; half an hour on a CPU
	$(in_venv) OMP_NUM_THREADS=1 python tools/kill_resume.py

export: setup  ## make pcrl/ and README.md from the notebooks, and clean these
	$(in_venv) nbdev-export
	$(in_venv) nbdev-clean
	$(in_venv) python tools/readme.py

readme: setup  ## make README.md from nbs/index.ipynb
	$(in_venv) python tools/readme.py

docs: setup  ## build the site into _docs/
	$(in_venv) python tools/docs.py

why: setup  ## run the experiments of the notebook why, tables in results/why.csv, why-long.csv and air.csv; reads PCRL_DATA, hours on a CPU
	$(in_venv) OMP_NUM_THREADS=1 python tools/why.py

sound: setup  ## pretrain by robust for 20 minutes, three seeds in 2D and in 3D, runs in sound/, table in results/sound.csv; reads PCRL_DATA, three hours of a core
	$(in_venv) OMP_NUM_THREADS=1 python tools/sound.py

ablations: setup  ## make Tables 1 and 2 of the paper again, runs in ablations/, table in results/; reads PCRL_DATA, days on a CPU
	mkdir -p ablations; test -e ablations/ablations.csv || cp results/ablations.csv ablations/
	$(in_venv) export OMP_NUM_THREADS=1; pcrl reproduce table1 --out ablations && pcrl reproduce table2 --out ablations
	cp ablations/ablations.csv results/

ablations-long: setup  ## few labels again after three times the pretraining, runs in ablations-long/, table in results/ablations-long.csv; reads PCRL_DATA, days on a CPU
	mkdir -p ablations-long; test -e ablations-long/ablations.csv || cp results/ablations-long.csv ablations-long/ablations.csv
	$(in_venv) export OMP_NUM_THREADS=1; pcrl reproduce table2 --scale long --recipe robust --method contra --method pcrl --out ablations-long
	cp ablations-long/ablations.csv results/ablations-long.csv

finetune-table: setup  ## measure PCRL against scratch with few, 10 % and all labels, runs in finetune/, table in results/finetune.csv; reads PCRL_DATA, hours on a CPU
	$(in_venv) OMP_NUM_THREADS=1 python tools/finetune_table.py

bench: setup  ## measure speed and memory beside floors and peers, tables and charts in results/
	$(in_venv) python -m pip install -q -c constraints.txt -e '.[bench]'
	$(in_venv) set -e; for suite in step flops views contrast memory data infer; do OMP_NUM_THREADS=1 pcrl bench --suite $$suite --out results; done

fuzz: setup  ## read thousands of damaged files of every format, table in results/fuzz.csv; reads PCRL_DATA too
	$(in_venv) python tools/fuzz.py
