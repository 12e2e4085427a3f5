#!/usr/bin/env bash
# run.sh SCENARIO [ARGUMENTS]: molecule test; its last lines name what failed, which otherwise stands far above the
# output of the hosts' removal, out of sight of whoever sees only a log's end.
set -uo pipefail
cd "$(dirname "$0")/../.."
scenario=$1
shift
log=.berth/lab/molecule-$scenario.log
mkdir -p "$(dirname "$log")"
PATH="$PWD/.venv/bin:$PATH" molecule test --scenario-name "$scenario" "$@" 2>&1 | tee "$log" && exit 0
echo "molecule: what failed in scenario $scenario (its whole output: $log)"
sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E '^(FAILED|ERROR) |^E  |fatal: |UNREACHABLE!|^CRITICAL' | cut -c 1-400 | tail -n 20
exit 1
