# marl: `make quickstart` runs the whole story on a real model, `make test` the full suite; `make help` lists everything.
PYTHON ?= python3
PYTHON312 ?= python3.12
BIN := .venv/bin
BOTH := -n 2 --dist loadfile
PLAIN := not real and not installed and not nightly and not browser and not trackers and not examples and not site and not zoo and not gpu
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart study adapter-study test lint unit house examples docs nightly browser trackers real wheel third-party release test-real mutants fuzz soak bench gpu gpu-tiny lowest gpu-versions zoo clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# This list: each target with the comment above it.
help:
	@awk '/^# -/ { next } /^# / { said = said (said ? " " : "") substr($$0, 3); next } \
		/^[a-z][a-z0-9-]*:/ { sub(/:.*/, ""); sub(/\. .*/, ".", said); printf "make %-13s %s\n", $$0, said } { said = "" }' $(MAKEFILE_LIST)

.venv/base:
	$(PYTHON) -m venv .venv
	@echo "installing torch (once)"
	$(INSTALL) torch==2.13.0
	@touch $@

.venv/quickstart: .venv/base pyproject.toml constraints.txt
	@echo "installing marl and what the quickstart needs"
	$(INSTALL) -e '.[quickstart]'
	@touch $@

.venv/test: .venv/base pyproject.toml constraints.txt
	@echo "installing marl and what the tests need"
	$(INSTALL) -e '.[test]'
	@touch $@

# The whole story on a real model: reward adapter, certificate, PPO, report. `make quickstart ARGS=--fast` is shorter.
quickstart: .venv/quickstart
	$(BIN)/python examples/quickstart/quickstart.py $(ARGS)

# Hours: the study behind docs/reference-policies.md, in resumable pieces.
study: .venv/quickstart
	$(INSTALL) -e '.[quickstart,bitsandbytes]'
	$(BIN)/python examples/reference_study/study.py $(ARGS)

# Two and a half hours on one core: the study behind docs/adapter-study.md, in pieces of half a minute.
adapter-study: .venv/quickstart
	$(BIN)/python examples/adapter_study/study.py $(ARGS)

# Every test once: those of the house read the checkout, all others run against the built wheel, as its users will.
test: lint docs house examples browser trackers real third-party gpu-tiny wheel

# ruff and mypy.
lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# While working: the suite against the checkout.
unit: .venv/test
	$(BIN)/python -m pytest $(BOTH) -m "$(PLAIN)"

# The rules of the house: arrows, pages that are up to date, light commands.
house: .venv/test
	$(BIN)/python -m pytest $(BOTH:loadfile=load) -m "$(PLAIN)" tests/house

# What the examples' pages say, for two steps on a tiny model.
examples: .venv/test
	$(BIN)/python -m pytest $(BOTH:loadfile=load) -m examples tests/examples

# The site of the docs, from the pages here: build/site/index.html. A broken link or anchor fails.
docs: .venv/test
	$(BIN)/python -m sphinx -E -W --keep-going -q -c docs -d build/doctrees . build/site
	$(BIN)/python -m pytest -m site tests/site

# What takes minutes: fifty kills.
nightly: .venv/test
	$(BIN)/python -m pytest -m nightly tests

# What needs the real 135M model.
real: .venv/test
	$(BIN)/python examples/quickstart/quickstart.py --fast
	$(BIN)/python -m pytest -m "real and not nightly" tests

# The report and the site, looked at. Installs Chromium where apt is at hand; without a browser the tests fail and say so.
browser: .venv/test docs
	@command -v chromium chromium-browser google-chrome >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null || true
	$(BIN)/python -m pytest -m browser tests/browser

# Trackers that are too big for every environment; they write to temporary folders, offline.
trackers: .venv/test
	$(INSTALL) wandb mlflow-skinny trackio
	$(BIN)/python -m pytest -m trackers tests/unit/test_trackers.py

# A stranger's package, really installed, named by a config.
third-party: .venv/test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation ./examples/third_party
	$(BIN)/python -m pytest -m installed tests
	$(BIN)/python -m pip uninstall --quiet --yes acme-marl

# The suite against the built wheel instead of the checkout.
wheel: .venv/test
	rm -rf dist build/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . >/dev/null
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/wheel dist/*.whl
	cp -r tests examples docs benchmarks pyproject.toml Makefile README.md CHANGELOG.md build/wheel/
	cd build/wheel && PYTHONPATH=$(CURDIR)/build/wheel ../../$(BIN)/python -m pytest $(BOTH) -m "$(PLAIN)" --ignore=tests/house

# Sdist, wheel, their checks, the tag, and the docs of every version; `make release ARGS=--try` sets no tag. Sends nothing anywhere.
release: .venv/test
	$(BIN)/python .ci/release.py $(ARGS)

# One PPO step on fixed work, beside the machine's floor; `make bench ARGS="W1 --dtype bfloat16"` for a part.
bench: .venv/quickstart
	$(BIN)/python benchmarks/bench.py $(ARGS)

# The check on a GPU, within eight minutes (benchmarks/gpu/README.md); `make gpu ARGS="--parts tests steps"` for a part.
gpu: .venv/test
	PYTHON=$(BIN)/python MARL_PARTS=none bash benchmarks/gpu/run.sh $(ARGS)

# The same parts where there is no GPU, on tiny shapes: that they will run when one is lent. Here are the tests of tests/gpu, too.
gpu-tiny: .venv/test
	PYTHON=$(BIN)/python MARL_PARTS=none bash benchmarks/gpu/run.sh --device cpu --shape tiny --minutes 30 --out build/gpu-tiny

# -- nightly: minutes each ------------------------------------------------------------------------------------

# Every invariant on the real model.
test-real: .venv/test
	$(BIN)/python -m pytest -m real tests

# Deliberate faults in the mathematics and the bank: each must be noticed by some test.
mutants: .venv/test
	$(BIN)/python tests/mutants/run_mutants.py $(ARGS)

# Thousands of random configs, data files, adapters and damaged run folders.
fuzz: .venv/test
	MARL_FUZZ_TIMES=20 $(BIN)/python -m pytest tests/fuzz

# Every causal language model class of transformers, tiny, against transformers and peft alone (4 minutes of processor time): writes
# docs/models.json and docs/models.md.
zoo: .venv/test
	rm -rf build/zoo
	MARL_ZOO=$(CURDIR)/build/zoo $(BIN)/python -m pytest $(BOTH:loadfile=load) tests/zoo -k right_or_refused
	$(BIN)/python tests/zoo/zoo_measure.py --collect build/zoo
	$(BIN)/python docs/make_models_page.py

# A run of 600 steps: memory, open files and seconds per step stay flat.
soak: .venv/test
	$(BIN)/python -m pytest -s tests/nightly/test_soak.py

# The lowest versions that pyproject.toml allows, in an environment of their own. Without trl: the quickstart alone needs it, and its
# own bounds are above these.
lowest:
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tests/lowest/bounds.py > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/lowest.txt torch==2.13.0
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/lowest.txt \
		-e '.[bitsandbytes,torchao,curves,trackers]' pytest hypothesis jsonschema hatchling editables
	.venv-lowest/bin/python -m pytest -m "$(PLAIN)" --ignore=tests/upstream \
		--deselect tests/unit/test_from_trl.py::test_trls_own_reward_functions_work_unchanged

# The versions of the GPU machine (benchmarks/gpu/versions.txt), in an environment of their own with its Python. Torch 2.11.0 comes as
# the build for CUDA 13 with all of CUDA's libraries: about 3 GB to fetch and 7 GB on disk; no card is needed.
gpu-versions:
	$(PYTHON312) -m venv .venv-gpu-versions
	.venv-gpu-versions/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/gpu/versions.txt \
		-e '.[bitsandbytes,torchao,curves,trackers,processes,quickstart]' pytest pytest-xdist hypothesis jsonschema hatchling editables liger_kernel
	.venv-gpu-versions/bin/python -m pytest $(BOTH) -m "($(PLAIN)) or gpu"

# Everything that was made here.
clean:
	rm -rf .venv .venv-lowest .venv-gpu-versions dist build runs .pytest_cache .mypy_cache .ruff_cache
