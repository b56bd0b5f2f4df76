# Two commands do everything: `make lab` and `make test`.
# DEVICE=cpu|gpu|auto chooses the lock; K=name runs a part of the tests; LAB_ARGS goes to jupyter lab.

DEVICE ?= auto
LAB_ARGS ?=
K ?=
export DEVICE

device := $(if $(filter auto,$(DEVICE)),$(if $(shell command -v nvidia-smi),gpu,cpu),$(DEVICE))
# Inside an active conda environment the same commands work there.
env := $(or $(CONDA_PREFIX),$(CURDIR)/.venv)
bin := $(env)/bin
python := $(bin)/python
ready := $(env)/.servebook-$(device)
locked := requirements/$(device).txt pyproject.toml $(wildcard shims/*/pyproject.toml) scripts/setup

.PHONY: lab test check setup lock notebooks labs protos clean

lab: $(ready)
	@$(bin)/servebook doctor --quiet
	exec $(bin)/jupyter lab --ip 127.0.0.1 $(LAB_ARGS) notebooks/00_start_here.ipynb

test: $(ready) check
	$(python) -m pytest $(if $(K),-k "$(K)")

check: $(ready)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/buf lint protos
	$(bin)/buf format --diff --exit-code protos

setup: $(ready)

$(ready): $(locked)
	@scripts/setup "$(env)" "$(device)"

lock:
	@scripts/lock

notebooks: $(ready)
	$(python) -m servebook.notebook_gate --store

labs: $(ready)
	$(python) -m servebook.lab.release

# llm.v1's stubs; a test holds them fresh.
protos: $(ready)
	$(python) -m grpc_tools.protoc -I protos --python_out=src --pyi_out=src --grpc_python_out=src --mypy_grpc_out=quiet:src llm/v1/llm.proto

clean:
	@-[ ! -x $(bin)/servebook ] || $(bin)/servebook down --all
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
