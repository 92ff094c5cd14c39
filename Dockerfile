# One image for the Ray head, the workers and the job submitter: `docker build -t distrec .`
# For GPUs: --build-arg LOCK=gpu --build-arg TORCH=torch==2.13.0 (a CUDA build).
# For CPUs: --build-arg TORCH=<a CPU build of 2.13.0>.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
ARG LOCK=cpu
ARG TORCH=torch==2.13.0
WORKDIR /app
RUN python3 -m venv /opt/venv
COPY locks/${LOCK}.txt lock.txt
# hadolint ignore=DL3042,SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip install -c lock.txt ${TORCH} setuptools \
    && /opt/venv/bin/pip install --no-deps --no-build-isolation -r lock.txt
COPY pyproject.toml README.md LICENSE ./
COPY distrec distrec
# hadolint ignore=DL3042
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation .

FROM ${BASE_IMAGE}
# KubeRay's probes and job submitter call wget inside this image.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
# The environment's python is a link to the base image's python, so both stages need the same base image.
COPY --from=build /opt/venv /opt/venv
RUN useradd --create-home --uid 1000 distrec
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /home/distrec
COPY configs configs
COPY jobs jobs
# There is no entrypoint: Ray's operators run `ray start …` in this image, and people run `distrec …`.
CMD ["distrec", "--help"]
