# Two targets: cpu (small models, tests) and cuda. deploy/README.md has the commands.
#   docker build --target cpu -t ropeway:cpu .
#   docker build --target cuda -t ropeway:cuda --build-arg TORCH_INDEX= .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# Where pip finds torch: PyTorch's CPU index by default; empty = the usual index, whose Linux build brings CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/ropeway
WORKDIR /src
COPY constraints.txt ./
RUN /opt/ropeway/bin/pip install -c constraints.txt torch ${TORCH_INDEX:+--index-url ${TORCH_INDEX}}
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY kernels ./kernels
COPY scheduler ./scheduler
COPY server ./server
# pip compiles what it installs: a read-only root could not do so later.
RUN /opt/ropeway/bin/pip install -c constraints.txt .

FROM ${BASE} AS cpu
RUN /usr/sbin/useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ropeway
COPY --from=build /opt/ropeway /opt/ropeway
USER 10001
# Caches that libraries write must lie on the one writable mount.
ENV PATH=/opt/ropeway/bin:$PATH HOME=/tmp HF_HOME=/tmp/huggingface PYTHONUNBUFFERED=1 ROPEWAY_HOST=0.0.0.0 ROPEWAY_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s \
  CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"ROPEWAY_PORT\"]}/health/live', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["ropeway"]
CMD ["serve"]

FROM cpu AS cuda
USER 0
# Triton compiles its driver stub when it first runs; Python's headers are in the base image.
# No versions: a pinned one disappears from the release with its next security update.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# Compiled kernels: a volume that is mounted here belongs to who owns the folder in the image.
RUN mkdir /tmp/triton && chown 10001 /tmp/triton
ENV TRITON_CACHE_DIR=/tmp/triton
USER 10001
