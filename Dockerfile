# Two images: the operator (small, without torch) and the trainer (on a base that has torch).
#
#   docker build --target operator -t internlm-operator .
#   docker build --target trainer -t internlm-trainer .
#
# For layers that are the same to the byte whenever they are built from the same sources and packages, add
#   --build-arg SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) --output type=image,rewrite-timestamp=true
ARG OPERATOR_BASE=python:3.12-slim
# NVIDIA's image carries torch, flash-attn and apex, built for each other.
ARG TRAINER_BASE=nvcr.io/nvidia/pytorch:26.05-py3

FROM ${OPERATOR_BASE} AS wheel
WORKDIR /source
COPY . .
RUN --mount=type=cache,target=/var/cache/pip \
    python3 -m pip --cache-dir /var/cache/pip wheel --no-deps --wheel-dir /wheels .

FROM ${OPERATOR_BASE} AS operator
# Debian marks its Python as its own (PEP 668); in an image of one program there is no other owner.
# USER: kopf asks for the user's name, and uid 1000 has none in this image.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    USER=internlm
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=cache,target=/var/cache/pip \
    python3 -m pip --cache-dir /var/cache/pip install --no-compile --root-user-action ignore \
        "$(echo /wheels/*.whl)[operator]"
USER 1000:1000
ENTRYPOINT ["internlm-operator"]
CMD ["run"]

FROM ${TRAINER_BASE} AS trainer
# torch asks for the user's name too, and writes compiled kernels below the home folder.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    USER=internlm \
    HOME=/tmp
# The base's torch stays, with all that was built for it: pip may add to them, not replace them.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=cache,target=/var/cache/pip \
    python3 -m pip list --format freeze \
        | sed -nE '/^(torch.*|triton|numpy|fsspec|flash.attn.*|apex|transformer.engine.*)==/Ip' > /tmp/kept.txt \
    && python3 -m pip --cache-dir /var/cache/pip install --no-compile --root-user-action ignore \
        --constraint /tmp/kept.txt "$(echo /wheels/*.whl)[trainer]" \
    && rm /tmp/kept.txt
USER 1000:1000
