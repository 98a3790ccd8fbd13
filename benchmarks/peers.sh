#!/usr/bin/env bash
# The peers of the GPU benchmarks as wheels in .whl/, for a GPU machine without a network: Linux x86-64, Python $PYTHON_VERSION (default 3.12).
# FlashInfer compiles its kernels there, with that machine's nvcc; of what it asks for, its top_k needs only what is named here (25 MB; a newer one is 60 MB alone).
set -euo pipefail
cd "$(dirname "$0")/.."
platforms=(--platform any)
for glibc in 2_5 2_12 2_17 2_24 2_27 2_28; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
for old in manylinux1 manylinux2010 manylinux2014; do platforms+=(--platform "${old}_x86_64"); done
rm -rf .whl
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
  --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest .whl \
  flash-colreduce==0.2.2 flashinfer-python==0.6.8.post1 apache-tvm-ffi nvidia-cudnn-frontend nvidia-ml-py \
  click einops tabulate requests charset-normalizer idna certifi urllib3
du -sh .whl
