# Two commands do everything: `make lab` and `make test`.
# DEVICE=cpu|gpu|auto chooses the lock; K=name runs a part of the tests; LAB_ARGS goes to jupyter lab; OFFLINE=DIR takes
# everything from a folder that `make offline DIR=…` made.

DEVICE ?= auto
LAB_ARGS ?=
K ?=
# What is set for another Python: it ends ours, has it wait for a person, or makes an error of a library's warning.
unexport PYTHONHOME PYTHONINSPECT PYTHONOPTIMIZE PYTHONWARNINGS

device := $(if $(filter auto,$(DEVICE)),$(if $(shell nvidia-smi -L 2> /dev/null),gpu,cpu),$(DEVICE))
# In an active conda environment named "servebook" (environment.yml) the same commands work there; any other
# conda environment, such as "base", is left alone.
conda := $(if $(filter-out servebook,$(notdir $(CONDA_DEFAULT_ENV))),,$(CONDA_PREFIX))
ifneq ($(words $(conda)),$(if $(conda),1,0))
$(error servebook: make cannot have the blank in $(conda); make the conda environment in another folder, or leave it: conda deactivate)
endif
# Relative, for a clone in a folder of any name: make splits targets at blanks.
env := $(or $(conda),.venv)
bin := $(env)/bin
path := $(if $(conda),,$$PWD/)$(bin):$$PATH
python := $(bin)/python -P
ready := $(env)/.servebook-$(device)
room := $(env)/room
chapter := $(filter $(K)_%,$(notdir $(wildcard notebooks/*.ipynb)))
part := $(if $(chapter),,$(K))
# Of a chapter: its own tests, and of those that go through all chapters what bears its number.
of_chapter = $(if $(chapter),-k "test_$(K)_ or [$(K) or -$(K)" $(wildcard tests/test_$(K)_*.py) \
	$(addprefix tests/test_,$(addsuffix .py,chapters labs labs_kit notebooks readme)))
# Of a copied clone, or of two with one conda environment, the programs would run the other's code; those of a moved one
# run nothing, nor do they without the Python that they were made by: the set-up sees to it.
stale := $(shell made_in=$$(cat "$(env)/lib/python3.11/site-packages/_editable_impl_servebook.pth" 2> /dev/null); \
	[ -e "$(ready)" ] && [ -x "$(bin)/python" ] && { [ ! "$$made_in" ] || [ "$$made_in" -ef src ]; } || echo stale)
# A lock that is not there is the set-up's to name.
locked := $(wildcard requirements/$(device).txt) pyproject.toml $(wildcard shims/*/pyproject.toml) scripts/setup

.PHONY: lab room test browser check lint setup offline lock notebooks pictures labs deck agendas sheets survived protos clean stale

# The folder jupyter/ configures this JupyterLab only. It refuses root unless told; in a container root is usual.
# And a kernel "python3" that the user has of another Python comes after ours, also in a clone of somebody else's.
# `|| true`: the doctor prints what it found; a failed check must not keep the reader from the notebooks.
lab: $(ready)
	@$(bin)/servebook doctor --quiet || true
	@PATH="$(path)" JUPYTER_CONFIG_PATH=jupyter JUPYTER_PREFER_ENV_PATH=1 exec $(bin)/jupyter-lab --ip 127.0.0.1 \
		--ServerApp.root_dir="$$PWD" $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

# JupyterHub for a room of learners; Ctrl-C ends it with everything in it.
room: $(room)/.ready
	@exec $(bin)/servebook room start

# First of all the browser: what has none must not fail when everything else has run. A part may do without, and is not
# linted (`make check` is). K=04 is what bears the number of chapter 04, in the lanes of the suite, and not each test
# that has 404 or 2048 in its name.
test: browser $(if $(K),,lint) $(room)/.ready
	$(if $(part),$(bin)/pytest --durations 25 -k "$(part)",scripts/test "$(bin)/pytest" $(of_chapter))

browser:
	@$(if $(K),-)scripts/browser "$(env)"

# Some machines forbid Python to keep what it compiles; each process of pytest would then rewrite 446 modules anew.
check test: export PYTHONDONTWRITEBYTECODE =
check: lint
	$(bin)/pytest -m "not engine and not browser and not lifetime" -n $$(($$(nproc) + 1)) --maxprocesses 4 --dist worksteal

lint: $(ready)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/buf lint protos
	$(bin)/buf format --diff --exit-code protos

setup: $(ready)

$(ready): $(locked) $(stale)
	@scripts/setup "$(env)" "$(device)"

# JupyterHub and its proxy, in an environment of their own, which goes with that of the workbook if it is made anew.
$(room)/.ready: requirements/room.txt scripts/setup-room $(stale) | $(ready)
	@scripts/setup-room "$(env)" "$(room)"

# A folder with all that a machine without a network needs; there, `make lab OFFLINE=DIR`.
offline:
	@scripts/offline "$(DIR)" "$(device)"

lock:
	@scripts/lock

notebooks: $(ready)
	$(python) -m servebook.workbook.gate --store

# README's pictures, taken anew.
pictures: browser $(ready)
	$(bin)/python tests/pictures.py

labs: $(ready)
	$(python) -m servebook.lab.handout.blanks

# The instructor's slides and a handout, from the notebooks; the agendas in docs/instructor.md, from the manifests.
deck: $(ready)
	$(python) -m servebook.workbook.deck "$(or $(DIR),deck)"

agendas: $(ready)
	$(python) -m servebook.workbook.agenda

# The cheat sheets in docs/, from the tested snippets.
sheets: $(ready)
	$(python) -m servebook.workbook.cheatsheets

# Faults that take too long for `make test`, at every server (an hour): what was seen goes into docs/security.md.
survived: $(ready)
	$(bin)/pytest tests/faults_by_hand.py --store-survived

# The stubs of all protos; a test holds them fresh.
protos: $(ready)
	PATH="$(path)" $(python) -m grpc_tools.protoc -I servebook/protos=protos --python_out=src --pyi_out=src --grpc_python_out=src --mypy_grpc_out=quiet:src servebook/protos/llm/v1/llm.proto servebook/protos/vllm/inference.proto

# Not by the command, which names the Python of the folder where it was made: of a moved clone it would not run.
clean:
	@-[ ! -x $(bin)/servebook ] || PYTHONPATH=src $(python) -c "from servebook.cli import main; main()" down --all
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
