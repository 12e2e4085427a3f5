#!/usr/bin/env bash
# Two models packed on one real GPU, under full load: what was predicted, what the driver showed, how fast, how soon up.
#   bench/gpu.sh WHEELS [--results DIR] [--simulated]
# WHEELS: a folder with the wheels of requirements/*.txt and of runtime-gpu.txt ("-": the index that pip is configured
# for). Writes DIR/gpu.json (.berth/bench-gpu). Where there is no GPU it says so there and ends with 0. --simulated
# tries all but the speed on simulated GPUs, with tiny models, and marks what it writes.
set -euo pipefail
cd "$(dirname "$0")/.."

results=.berth/bench-gpu simulated=false wheels=
while [ $# -gt 0 ]; do
    case $1 in
        --results) results=${2:?--results needs a folder}; shift ;;
        --simulated) simulated=true ;;
        *) wheels=$1 ;;
    esac
    shift
done
mkdir -p "$results"

skip() {
    printf '{"command": "bench/gpu.sh", "ok": true, "skipped": true, "simulated": false, "reason": "%s"}\n' "$1" \
        | tee "$results/gpu.json"
    exit 0
}

python=${PYTHON:-python3}
if [ "$simulated" = false ]; then
    [ -e /proc/driver/nvidia/version ] || skip "no NVIDIA driver is loaded: /proc/driver/nvidia/version is not there"
    # The lock of the GPU runtime is for this Python alone.
    python=${PYTHON:-python3.12}
    command -v "$python" >/dev/null || skip "there is no $python, which roles/ray_runtime/files/runtime-gpu.txt is for"
fi
if [ -z "$wheels" ] || { [ "$wheels" != - ] && [ ! -d "$wheels" ]; }; then
    echo "bench/gpu.sh: no folder of wheels; found: '${wheels}'; allowed: a folder, or - for pip's own index" >&2
    exit 2
fi
if [ "$wheels" != - ]; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=$(realpath "$wheels")
fi
make --no-print-directory setup PYTHON="$python"
exec .venv/bin/python -m bench.bench_gpu --results "$results" $([ "$simulated" = true ] && echo --simulated)
