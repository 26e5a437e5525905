#!/usr/bin/env bash
# Load a drop-in strictly with transformers 4.57 and with 5.x, each in a virtual environment of its own.
#   scripts/check_versions.sh DROP_IN_FOLDER [PIPELINE_FOLDER]
# Fails when what they print (token ids, the encoder's output, the picture) differs.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for versions in "transformers==4.57.* diffusers==0.35.*" "transformers==5.23.* diffusers==0.42.*"; do
    python3 -m venv "$work/venv"
    # shellcheck disable=SC2086 - two requirements
    "$work/venv/bin/pip" install -q torch==2.13.0 accelerate pillow $versions
    # The first line names the versions before the colon.
    "$work/venv/bin/python" "$here/check_loading.py" "$@" | tee "$work/all" >&2
    sed 's/^transformers .*: ids/ids/' "$work/all" > "$work/${versions//[^0-9]/}"
    rm -rf "$work/venv" "$work/all"
done
diff "$work"/* && echo "both agree"
