# `make demo` and `make test` set up all they need: a virtual environment, the pinned requirements, then the job.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin
LOWEST_TRANSFORMERS = 5.0.0
TORCHAO = 0.18.0
TORCHVISION = 0.28.0
TRANSFORMERS = $(shell sed -n 's/^transformers==//p' requirements-dev.txt)
PARAMETERIZED = 0.9.0
GOLDEN = tests/golden
# Two processes of one thread each; most of the time goes into programs that the tests start, which do one thing at a time.
PYTEST = OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: demo nano nano-compare test test-newest test-common test-torchao test-lpips test-lowest lint docs fuzz clean

demo: $(VENV)/installed
	@rm -rf demo && mkdir demo
	@echo "The small model that comes with the package, on pictures that it has not seen:"
	@$(RUN)/python -m healthgpt.phantoms.demo nano demo
	@echo "Merging the published files of a tiny M3 with random weights into one checkpoint ..."
	@$(RUN)/healthgpt export --base $(GOLDEN)/m3/base --vision $(GOLDEN)/m3/vit \
		--comprehension $(GOLDEN)/m3/com_hlora_weights.bin --generation $(GOLDEN)/m3/gen_hlora_weights.bin \
		--fusion $(GOLDEN)/m3/fusion_layer_weights.bin --vqgan $(GOLDEN)/m3/vqgan/last.ckpt \
		--vqgan-config $(GOLDEN)/m3/vqgan/model.yaml --output demo/HealthGPT-tiny
	@$(RUN)/healthgpt info demo/HealthGPT-tiny
	@echo "Asking about $(GOLDEN)/images/retina.png: What imaging modality was used to acquire this picture?"
	@printf "Answer (random weights know nothing): "
	@$(RUN)/healthgpt ask -c demo/HealthGPT-tiny $(GOLDEN)/images/retina.png \
		"What imaging modality was used to acquire this picture?"
	@printf "Picture drawn from $(GOLDEN)/images/ct.png: "
	@$(RUN)/healthgpt draw -c demo/HealthGPT-tiny $(GOLDEN)/images/ct.png "Reconstruct the image." -o demo/picture.png

# The small model, from nothing: less than an hour on two cores. What is finished stays in build/nano and is not done again.
nano: $(VENV)/installed
	$(RUN)/python -m healthgpt.phantoms.nano build/nano nano

# The same, and beside it what comes out of other ways to train it.
nano-compare: $(VENV)/installed
	$(RUN)/python -m healthgpt.phantoms.nano build/nano nano --compare

test: lint test-newest test-common test-torchao test-lpips test-lowest

lint: $(VENV)/installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

test-newest: $(VENV)/installed $(VENV)/browser
	$(PYTEST) tests

# The library's own common tests, on this package's models and processors; they use markers of the library's.
test-common: $(VENV)/common/installed
	PYTHONPATH=$(VENV)/common $(PYTEST) --override-ini addopts=--disable-warnings tests/common

# torchao stands apart: transformers imports it wherever it is installed, and it prints warnings about itself each time.
test-torchao: $(VENV)/torchao/installed
	PYTHONPATH=$(VENV)/torchao $(PYTEST) tests/test_quantization.py tests/test_docs.py -k torchao

# So does torchvision, without which the package must work: transformers imports it too.
test-lpips: $(VENV)/torchvision/installed
	TORCHVISION=$(VENV)/torchvision $(RUN)/python -m pytest tests/evaluation/test_lpips.py

# The golden tests once more, on the lowest transformers that works, and what is refused there alone; only transformers and what
# it needs are older.
test-lowest: $(VENV)/lowest/installed
	PYTHONPATH=$(VENV)/lowest $(PYTEST) tests/test_golden.py tests/test_generation_healthgpt.py -k 'golden or old_transformers'

# The documentation as a site, in site/.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

# 1000 spoilt copies of the golden files and of an exported checkpoint: everything must be refused in one sentence or provably right,
# and nothing outside their folders touched.
fuzz: $(VENV)/installed
	$(RUN)/python tests/fuzz_export.py 0 1000

$(VENV)/installed: requirements-dev.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --requirement requirements-dev.txt
	$(RUN)/pip install --quiet --no-deps --editable .
	touch $@

# The page is tested in Chromium; without one, and without apt-get to install it, those tests are skipped and say so, or fail if
# REQUIRE_BROWSER is set.
$(VENV)/browser: $(VENV)/installed
	command -v chromium || { command -v apt-get && apt-get update --quiet && apt-get install --quiet --yes chromium; } || true
	touch $@

$(VENV)/lowest/installed: $(VENV)/installed
	$(RUN)/pip install --quiet --upgrade --target $(VENV)/lowest transformers==$(LOWEST_TRANSFORMERS) pillow typer
	touch $@

# The tests are in the library's source distribution only.
$(VENV)/common/installed: $(VENV)/installed
	rm -rf $(VENV)/common
	$(RUN)/pip install --quiet --no-deps --target $(VENV)/common parameterized==$(PARAMETERIZED)
	$(RUN)/pip download --quiet --no-deps --no-binary transformers --dest $(VENV)/common transformers==$(TRANSFORMERS)
	mkdir $(VENV)/common/transformers_tests
	tar --extract --gzip --file $(VENV)/common/transformers-$(TRANSFORMERS).tar.gz --strip-components 2 \
		--directory $(VENV)/common/transformers_tests transformers-$(TRANSFORMERS)/tests
	touch $(VENV)/common/transformers_tests/__init__.py $@

$(VENV)/torchao/installed: $(VENV)/installed
	$(RUN)/pip install --quiet --upgrade --no-deps --target $(VENV)/torchao torchao==$(TORCHAO)
	touch $@

$(VENV)/torchvision/installed: $(VENV)/installed
	$(RUN)/pip install --quiet --upgrade --no-deps --target $(VENV)/torchvision torchvision==$(TORCHVISION)
	touch $@

clean:
	rm -rf $(VENV) demo site
