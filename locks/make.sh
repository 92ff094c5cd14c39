#!/bin/sh
# Makes the locks again from pyproject.toml. Needs uv (`pip install uv`).
# Pins that still fit are kept. `sh locks/make.sh --upgrade` takes the newest versions.
set -eu
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# compile OUTPUT EXTRA [OPTION…]: pins what the project needs with these extras into OUTPUT.
compile() {
    output=$1 && shift
    uv pip compile pyproject.toml --override "$scratch/left-out" --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --no-annotate --custom-compile-command "sh locks/make.sh" --quiet \
        --output-file "$output" "$@" >/dev/null
}

for lock in cpu gpu; do
    left_out="torch sentence-transformers" # README.md in this folder says why
    if [ "$lock" = cpu ]; then left_out="$left_out fbgemm-gpu"; fi
    for name in $left_out; do echo "$name ; python_version < '0'"; done > "$scratch/left-out" # never true
    # Everything is resolved at once, so that what runs and what checks it agree, and then divided.
    cat "locks/$lock.txt" locks/dev.txt > "$scratch/$lock.txt"
    compile "$scratch/$lock.txt" --extra dev --extra search --extra "$lock" "$@"
    rm "locks/$lock.txt"
    compile "locks/$lock.txt" --extra search --extra "$lock" --constraint "$scratch/$lock.txt"
done
{ sed -n '/^#/p' locks/cpu.txt; grep -vxFf locks/cpu.txt "$scratch/cpu.txt"; } > "$scratch/dev.txt"
mv "$scratch/dev.txt" locks/dev.txt
