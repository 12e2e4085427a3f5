#!/usr/bin/env bash
# Make .venv as the locks say, and Berth's wheel; nothing when both are up to date. Called by make.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Berth needs Python 3.11 or newer; found: $("$python" --version 2>&1); mend: make PYTHON=/path/to/python3.12 ..." >&2
    exit 2
}

mkdir -p .berth
# Two at once: the second waits, then finds everything done. The kernel drops the lock with the process.
exec 9>.berth/setup.lock
flock 9

# The checkout's path is part of the stamp: a virtual environment does not survive being moved.
stamp="$(cat requirements/*.txt pyproject.toml | sha1sum | cut -c1-40) $PWD $("$python" --version)"
if [ "$(cat .venv/.berth-stamp 2>/dev/null)" != "$stamp" ]; then
    echo "berth: installing the controller's environment into .venv (a minute)"
    "$python" -m venv --clear .venv
    # Python compiles what is imported when it is; pip would compile all of it.
    .venv/bin/pip install -qq --disable-pip-version-check --no-compile --no-deps \
        -r requirements/controller.txt -r requirements/dev.txt
    .venv/bin/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
    echo "$stamp" >.venv/.berth-stamp
fi

sources=$(find berth pyproject.toml -type f -not -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha1sum | sha1sum)
if [ "$(cat .berth/dist/.sources 2>/dev/null)" != "$sources" ]; then
    rm -rf .berth/dist
    # A fixed time makes the wheel's bytes depend on its sources alone.
    SOURCE_DATE_EPOCH=1700000000 .venv/bin/pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation \
        --wheel-dir .berth/dist .
    rm -rf build
    echo "$sources" >.berth/dist/.sources
fi
# Newer than every source that it was made from: preflight looks at that.
touch .berth/dist/.sources
