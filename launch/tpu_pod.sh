#!/usr/bin/env bash
# The main line on every host of a TPU pod slice; the hosts find each other by themselves:
#
#     launch/tpu_pod.sh my-pod us-central2-b --config=configs/xlong.py --workdir=/mnt/runs/xlong
#
# ~/rmjax on every host is this repository with its .venv (pip install -e '.[tpu]'), and --workdir a directory that all
# of them see: Filestore. (A bucket under gcsfuse renames no directory, as checkpoints do, but with --rename-dir-limit or
# a hierarchical namespace; and each host caches its listings.) Where the run was stopped (exit 75) or a host was lost,
# it goes on; not after a mistake (200) of any host.
# shellcheck disable=SC2016 # what is in single quotes is for the hosts
set -u
if [ $# -lt 3 ]; then
  echo "launch/tpu_pod.sh NAME ZONE --config=... --workdir=..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2
line="cd rmjax && rm -f .mistake && .venv/bin/python -m rmjax.main --distributed $(printf '%q ' "$@")"
line+='; code=$?; [ $code -ne 200 ] || touch .mistake; exit $code'
# Every host waits for what is still saving there, five minutes, and says whether it made a mistake. [r]: not this line.
clean='for i in $(seq 60); do pkill -f "[r]mjax.main --distributed" || break; sleep 5; done'
clean+='; pkill -9 -f "[r]mjax.main --distributed"; [ ! -e rmjax/.mistake ] || exit 200'
on_every_host() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
for ((restarts = 0; restarts <= ${RMJAX_RESTARTS:-100}; restarts++)); do
  on_every_host "$line"
  code=$?
  # 255: ssh lost a host, maintenance for instance; it comes back, and the others end by themselves.
  case $code in 75 | 255 | 12[89] | 1[3-9]?) ;; *) break ;; esac
  on_every_host "$clean"
  [ $? -ne 200 ] || { code=200; break; }
done
exit "$code"
