#!/usr/bin/env bash
# Several processes of one run on this machine (to try things out): launch/processes.sh 2 --config=quickstart:smoke --workdir=runs/x
set -euo pipefail
count="$1"; shift
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
port="${PORT:-$((20000 + RANDOM % 20000))}"
pids=()
for ((i = 0; i < count; i++)); do
  "$here/local.sh" "$@" --config.system.coordinator="127.0.0.1:$port" --config.system.processes="$count" --config.system.process="$i" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
