#!/usr/bin/env bash
# lanes.sh "TARGET TARGET..." "TARGET..." ...: lanes side by side, each a list of make's targets one after the other.
# Each line has its target's name before it. The last lines say how long each target took and, again, what failed: it
# otherwise stands far above, among the lines of the others. A target that fails does not keep the next from running.
set -uo pipefail
# A process group for each lane, so that Ctrl-C reaches them (a shell's background jobs ignore it) and they clean up.
set -m
cd "$(dirname "$0")/.."
logs=.berth/log
mkdir -p "$logs"
run() {
    local start=$SECONDS code
    # Written as a file and shown from there, so that a lane's end does not hang on who else holds the pipe.
    "${MAKE:-make}" --no-print-directory "$1" >"$logs/$1.log" 2>&1 </dev/null
    code=$?
    echo "$code $((SECONDS - start))" >"$logs/$1.end"
}
show() {
    tail --follow --lines=+1 --sleep-interval=0.5 --pid="$1" "$logs/$2.log" 2>/dev/null | sed -u "s/^/$2: /"
}
lane() {
    local target
    for target in "$@"; do
        run "$target" &
        show $! "$target"
        wait $!
    done
}
# shellcheck disable=SC2048  # split on purpose: a lane is one word
for target in $*; do
    rm -f "$logs/$target.end"
    : >"$logs/$target.log"
done
pids=()
for targets in "$@"; do
    # shellcheck disable=SC2086
    (set +m && lane $targets) &
    pids+=($!)
done
stopped=
trap 'stopped=1; for pid in "${pids[@]}"; do kill -INT -- "-$pid" 2>/dev/null; done' INT TERM
until wait; do :; done
# A lane that was stopped ends before what it started has cleaned up.
for pid in "${pids[@]}"; do
    while kill -0 -- "-$pid" 2>/dev/null; do sleep 0.2; done
done
failed=$stopped
# shellcheck disable=SC2048
for target in $*; do
    { read -r code seconds <"$logs/$target.end"; } 2>/dev/null || code=1 seconds=0
    said=passed
    [ "$code" = 0 ] || failed=1 said="FAILED, its whole output: $logs/$target.log"
    printf 'berth: %-12s %3d:%02d  %s\n' "$target" $((seconds / 60)) $((seconds % 60)) "$said"
    # The first of it, each line once: one cluster that does not start fails all of its tests.
    [ "$code" = 0 ] || sed 's/\x1b\[[0-9;]*m//g' "$logs/$target.log" |
        grep -E -A 4 '^(FAILED|ERROR|E  )|fatal: |^make.*Error|: error:' | cut -c 1-160 | awk 'NF && !seen[$0]++' | head -n 14
done
exit "${failed:-0}"
