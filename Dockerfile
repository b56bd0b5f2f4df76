# The workbook in an image, made by the same `make setup`; for those who have Docker. Nothing here needs it.
#   docker build -t servebook:0.1.0 .
#   docker build -t servebook:0.1.0-gpu --build-arg DEVICE=gpu --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 .
#   docker build -t vllm-router:0.1.17 --target router .
#   docker run -it --name servebook --network host --shm-size 1g servebook:0.1.0   (with --gpus all for the other)
#   docker start -ai servebook     from then on: the container keeps what you write, until `docker rm`
ARG BASE=debian:13-slim

# For kubernetes/base: vLLM's router alone, with the versions of the lock.
FROM python:3.11-slim AS router
COPY requirements/cpu.txt /lock.txt
RUN pip install --no-cache-dir --constraint /lock.txt vllm-router
USER 1000
CMD ["python", "-m", "vllm_router.launch_router"]

# What `make setup` takes for granted. A GPU's base image brings the CUDA toolkit; one without it has not been tried.
FROM ${BASE} AS base
# Versions are the base's: the lock pins all that matters.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git libatomic1 make python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
# Ubuntu's images have a user 1000 already, and Kubernetes goes by the number.
RUN getent passwd 1000 > /dev/null || useradd --uid 1000 --no-create-home servebook; \
    install --directory --owner 1000 /servebook /home/servebook
USER 1000
ENV HOME=/home/servebook

FROM base AS servebook
ARG DEVICE=cpu
# Where uv brings Python from must not be below /home: KServe's template of an LLMInferenceService lays an empty volume
# there. The bundled model, in ~/.cache, is hidden by it too, and not missed: KServe brings the model that it serves.
ENV DEVICE=${DEVICE} PATH=/servebook/.venv/bin:$PATH UV_PYTHON_INSTALL_DIR=/servebook/python
WORKDIR /servebook
# First what `make setup` reads, and no more: an edit of a notebook or a page then costs no layer of gigabytes.
# (README.md is only named there.)
RUN mkdir --parents src/servebook && touch README.md
COPY --chown=1000 Makefile pyproject.toml ./
COPY --chown=1000 requirements/ requirements/
COPY --chown=1000 scripts/ scripts/
COPY --chown=1000 shims/ shims/
COPY --chown=1000 src/servebook/*.py src/servebook/
COPY --chown=1000 src/servebook/engine/ src/servebook/engine/
RUN UV_NO_CACHE=1 make setup
COPY --chown=1000 . .
# The same locks may come with a later time than an environment out of the build's cache: it is no older for that.
RUN python -m compileall -q src && make --touch setup
CMD ["make", "lab"]
