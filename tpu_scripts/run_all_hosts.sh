#!/usr/bin/env bash
# Runs one command on every host of a TPU VM pod at the same time, as multi-host JAX requires.
#
#   tpu_scripts/run_all_hosts.sh TPU_NAME COMMAND
#
# COMMAND is one argument, run by the shell of each host. To set up a pod and load a model on it:
#
#   run_all_hosts.sh my-pod 'git clone URL mtj_loader && mtj_loader/tpu_scripts/setup_vm.sh'
#   run_all_hosts.sh my-pod '~/mtj-loader-venv/bin/mtj-loader load PATH --mesh mp=8'
#
# Environment:
#   ZONE    the pod's zone; default: the zone in `gcloud config`
#
# gcloud needs the key in an ssh agent first: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

if [[ $# -ne 2 ]]; then
  echo "usage: run_all_hosts.sh TPU_NAME COMMAND" >&2
  exit 2
fi

exec gcloud compute tpus tpu-vm ssh "$1" ${ZONE:+--zone="$ZONE"} --worker=all --command="$2"
