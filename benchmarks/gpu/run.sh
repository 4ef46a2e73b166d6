#!/usr/bin/env bash
# The whole GPU check, in one command: benchmarks/gpu/run.sh [OPTIONS OF run.py]
#
# Where benchmarks/gpu/pack.sh's folder lies (build/gpu-wheels, or $MARL_PARTS) what it brought is installed first, and this checkout;
# otherwise the Python that `python3` (or $PYTHON) names must have marl. Results go to $OUT, or to build/gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
exports=$(PYTHON=$PYTHON benchmarks/gpu/install.sh "${MARL_PARTS:-build/gpu-wheels}" "${MARL_SITE:-/tmp/marl-gpu-site}")
eval "$exports"
exec "$PYTHON" benchmarks/gpu/run.py ${OUT:+--out "$OUT"} "$@"
