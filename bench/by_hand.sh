#!/usr/bin/env bash
# What a person types who has no Berth: the same packages, nodes and apps on the same hosts, all hosts side by side.
# by_hand.sh WORK_DIR SSH_CONFIG HEAD_ADDRESS HOST=ADDRESS=PROFILE...   (WORK_DIR: wheels, Berth's wheel, serve.json)
set -euo pipefail
work=$1 config=$2 head=$3
shift 3
run() { ssh -F "$config" "$1" sudo bash -euo pipefail -s; }

install() {
    scp -q -F "$config" "$work"/*.tar "$work"/berth-*.whl "$1:/tmp/"
    run "$1" <<'EOF'
mkdir -p /opt/hand/wheels
for tar in /tmp/*.tar; do tar -xf "$tar" -C /opt/hand/wheels; done
python3 -m venv /opt/hand/env
/opt/hand/env/bin/pip install -q --no-index --find-links /opt/hand/wheels --no-deps -r /opt/hand/wheels/lock.txt
/opt/hand/env/bin/pip install -q --no-index --no-deps /tmp/berth-*.whl
EOF
}

gpu_host() {
    local host=$1 address=$2 profile=$3
    install "$host"
    run "$host" <<EOF
cd /opt/hand
eval "\$(env/bin/python -m berth.gpu.sim install --dir /opt/hand/sim --profile $profile --seed \$(hostname))"
n=0
for uuid in \$(env/bin/python -m berth.gpu.sim show --dir /opt/hand/sim --json | grep -o 'GPU-[0-9a-f-]*' | sort -u); do
    index=\$(env/bin/python -m berth.gpu.sim show --dir /opt/hand/sim | awk -v u="\$uuid" '\$2 == u {print \$1}')
    # Until the head answers, as a person would try again.
    until CUDA_VISIBLE_DEVICES=\$index BERTH_CLUSTER=hand BERTH_SLOT=\$(hostname)-\$index env/bin/ray start --address=$head:6390 \\
        --node-ip-address=$address --temp-dir=/tmp/ray-\$index --dashboard-agent-listen-port=\$((52700 + index)) \\
        --metrics-export-port=\$((8500 + index)) --num-cpus=2 --num-gpus=1 --memory=2147483648 \\
        --object-store-memory=83886080 --disable-usage-stats --resources='{"VRAM_MB": 100000}' \\
        --labels="{\"berth.slot\": \"\$(hostname)-\$index\", \"berth.role\": \"slot\"}" >/tmp/ray-start-\$index.log 2>&1; do
        sleep 2
    done
    n=\$((n + 1))
done
EOF
}

head_host() {
    install head01
    run head01 <<EOF
/opt/hand/env/bin/ray start --head --port=6390 --node-ip-address=$head --dashboard-port=8275 --num-cpus=0 \\
    --memory=2147483648 --object-store-memory=83886080 --disable-usage-stats --ray-client-server-port=20190 >/tmp/ray-start.log 2>&1
EOF
}

pids=()
head_host & pids+=($!)
for host in "$@"; do
    IFS='=' read -r name address profile <<<"$host"
    gpu_host "$name" "$address" "$profile" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done

run head01 <<EOF
curl -sS --fail -X PUT -H 'Content-Type: application/json' -d '$(cat "$work/serve.json")' http://127.0.0.1:8275/api/serve/applications/
until curl -sS http://127.0.0.1:8275/api/serve/applications/ | /opt/hand/env/bin/python -c '
import json, sys
apps = json.load(sys.stdin)["applications"].values()
sys.exit(not apps or any(app["status"] != "RUNNING" for app in apps))'; do sleep 1; done
EOF
