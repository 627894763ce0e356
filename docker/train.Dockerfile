# Trains and evaluates on one machine's GPUs. Build from the repository's root: docker build -f docker/train.Dockerfile -t medibuddy-train .
# Rows, runs and base models are mounted (see docker/compose.yaml); the versions are those of constraints.txt.
FROM python:3.11.14-slim-bookworm

# Triton compiles small launchers with gcc when it starts
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc=4:12.2.0-3 libc6-dev=2.36-9+deb12u* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin medibuddy

WORKDIR /opt/medibuddy
COPY setup.py settings.ini pyproject.toml constraints.txt README.md LICENSE ./
COPY medibuddy medibuddy
RUN pip install --no-cache-dir --constraint constraints.txt ".[gpu,eval]"

ENV PYTHONUNBUFFERED=1 HF_HOME=/models HF_HUB_DISABLE_TELEMETRY=1 UNSLOTH_DISABLE_STATISTICS=1 DO_NOT_TRACK=1 \
    XDG_CACHE_HOME=/tmp/cache TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /runs
USER 10001:10001
# A GPU that fell off the bus shows here before it shows in the loss
HEALTHCHECK --interval=5m --timeout=60s --start-period=2m --retries=2 \
    CMD ["python", "-c", "import torch; torch.cuda.mem_get_info()"]
ENTRYPOINT ["medibuddy"]
CMD ["--help"]
