#!/bin/sh
# Makes locks/cpu.txt and locks/gpu.txt again from pyproject.toml. Needs uv (`pip install uv`).
# Pins that still fit are kept. `sh locks/make.sh --upgrade` takes the newest versions.
set -eu
cd "$(dirname "$0")/.."
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
for lock in cpu gpu; do
    left_out="torch sentence-transformers" # README.md in this folder says why
    if [ "$lock" = cpu ]; then left_out="$left_out fbgemm-gpu"; fi
    for name in $left_out; do echo "$name ; python_version < '0'"; done > "$overrides" # a marker that is never true
    uv pip compile pyproject.toml --extra dev --extra "$lock" --override "$overrides" \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --no-annotate --custom-compile-command "sh locks/make.sh" --quiet --output-file "locks/$lock.txt" "$@"
done
