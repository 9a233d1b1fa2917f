#!/usr/bin/env bash
# Compares the fused scan with the plain one on the GPU of this machine, and times both:
#
#     launch/gpu_check.sh FOLDER [flags of python -m rmjax.bench]
#
# The equality tests come first. Then each line of JSON in FOLDER/steps.jsonl has the train step of
# RM at the size of XLong: batch size, scan, number format, and what the bench prints. A step that
# fails leaves FOLDER/<name>.log. BATCHES, KINDS, REPEATS and LIMIT (seconds) may be set. Exit code
# 1: a test or a step failed. On a CPU the kernel is interpreted, so take a tiny size:
#
#     BATCHES=2 REPEATS=1 launch/gpu_check.sh out --config.data.simulated.clicks_min=40 \
#         --config.data.simulated.clicks_max=40 --config.machine.dim=16 --config.data.segment_length=4
set -u
folder=${1:?FOLDER is missing: launch/gpu_check.sh FOLDER}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) && cd "$root" || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} XLA_PYTHON_CLIENT_PREALLOCATE=false
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
failed=0

# Without JAX_PLATFORMS, tests/conftest.py takes the CPU, and compiles with few optimisations.
if [ -z "${JAX_PLATFORMS:-}" ] && "$python" -c 'import jax; jax.devices("cuda")' 2>/dev/null; then
  export JAX_PLATFORMS=cuda,cpu
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
backend=$("$python" -c 'import jax; print(jax.default_backend())') || exit 1
[ "$backend" = gpu ] || echo "no GPU is tested: JAX runs on the $backend of this machine" >&2

tests=tests/machines/test_fused.py
flags="--xla_backend_optimization_level=3 ${XLA_FLAGS:-}"
if XLA_FLAGS=$flags "$python" -m pytest -q -n0 "$tests" >"$folder/tests.log" 2>&1; then
  echo "equality tests: passed on the $backend"
else
  echo "equality tests: FAILED on the $backend, see $folder/tests.log" >&2
  failed=1
fi

for kind in ${KINDS:-off:float32 on:float32 off:tensorfloat32 on:tensorfloat32 on:bfloat16}; do
  for batch in ${BATCHES:-256 32 1024}; do
    scan=${kind%:*} format=${kind#*:}
    name=${batch}_${scan}_$format
    [ "$SECONDS" -lt "${LIMIT:-540}" ] || { echo "$name: no time left"; continue; }
    if step=$("$python" -m rmjax.bench --config=configs/xlong.py --nostreaming \
      --repeats="${REPEATS:-20}" --config.data.simulated.train=$((batch > 64 ? batch : 64)) \
      --config.data.simulated.valid=64 --config.data.simulated.test=64 \
      --config.train.batch_size="$batch" --config.train.compute_dtype="$format" \
      --config.machine.fused="$scan" "$@" 2>"$folder/$name.log"); then
      rm "$folder/$name.log"
      step=$(echo "$step" | tr -d '\n')
      echo "{\"batch\": $batch, \"fused\": \"$scan\", \"format\": \"$format\", \"step\": $step}" \
        >>"$folder/steps.jsonl"
      echo "$name: $(echo "$step" | grep -o '"step_ms[a-z_]*": [0-9.]*' | tr '\n' ' ')"
    else
      echo "$name: FAILED, see $folder/$name.log" >&2
      failed=1
    fi
  done
done
exit "$failed"
