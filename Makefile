# make demo   a video from nothing: sets up ComfyUI, runs workflows/t2v_a14b.json on the tiny checkpoint in checkpoints/
# make test   the whole test suite against that ComfyUI          make ui     only the tests in a browser
# make check  ruff and mypy                                      make host   only set up the ComfyUI, in .host/
# make soak   make prompts: 200 mixed prompts in one server; make pool-soak: 100 through a pool of two CPU processes,
#             with faults (SOAK="--seconds 120" for less); and what they leave behind
# make clean  removes caches, .out/ and .host/, never output/
#
# COMFYUI_DIR=... make demo uses your own ComfyUI. PYTHON=... names the interpreter to build with.

PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$p && break; done),python3)
WAN_FP8_HOST_DIR ?= .host
VENV = $(WAN_FP8_HOST_DIR)/venv/bin
# The tests and checks always use the pinned host, whatever COMFYUI_DIR says: their numbers are compared with its.
PINNED = env -u COMFYUI_DIR -u PYTHONDONTWRITEBYTECODE
PYTEST = $(PINNED) OMP_NUM_THREADS=1 $(VENV)/python -P -m pytest -c tests/pytest.ini --rootdir tests
TESTS ?=
# Triton, for its interpreter only: kept out of the environment, where PyTorch would find it and take it for a GPU's.
TRITON = $(WAN_FP8_HOST_DIR)/triton

.PHONY: demo test check host clean ui triton soak prompts pool-soak

demo:
	@$(PYTHON) scripts/demo.py

host:
	@$(PINNED) $(PYTHON) scripts/host.py >/dev/null

triton: host
	@test -d $(TRITON) || { rm -rf $(TRITON).part && \
		$(VENV)/python -m pip install -q --no-deps --target $(TRITON).part triton==3.6.0 && mv $(TRITON).part $(TRITON); } \
		|| echo "no Triton for this platform: the tests of its kernels in the interpreter are named as skipped"

# All of them in two processes side by side; those that TESTS names in one.
test: host triton
	@$(if $(TESTS),$(PYTEST) $(TESTS),$(PINNED) OMP_NUM_THREADS=1 $(VENV)/python scripts/run_tests.py)

ui: host
	@$(PYTEST) tests/ui

soak: prompts pool-soak

prompts: host
	@$(PINNED) $(VENV)/python scripts/soak_prompts.py

pool-soak: host
	@$(PINNED) OMP_NUM_THREADS=1 $(VENV)/python scripts/soak.py $(SOAK)

# The pack's modules import each other relatively; the link gives mypy a package name to resolve that from.
check: host
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check --quiet . || { echo "not formatted: run '$(VENV)/ruff format .'"; exit 1; }
	@mkdir -p .out/typing && ln -sfn ../.. .out/typing/wan_fp8_pack
	@$(VENV)/mypy -p wan_fp8_pack.wan_fp8 -p wan_fp8_pack.nodes
	@$(VENV)/mypy scripts

clean:
	rm -rf .host .out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
