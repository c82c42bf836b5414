# syntax=docker/dockerfile:1
# Two images from one file; both run as user 1000:100 and hold bash and wget, which KubeRay's start and probes use.
#   docker build --target cpu  -t stageline:0.1.0-cpu  .     head, gateway, downloader, batch jobs
#   docker build --target cuda -t stageline:0.1.0-cuda .     stages
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md ./
COPY proto proto
COPY stages stages
COPY gateway gateway
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS base
# Debian serves the newest version of a package only, so there is none to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash ca-certificates wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --gid 100 --create-home --shell /bin/bash ray
ENV PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# A local version (2.13.0+cpu) is newer than the same without (2.13.0), so pip takes PyTorch from its CPU index.
FROM base AS cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    wheel=$(echo /wheels/*.whl) \
    && pip install --no-cache-dir --extra-index-url "${TORCH_CPU_INDEX}" "${wheel}[dataset,gcs,postgres,s3]"
USER 1000:100
WORKDIR /home/ray

# PyPI's wheel of PyTorch brings CUDA's libraries; the node brings the driver.
FROM base AS cuda
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir /wheels/*.whl
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:100
WORKDIR /home/ray
