#!/usr/bin/env bash
# The main line as several processes on this machine, which share the devices' work over gloo; for tests of what a pod
# does, and for machines of several sockets:
#
#     launch/local.sh 4 --config=configs/xlong.py:local --workdir=runs/four
#
# Where one process dies the others end within a minute. Exits 75 where the same line goes on (a signal came, a process
# was lost); with RMJAX_RETRY=1 it types the line again by itself.
set -u
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { echo "launch/local.sh: how many processes? launch/local.sh 4 --config=..." >&2; exit 2; }
count=$1 && shift
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_PROCESSES=$count
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
trap 'stop=1; kill -TERM "${children[@]}" 2>/dev/null' TERM INT

one_run() { # -> code: 0 if all finished, 75 if the line goes on, else that of the first that failed
  JAX_COORDINATOR_ADDRESS=localhost:$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
  export JAX_COORDINATOR_ADDRESS
  children=() code=0
  for ((i = 0; i < count; i++)); do
    JAX_PROCESS_ID=$i "$python" -m rmjax.main "$@" 2> >(sed -u "s/^/[$i] /" >&2) &
    children+=($!)
  done
  [ -n "${stop:-}" ] && kill -TERM "${children[@]}" # asked before they were there
  for child in "${children[@]}"; do
    while wait "$child"; one=$?; kill -0 "$child" 2>/dev/null; do :; done # a signal of our own breaks off a wait
    [ "$one" -gt 128 ] && [ "$one" -ne 200 ] && one=75                    # it was killed; 200 is a mistake
    [ "$one" -ne 0 ] && { [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; } && code=$one
  done
}

while one_run "$@"; [ "$code" -eq 75 ] && [ "${RMJAX_RETRY:-0}" = 1 ] && [ -z "${stop:-}" ]; do :; done
exit "$code"
