#!/usr/bin/env bash
# One machine, one process, all of its devices: launch/local.sh --config=quickstart --workdir=runs/x
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
  PYTHON="$root/.venv/bin/python"
  [ -x "$PYTHON" ] || PYTHON=python
fi
exec "$PYTHON" -m protojax.main "$@"
