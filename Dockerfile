# corl_jax on NVIDIA GPUs: docker build -t corl_jax . && docker run --gpus all corl_jax --help
#
# A plain Python image is enough. The packages of jax[cuda13] bring CUDA, cuDNN and NCCL; the driver
# (580 or newer) comes from the host, through the NVIDIA Container Toolkit. An image of CUDA would
# add gigabytes that are not used, and a second version of each library.
FROM python:3.13-slim-trixie

# Runs, and downloads of the hub, survive the container in this folder: docker run -v $PWD:/work ...
ENV HF_HOME=/work/.cache/huggingface
ENV PIP_NO_CACHE_DIR=1

COPY pyproject.toml README.md LICENSE /src/
COPY configs /src/configs
COPY corl_jax /src/corl_jax
RUN pip install "/src[cuda]" && rm -r /src

WORKDIR /work
ENTRYPOINT ["corl-jax"]
CMD ["--help"]
