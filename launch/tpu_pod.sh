#!/usr/bin/env bash
# Runs the main command on every host of a TPU pod slice. The hosts find each other by themselves:
#
#     launch/tpu_pod.sh my-pod us-central2-b --config=configs/xlong.py --workdir=/mnt/runs/xlong
#
# On every host ~/rmjax must be this repository with its .venv (pip install -e '.[tpu]'). --workdir
# must be a directory that all hosts see, such as Filestore. A bucket under gcsfuse does not
# suffice: each host caches its listings. Also, checkpoints need to rename directories, which
# gcsfuse does only with --rename-dir-limit or a hierarchical namespace.
#
# After a stop (exit 75) or the loss of a host the run continues. After a user's mistake (200) on
# any host it does not.
# shellcheck disable=SC2016 # the hosts expand what is in single quotes
set -u
if [ $# -lt 3 ]; then
  echo "launch/tpu_pod.sh NAME ZONE --config=... --workdir=..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2
line="cd rmjax && rm -f .mistake && "
line+=".venv/bin/python -m rmjax.main --distributed $(printf '%q ' "$@")"
line+='; code=$?; [ $code -ne 200 ] || touch .mistake; exit $code'
# Every host waits up to five minutes for a run that is still saving, then reports whether it made a
# mistake. The pattern [r]mjax does not match this command itself.
clean='for i in $(seq 60); do pkill -f "[r]mjax.main --distributed" || break; sleep 5; done'
clean+='; pkill -9 -f "[r]mjax.main --distributed"; [ ! -e rmjax/.mistake ] || exit 200'
on_every_host() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}
for ((restarts = 0; restarts <= ${RMJAX_RESTARTS:-100}; restarts++)); do
  on_every_host "$line"
  code=$?
  # 255: ssh lost a host, for instance in maintenance. It comes back; the others end by themselves.
  case $code in 75 | 255 | 12[89] | 1[3-9]?) ;; *) break ;; esac
  on_every_host "$clean"
  [ $? -ne 200 ] || { code=200; break; }
done
exit "$code"
