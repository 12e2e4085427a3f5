#!/usr/bin/env bash
# Make the image $1 of a lab host: from Debian's image where a registry answers, from Debian's packages elsewhere.
set -euo pipefail
cd "$(dirname "$0")"
image=$1
base=${BASE:-debian:bookworm-20251103-slim}

if timeout 60 docker pull --quiet "$base" >/dev/null 2>&1; then
    docker build --quiet --build-arg "BASE=$base" --tag "$image" .
    exit
fi
command -v mmdebstrap >/dev/null || {
    echo "no registry gives $base, and mmdebstrap is not installed; mend: apt-get install mmdebstrap (as root)" >&2
    exit 2
}
root=$(mktemp --directory)
trap 'rm -rf "$root"' EXIT
mmdebstrap --quiet --variant=minbase --include="$(paste -sd, packages.txt)" \
    --customize-hook="sh $PWD/setup.sh \"\$1\"" bookworm "$root/root.tar"
docker import --change 'CMD ["/lib/systemd/systemd"]' "$root/root.tar" "$image"
