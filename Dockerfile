# VRAMancer's server. BACKEND says for which devices: cuda (NVIDIA), rocm (AMD) or cpu.
#
#     docker build --build-arg BACKEND=cpu --tag vramancer:cpu .
#
# docs/docker.md says how to run it, and how to build from exactly the same base every time (a digest behind DEBIAN's tag).

# A release of Debian changes by security updates alone, so its packages are not pinned one by one.
# hadolint global ignore=DL3008

# Debian 12, because its Python 3.11 is the one that the tests run with.
ARG DEBIAN=debian:bookworm-20260824-slim


FROM ${DEBIAN} AS base

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*


# Everything that is installed goes into one virtual environment. pip, caches and sources stay behind in this stage.
FROM base AS build
ARG BACKEND=cuda
# Where to take torch from in place of BACKEND's own index, such as https://download.pytorch.org/whl/cu126 for GTX 10.
ARG TORCH_INDEX=

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /source
COPY pyproject.toml constraints.txt ./

RUN --mount=type=cache,target=/root/.cache/pip \
    case "$BACKEND" in \
        cuda) index=https://download.pytorch.org/whl/cu130 ;; \
        rocm) index=https://download.pytorch.org/whl/rocm7.2 ;; \
        cpu) index=https://download.pytorch.org/whl/cpu ;; \
        *) echo "BACKEND is cuda, rocm or cpu, not '$BACKEND'" >&2; exit 1 ;; \
    esac \
    && python3 -m venv --without-pip /opt/vramancer \
    && pip --python /opt/vramancer/bin/python install \
        --index-url "${TORCH_INDEX:-$index}" "$(grep '^torch==' constraints.txt)"

# The dependencies before the sources, so that a change in the sources does not install them again.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip --python /opt/vramancer/bin/python install --constraint constraints.txt --requirement requirements.txt

COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/vramancer/bin/python install --no-deps .


FROM base
ARG BACKEND=cuda

# The kernels for the processor are compiled at the first start, for the processor that is there, so every image has a C
# compiler. The attention kernels for GPUs are compiled by Triton, which needs Python's headers too.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && if [ "$BACKEND" != cpu ]; then apt-get install --yes --no-install-recommends libpython3-dev; fi \
    && rm -rf /var/lib/apt/lists/*

# Volumes that are new and empty take over these folders' owner.
RUN groupadd --gid 1000 vramancer \
    && useradd --uid 1000 --gid vramancer --home-dir /cache --no-create-home --shell /usr/sbin/nologin vramancer \
    && install --directory --owner=vramancer --group=vramancer --mode=0755 /models /cache \
    && install --directory --owner=vramancer --group=vramancer --mode=0700 /state

COPY --from=build /opt/vramancer /opt/vramancer

# What writes to its user's home (Triton, CUDA's compiler) writes to the cache. `-m` must not take modules from /models.
ENV PATH=/opt/vramancer/bin:$PATH \
    HOME=/cache \
    XDG_CONFIG_HOME=/etc \
    HF_HOME=/models/huggingface \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VRM_API_HOST=0.0.0.0 \
    VRM_API_PORT=5030 \
    VRM_METRICS_PORT=9108 \
    VRM_RUNTIME_CACHE_DIR=/cache/vramancer \
    VRM_RUNTIME_STATE_DIR=/state

USER 1000:1000
WORKDIR /models
VOLUME ["/models", "/cache", "/state"]
EXPOSE 5030 9108

# The server answers once its model is loaded; a model that has to be downloaded first takes longer than any start period.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['VRM_API_PORT']), timeout=4); c.request('GET', '/live'); sys.exit(c.getresponse().status != 200)"]

ENTRYPOINT ["python", "-m", "vramancer.main"]
CMD ["--api"]
