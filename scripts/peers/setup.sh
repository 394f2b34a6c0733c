#!/usr/bin/env bash
# Makes the virtual environment of the peers, of some gigabytes.
#
#     scripts/peers/setup.sh [FOLDER]          target/peers-venv where none is given
#
# Needs Python 3.10 or newer with venv, and g++ for torch.compile on a CPU. Done already, it does nothing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/../../target/peers-venv}
if cmp -s "$here/requirements.txt" "$folder/installed.txt"; then exit 0; fi
python3 -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
cp "$here/requirements.txt" "$folder/installed.txt"
