#!/usr/bin/env bash
# Creates a virtual environment on one TPU VM host and installs mtj_loader with JAX for TPU in it.
#
#   tpu_scripts/setup_vm.sh
#
# Run it on every host of a pod (with run_all_hosts.sh), and again after an update.
#
# Environment:
#   PYTHON  the interpreter, 3.11 or newer; default python3
#   VENV    path of the environment; default ~/mtj-loader-venv
set -euo pipefail

python=${PYTHON:-python3}
venv=${VENV:-$HOME/mtj-loader-venv}
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup_vm.sh: $python is $("$python" --version); set PYTHON to 3.11 or newer" >&2
  exit 1
fi

"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install --quiet "${checkout}[tpu,remote]"

# This does not use the devices: on a pod, JAX would wait for all other hosts.
"$venv/bin/mtj-loader" --version
echo "ready: $venv/bin/mtj-loader"
