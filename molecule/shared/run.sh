#!/usr/bin/env bash
# run.sh SCENARIO [ARGUMENTS]: molecule test; its last lines name what failed, which otherwise stands far above the
# output of the hosts' removal, out of sight of whoever sees only a log's end.
set -uo pipefail
cd "$(dirname "$0")/../.."
scenario=$1
shift
log=.berth/lab/molecule-$scenario.log
mkdir -p "$(dirname "$log")"
# Wide enough that no line is broken in two.
COLUMNS=220 PATH="$PWD/.venv/bin:$PATH" molecule test --scenario-name "$scenario" "$@" 2>&1 | tee "$log" && exit 0
echo "molecule: what failed in scenario $scenario (its whole output: $log)"
plain() { sed 's/\x1b\[[0-9;]*m//g; s/^ *│ //' "$log" | cut -c 1-400; }
plain | grep -E '^E  |fatal: |UNREACHABLE!' | tail -n 15
plain | grep -E '^(FAILED|ERROR) [^ ]*::'
exit 1
