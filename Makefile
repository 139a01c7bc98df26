# make demo    a picture from PROMPT="..." in demo.png
# make test    lint, types and tests
# make train   every network of a model like the bundled one, from random weights; run again, it
#              continues
# make laion   a small web of pictures, from metadata to a fine-tuned model and its figures
# make clean   all that these made, except runs/

PYTHON ?= python3
PROMPT ?= a fox to the left of a red apple on a blue background
# Where the four YAML files of a model are: configs/emoji, configs/emoji_gpu or configs/tiny.
CONFIGS ?= configs/emoji
# Where the YAML files of a subset are: configs/laion/sprites, or configs/laion/openclipart with
# SVG="--svg DIRECTORY", where Debian's openclipart-svg is unpacked.
LAION ?= configs/laion/sprites
SVG ?=
# Processes that share the tests, a file each at a time; each may take 3 GiB of memory.
WORKERS ?= 2
# accelerate gives a process one thread of the CPU where it is told nothing.
LAUNCH ?= --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

BIN := .venv/bin
# Without byte code up front: Python caches what is imported when it is, a tenth of it all.
INSTALL = @echo "Installing $(1) into .venv ..." && \
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile \
	--constraint constraints.txt --editable "$(1)"
unexport PYTHONDONTWRITEBYTECODE
export PROMPT

.PHONY: demo test train laion clean

demo: .venv/run.stamp
	@$(BIN)/latentdiff generate --output demo.png -- "$$PROMPT"

test: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p latentdiff -p training -p inference -p benchmarks
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

train: .venv/train.stamp
	$(BIN)/accelerate launch $(LAUNCH) -m training.autoencoder --config $(CONFIGS)/autoencoder.yaml
	$(BIN)/accelerate launch $(LAUNCH) -m training.clip --config $(CONFIGS)/clip.yaml
	$(BIN)/accelerate launch $(LAUNCH) -m training.cache_latents --config $(CONFIGS)/cache_latents.yaml
	$(BIN)/accelerate launch $(LAUNCH) -m training.diffusion --config $(CONFIGS)/diffusion.yaml

laion: CORPUS = $(notdir $(LAION))
laion: .venv/dev.stamp
	$(BIN)/python -m benchmarks.corpus.make --corpus $(CORPUS) --output runs/$(CORPUS)/corpus $(SVG)
	$(BIN)/python -m benchmarks.corpus.serve --output runs/$(CORPUS)/corpus -- sh -ec \
	'for step in select download dedup card report; do \
	$(BIN)/python -m training.laion $$step --config $(LAION)/laion.yaml; done'
	$(BIN)/accelerate launch $(LAUNCH) -m training.clip --config $(LAION)/clip.yaml
	$(BIN)/accelerate launch $(LAUNCH) -m training.cache_latents --config $(LAION)/cache_latents.yaml
	$(BIN)/accelerate launch $(LAUNCH) -m training.diffusion --config $(LAION)/diffusion.yaml
	$(BIN)/python -m inference.retrieval --config $(LAION)/retrieval.yaml

clean:
	rm -rf .venv demo.png build dist latentdiff.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/run.stamp: pyproject.toml constraints.txt .ci/torchvision_on_cpu.py
	@$(PYTHON) -m venv .venv
	@site=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	cp .ci/torchvision_on_cpu.py "$$site" && \
	echo "import torchvision_on_cpu" > "$$site/torchvision_on_cpu.pth"
	$(call INSTALL,.)
	@touch $@

.venv/train.stamp: .venv/run.stamp
	$(call INSTALL,.[train])
	@touch $@

.venv/dev.stamp: .venv/train.stamp
	$(call INSTALL,.[dev])
	@touch $@
