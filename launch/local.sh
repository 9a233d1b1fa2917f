#!/usr/bin/env bash
# Runs the main command as several processes on this machine. They share the work over gloo. Use it
# to test what a pod does, and on machines with several sockets:
#
#     launch/local.sh 4 --config=configs/xlong.py:local --workdir=runs/four
#
# If a process dies, the others end within a minute. The exit code is 75 if the same command
# continues the run (after a signal, or the loss of a process). With RMJAX_RETRY=1 the script then
# repeats the command by itself.
set -u
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "launch/local.sh: give the number of processes first: launch/local.sh 4 --config=..." >&2
  exit 2
fi
count=$1 && shift
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_PROCESSES=$count
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
trap 'stop=1; kill -TERM "${children[@]}" 2>/dev/null' TERM INT

free_port='import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])'

# Sets `code`: 0 if all processes finished, 75 if the command continues the run, or else the code of
# the first process that failed.
one_run() {
  JAX_COORDINATOR_ADDRESS=localhost:$("$python" -c "$free_port")
  export JAX_COORDINATOR_ADDRESS
  children=() code=0
  for ((i = 0; i < count; i++)); do
    JAX_PROCESS_ID=$i "$python" -m rmjax.main "$@" 2> >(sed -u "s/^/[$i] /" >&2) &
    children+=($!)
  done
  [ -n "${stop:-}" ] && kill -TERM "${children[@]}" # the signal came before they started
  for child in "${children[@]}"; do
    # A signal to this script interrupts `wait`.
    while wait "$child"; one=$?; kill -0 "$child" 2>/dev/null; do :; done
    [ "$one" -gt 128 ] && [ "$one" -ne 200 ] && one=75 # it was killed; 200 is a user's mistake
    [ "$one" -ne 0 ] && { [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; } && code=$one
  done
}

while
  one_run "$@"
  [ "$code" -eq 75 ] && [ "${RMJAX_RETRY:-0}" = 1 ] && [ -z "${stop:-}" ]
do :; done
exit "$code"
