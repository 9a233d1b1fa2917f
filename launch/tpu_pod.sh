#!/usr/bin/env bash
# The main line on every host of a TPU pod slice; the hosts find each other by themselves:
#
#     launch/tpu_pod.sh my-pod us-central2-b --config=configs/xlong.py --workdir=/mnt/runs/xlong
#
# ~/rmjax on every host is this repository with its .venv (pip install -e '.[tpu]'), and --workdir a directory that all
# of them see: Filestore, or a bucket under gcsfuse. Where the run was stopped (exit 75) or a host was lost, it goes on.
set -u
if [ $# -lt 3 ]; then
  echo "launch/tpu_pod.sh NAME ZONE --config=... --workdir=..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2
line="cd rmjax && exec .venv/bin/python -m rmjax.main --distributed $(printf '%q ' "$@")"
for ((restarts = 0; restarts <= ${RMJAX_RESTARTS:-100}; restarts++)); do
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$line"
  code=$?
  # 255: ssh lost a host, maintenance for instance; it comes back, and the others have ended by themselves.
  if [ "$code" -ne 75 ] && [ "$code" -ne 255 ] && [ "$code" -le 128 ]; then break; fi
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="pkill -f rmjax.main; sleep 60" || sleep 60
done
exit "$code"
