#!/usr/bin/env bash
# Checks and times this package on the GPU of this machine, in about ten minutes:
#
#     launch/gpu_check.sh FOLDER [KEY=VALUE of the config ...]
#
# 1. first      One train step of RM at the size of XLong is compiled alone, without a cache.
# 2. tests      The equality tests of the fused scan run. Meanwhile all other steps are compiled,
#    compile    JOBS at a time. What is compiled is kept, so no later stage compiles it again.
# 3. steps      Each step is timed alone.
# 4. streaming  Writes of one segment, and answers, after HISTORY items.
# 5. memoria    Steps of Memoria.
#
# A number is printed as soon as it is known. FOLDER has all results of the bench (*.jsonl) and a log
# of each stage. LIMIT (seconds of all stages), PATIENCE (a factor of the bound of each), REPEATS,
# JOBS, BATCHES, KINDS, SIZE, HISTORY, MEMORIA and TESTS (of pytest) may be set. A kind is
# SCAN:FORMAT, and behind a second colon flags of XLA. A stage that reaches its bound is ended, and
# counts as failed. Exit code 1: a stage failed. On a CPU the kernel is interpreted, so take a tiny
# size:
#
#     BATCHES=2 REPEATS=1 HISTORY=100 MEMORIA=tiny launch/gpu_check.sh out machine.dim=8 \
#         machine.heads=2 machine.layers=1 rehearsal.layers=1 teacher.dim=8
set -u
folder=${1:?FOLDER is missing: launch/gpu_check.sh FOLDER}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) && cd "$root" || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} XLA_PYTHON_CLIENT_PREALLOCATE=false
JAX_COMPILATION_CACHE_DIR=$(mktemp -d "$folder/compiled.XXXXXX") || exit 1
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
size=${SIZE:-xlong} repeats=${REPEATS:-20} limit=${LIMIT:-780} failed=0
sets=()
for one in "$@"; do sets+=("--set=$one"); done
batches=${BATCHES:-32 256 1024}
fast=tensorfloat32
quick="--xla_gpu_experimental_enable_fusion_autotuner=false --xla_gpu_enable_triton_gemm=false"
kinds=${KINDS:-off:$fast on:$fast off:$fast:--xla_gpu_enable_command_buffer=+WHILE on:bfloat16 \
  off:bfloat16 off:float32 on:float32 off:$fast:--xla_gpu_enable_triton_gemm=true \
  off:$fast:--xla_gpu_autotune_level=0}

# Without JAX_PLATFORMS, tests/conftest.py takes the CPU, and compiles with few optimisations.
if [ -z "${JAX_PLATFORMS:-}" ] && "$python" -c 'import jax; jax.devices("cuda")' 2>/dev/null; then
  export JAX_PLATFORMS=cuda,cpu
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
backend=$("$python" -c 'import jax; print(jax.default_backend())') || exit 1
[ "$backend" = gpu ] || echo "no GPU is tested: JAX runs on the $backend of this machine" >&2

# bound SECONDS COMMAND ...: ends a command after so many seconds times PATIENCE, or at LIMIT.
bound() {
  local most=$(($1 * ${PATIENCE:-1})) left=$((limit - SECONDS))
  shift
  [ "$left" -gt 0 ] || return 124
  timeout -k 5 "$((most < left ? most : left))" "$@"
}

# bench NAME SECONDS XLA_FLAGS FLAGS ...: runs the bench; its results are in FOLDER/NAME.json.
bench() {
  local name=$1 seconds=$2 flags=${XLA_FLAGS:-}
  [ -z "$3" ] || flags="${flags:+$flags }$3"
  shift 3
  XLA_FLAGS=$flags bound "$seconds" "$python" -m rmjax.bench "$@" \
    >"$folder/$name.json" 2>"$folder/$name.log"
}

# step NAME SECONDS REPEATS BATCH KIND: compiles a train step and, with repeats, times it.
step() {
  local name=$1 seconds=$2 repeats=$3 batch=$4 scan format flags
  IFS=: read -r scan format flags <<<"$5"
  bench "$name" "$seconds" "$flags" --size="$size" --nostreaming --repeats="$repeats" \
    --set=train.batch_size="$batch" --set=train.compute_dtype="$format" \
    --set=machine.fused="$scan" ${sets[@]+"${sets[@]}"}
}

# told NAME TEXT BEGIN CODE: prints the numbers of a bench, or that it failed.
told() {
  local seconds=$((SECONDS - $3))
  if [ "$4" = 0 ]; then
    numbers=$(grep -oE '"(compile_seconds|step_ms[a-z_]*|write_segment_ms|answer_query_ms)": [0-9.]+' \
      "$folder/$1.json" | tr -d '"' | tr '\n' ' ')
    echo "$2: ${numbers}($seconds s, $SECONDS s in all)"
  else
    echo "$2: FAILED after $seconds s, see $folder/$1.log" >&2
    failed=1
  fi
}

named() { echo "${1}_${2//[^A-Za-z0-9]/_}"; }

read -ra words <<<"$kinds"
set -- "${words[@]}"
begin=$SECONDS
step first 240 "$repeats" "${batches%% *}" "$1"
told first "first ${batches%% *} $1" "$begin" $?

(
  # tests/conftest.py asks for few optimisations; these tests run as users do. The bench sets the
  # other flags itself, see rmjax/run/environment.py.
  export XLA_FLAGS="--xla_backend_optimization_level=3 $quick ${XLA_FLAGS:-}"
  read -ra words <<<"${TESTS:-tests/machines/test_fused.py}"
  bound 300 "$python" -m pytest -q -n0 "${words[@]}" \
    >"$folder/tests.log" 2>&1
  echo $? >"$folder/tests.code"
) &
compile() {
  local name begin=$SECONDS
  name=$(named "$1" "$2")
  if step "compile_$name" 200 0 "$1" "$2"; then
    touch "$folder/$name.ready"
    told "compile_$name" "compile $1 $2" "$begin" 0
  else
    echo "compile $1 $2: FAILED after $((SECONDS - begin)) s, see $folder/compile_$name.log" >&2
  fi
}
running=0
for kind in $kinds; do
  for batch in $batches; do
    rm -f "$folder/$(named "$batch" "$kind").ready"
    if [ "$running" -ge "${JOBS:-4}" ]; then
      wait -n
      running=$((running - 1))
    fi
    compile "$batch" "$kind" &
    running=$((running + 1))
  done
done
wait
if [ "$(cat "$folder/tests.code")" = 0 ]; then
  echo "equality tests: passed on the $backend"
else
  echo "equality tests: FAILED on the $backend, see $folder/tests.log" >&2
  failed=1
fi

for kind in $kinds; do
  for batch in $batches; do
    name=$(named "$batch" "$kind") begin=$SECONDS
    if [ ! -e "$folder/$name.ready" ]; then
      failed=1
      continue
    fi
    step "$name" 60 "$repeats" "$batch" "$kind"
    code=$?
    told "$name" "step $batch $kind" "$begin" "$code"
    [ "$code" = 0 ] || continue
    result=$(tr -d '\n' <"$folder/$name.json")
    echo "{\"batch\": $batch, \"kind\": \"$kind\", \"step\": $result}" >>"$folder/steps.jsonl"
  done
done

begin=$SECONDS
bench streaming 90 "" --size="$size" --repeats=0 --history="${HISTORY:-1000}" \
  --set=train.compute_dtype=$fast ${sets[@]+"${sets[@]}"}
told streaming streaming "$begin" $?
for row in ${MEMORIA:-lm sorting}; do
  begin=$SECONDS
  bench "memoria_$row" 120 "" --config="configs/memoria_bench.py:$row"
  told "memoria_$row" "memoria $row" "$begin" $?
done
exit "$failed"
