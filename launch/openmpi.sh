#!/usr/bin/env bash
# Open MPI, one process a host: HOSTS=a,b launch/openmpi.sh --config=inat --workdir=/shared/run (one device a process: HOSTS=a:8,b:8)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
first="${HOSTS:?hosts, the first is the coordinator}"; first="${first%%[,:]*}"
exec mpirun --host "$HOSTS" -x PROTOJAX_COORDINATOR="$first:8476" "$here/local.sh" "$@"
