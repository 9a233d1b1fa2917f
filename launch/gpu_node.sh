#!/usr/bin/env bash
# The main line on all GPUs of this machine, one process, the batch split over them:
#
#     launch/gpu_node.sh --config=configs/xlong.py --workdir=runs/xlong
#
# CUDA_VISIBLE_DEVICES picks some of them. After SIGTERM the run saves and exits 75; the same line goes on, and
# with RMJAX_RETRY=1 this script types it again by itself.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}

count=$("$python" -c 'import jax; print(sum(d.platform == "gpu" for d in jax.local_devices()))') || {
  echo "launch/gpu_node.sh: $python has no working JAX (see above). Make .venv as README says, or set PYTHON" >&2
  exit 1
}
if [ "$count" -eq 0 ]; then
  echo "launch/gpu_node.sh: JAX sees no GPU here. Install it with: pip install -e '.[cuda]'" >&2
  exit 1
fi
echo "launch/gpu_node.sh: $count GPU(s)"
trap 'stop=1; kill -TERM "${child:-}" 2>/dev/null' TERM INT
while :; do
  "$python" -m rmjax.main "$@" &
  child=$!
  wait "$child"
  code=$?
  [ "$code" -gt 128 ] && { wait "$child"; code=$?; } # the first wait was broken off by our own signal
  [ "$code" -eq 75 ] && [ "${RMJAX_RETRY:-0}" = 1 ] && [ -z "${stop:-}" ] || exit "$code"
done
