# One image for the Ray head, the workers, the job submitter and single commands: `docker build -t distrec .`
# For CPUs: --build-arg TORCH=…, a CPU build of torch 2.13.0; the one from PyPI brings several GB of CUDA.
# For GPUs: --build-arg LOCK=gpu.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
ARG LOCK=cpu
ARG TORCH=torch==2.13.0
WORKDIR /app
RUN python3 -m venv /opt/venv
# dev.txt only limits the versions of what torch brings; none of the packages for tests is installed.
COPY locks/${LOCK}.txt lock.txt
COPY locks/dev.txt dev.txt
# hadolint ignore=DL3042,SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip install -c lock.txt -c dev.txt ${TORCH} setuptools \
    && /opt/venv/bin/pip install --no-deps --no-build-isolation -r lock.txt
# What nothing here reads: tests of packages, C++ headers (there is no compiler) and Ray's Java. Compiled Python files
# stay, because without them every worker would compile torch again when it starts.
WORKDIR /opt/venv/lib/python3.11/site-packages
RUN find networkx numpy pandas pyarrow scipy sympy -type d -name tests -prune -exec rm -r {} + \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && rm -rf torch/test torch/include pyarrow/include ray/jars
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY distrec distrec
# hadolint ignore=DL3042
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation .

FROM ${BASE_IMAGE}
ARG LOCK=cpu
LABEL org.opencontainers.image.title="distrec" \
      org.opencontainers.image.description="Multimodal recommenders trained at any size" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      distrec.lock="${LOCK}"
# KubeRay's probes and the health check below call wget.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 distrec
# The environment's python is a link to the base image's python, so both stages need the same base image.
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
# A number, so that Kubernetes can see that it is not root.
USER 1000
WORKDIR /home/distrec
COPY configs configs
COPY jobs jobs
# For `docker run` and Compose; Kubernetes has its own probes. A container with a raylet is healthy if Ray's agent says
# that the raylet is. A container without one, such as a command that trains in one process, has nothing to ask.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "! grep -qsx raylet /proc/[0-9]*/comm || \
        wget --tries=1 --timeout=5 -qO- http://127.0.0.1:52365/api/local_raylet_healthz | grep -q success"]
# There is no entrypoint: Ray's operators run `ray start …` in this image, and people run `distrec …`.
CMD ["distrec", "--help"]
