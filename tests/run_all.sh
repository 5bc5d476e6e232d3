#!/usr/bin/env bash
# The full tier on Python 3.11 and 3.12: a fresh environment for each, all tests, parity against PyTorch on 3.11.
# PYTHON311 and PYTHON312 name the interpreters when they are not on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
find_python() {
  for candidate in "${2:-}" "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
    if [ -n "$candidate" ] && "$candidate" -c "import sys; sys.exit(sys.version_info[:2] != tuple(map(int, '$1'.split('.'))))" 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  echo "Python $1 was not found; install it or set PYTHON${1/./}=/path/to/python$1" >&2
  exit 1
}
began=$(date +%s)
failed=""
for version in 3.11 3.12; do
  variable="PYTHON${version/./}"
  python=$(find_python "$version" "${!variable:-}")
  venv=".venv-$version"
  extras=test
  if [ "$version" = 3.11 ]; then extras=test,parity; fi
  [ -f "$venv/.installed" ] && [ "$venv/.installed" -nt pyproject.toml ] || {
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    if [ "$version" = 3.11 ]; then "$venv/bin/python" -m pip install --quiet torch==2.13.0; fi
    "$venv/bin/python" -m pip install --quiet --editable ".[$extras]"
    touch "$venv/.installed"
  }
  marks=""
  if [ "$version" != 3.11 ]; then marks="not parity"; fi
  "$venv/bin/python" --version
  PROTOJAX_TEST_COMPILE=full PROTOJAX_TEST_CACHE=".cache/jax-$version" "$venv/bin/python" -m pytest -q -n "${WORKERS:-2}" --dist=worksteal -m "$marks" ||
    failed="$failed $version"  # the other Python is tested all the same
done
echo "test-all: $(( $(date +%s) - began )) s on $(nproc) cores"
[ -z "$failed" ] || { echo "test-all failed on Python$failed" >&2; exit 1; }
