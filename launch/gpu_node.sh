#!/usr/bin/env bash
# Runs the main command as one process on all GPUs of this machine. The batch is split over them:
#
#     launch/gpu_node.sh --config=configs/xlong.py --workdir=runs/xlong
#
# CUDA_VISIBLE_DEVICES selects some of the GPUs. After SIGTERM the run saves and exits 75. The same
# command continues it; with RMJAX_RETRY=1 this script repeats the command by itself.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}

gpus='import jax; print(sum(d.platform == "gpu" for d in jax.local_devices()))'
count=$("$python" -c "$gpus") || {
  echo "launch/gpu_node.sh: $python has no working JAX (see the error above)." \
    "Make .venv as README says, or set PYTHON" >&2
  exit 1
}
if [ "$count" -eq 0 ]; then
  echo "launch/gpu_node.sh: JAX sees no GPU. Install it with: pip install -e '.[cuda]'" >&2
  exit 1
fi
echo "launch/gpu_node.sh: $count GPU(s)"
trap 'stop=1; kill -TERM "${child:-}" 2>/dev/null' TERM INT
while :; do
  "$python" -m rmjax.main "$@" &
  child=$!
  wait "$child"
  code=$?
  # A signal to this script interrupted the first `wait`.
  [ "$code" -gt 128 ] && { wait "$child"; code=$?; }
  [ "$code" -eq 75 ] && [ "${RMJAX_RETRY:-0}" = 1 ] && [ -z "${stop:-}" ] || exit "$code"
done
