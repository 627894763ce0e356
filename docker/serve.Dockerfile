# Serves a run's base and tuned model with vLLM. Build from the repository's root: docker build -f docker/serve.Dockerfile -t medibuddy-serve .
# No model is inside beside the 7 MB toy of the package: the run directory and the base model are mounted, read-only (see docker/compose.yaml).
FROM python:3.11.14-slim-bookworm

# Triton compiles small launchers with gcc when it starts
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc=4:12.2.0-3 libc6-dev=2.36-9+deb12u* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin medibuddy

WORKDIR /opt/medibuddy
COPY docker/serve.txt docker/serve.txt
RUN pip install --no-cache-dir -r docker/serve.txt
COPY setup.py settings.ini pyproject.toml README.md LICENSE ./
COPY medibuddy medibuddy
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

# The container's own files are read-only; what libraries cache goes to /tmp
ENV PYTHONUNBUFFERED=1 HF_HOME=/models HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 \
    XDG_CACHE_HOME=/tmp/cache VLLM_CACHE_ROOT=/tmp/vllm TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["medibuddy", "serve", "/run-dir", "--engine", "vllm", "--host", "0.0.0.0", "--port", "8000"]
