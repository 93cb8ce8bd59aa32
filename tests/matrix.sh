#!/usr/bin/env bash
# Runs the whole test suite in one fresh environment after another; each row is one line of the table in docs/matrix.md.
#
#   tests/matrix.sh [--keep] [--list] [--cuda] [--table FILE] [--dir DIR] [ROW...]
#
#   ROW      names from the list below; none: all of them
#   --keep   leaves the environments in DIR
#   --list   shows the rows and exits
#   --table  appends the lines to FILE, too
#   --dir    where environments and logs go (default: a new temporary folder); each environment takes 1 to 8 GB
#
# A row without its interpreter (python3.X on PATH, or one of pyenv's), or whose versions do not install, says so and the
# next one begins. CPU wheels of torch come from TORCH_INDEX (default: PyTorch's own). Where that has none, pip's index is
# asked for the wheel alone: one that was built for CUDA does not import without gigabytes of NVIDIA's libraries, which are
# installed only with --cuda. The exit code is 1 if a suite failed.
set -uo pipefail

# row            python torch   fuxictr numpy   pandas  polars
# "-": whatever pip chooses, the newest that fits; "min": setup.py's lower bound (of the other packages, too, if polars' is)
ROWS="
py310-lowest     3.10   2.8.0   2.3.9   min     2.*     min
py310-newest     3.10   -       2.3.10  -       -       -
py311-torch2.8   3.11   2.8.0   2.3.10  2.*     2.*     -
py311-torch2.10  3.11   2.10.*  2.3.9   2.*     3.*     -
py311-lowest     3.11   2.13.*  2.3.9   min     2.*     min
py311-fuxictr239 3.11   2.13.*  2.3.9   2.*     3.*     -
py311-pandas2    3.11   2.13.*  2.3.10  1.26.*  2.*     -
py311-pandas3    3.11   2.13.*  2.3.10  2.*     3.*     -
py311-newest     3.11   -       2.3.10  -       -       -
py312-fuxictr239 3.12   -       2.3.9   -       2.*     -
py312-newest     3.12   -       2.3.10  -       -       -
py313-newest     3.13   -       2.3.10  -       -       -
"
HEADER="| row | python | torch | fuxictr | numpy | pandas | polars | passed | skipped | failed | minutes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
export PIP_DISABLE_PIP_VERSION_CHECK=1

keep= cuda= table= folder= wanted=()
while [ $# -gt 0 ]; do
    case $1 in
        --keep) keep=1 ;;
        --cuda) cuda=1 ;;
        --list) printf '%s' "$ROWS"; exit 0 ;;
        --table) table=${2:?--table needs a file}; shift ;;
        --dir) folder=${2:?--dir needs a folder}; shift ;;
        -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
        *) wanted+=("$1") ;;
    esac
    shift
done
for row in ${wanted[@]+"${wanted[@]}"}; do
    grep -q "^$row " <<<"$ROWS" || { echo "no row $row; rows: $(awk 'NF {printf "%s ", $1}' <<<"$ROWS")" >&2; exit 2; }
done

folder=${folder:-$(mktemp -d)}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)

interpreter() { # 3.X: its path, or nothing
    local found
    for found in "$(command -v "python$1")" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1."*/bin/python; do
        # pyenv's shims exist for versions that are not active, and fail
        [ -x "$found" ] && "$found" -c "import sys; assert sys.version.startswith('$1.')" 2>/dev/null || continue
        echo "$found" && return
    done
}

report() {
    echo "$1"
    [ -z "$table" ] || echo "$1" >>"$table"
}

lower_bounds() { # of setup.py's requirements, as pins
    sed -nE 's/^ +"([a-z0-9-]+)>=([0-9.]+)[^"]*",$/\1==\2/p' "$root/setup.py" | grep -vE '^(torch|fuxictr)='
}

install() { # row python torch fuxictr numpy pandas polars: into $environment, 1 if that failed
    local pip="$environment/bin/python -m pip" constraints="$folder/$1.constraints" package version
    "$2" -m venv "$environment" && $pip install -q --upgrade pip setuptools wheel || return 1
    : >"$constraints"
    for package in "torch $3" "fuxictr $4" "numpy $5" "pandas $6" "polars $7"; do
        version=${package#* }
        case $version in
            -) ;;
            min) lower_bounds | grep "^${package% *}=" >>"$constraints" ;;
            *) echo "${package% *}==$version" >>"$constraints" ;;
        esac
    done
    [ "$7" != min ] || lower_bounds | grep -vE '^(numpy|polars)=' >>"$constraints"
    local torch=torch
    [ "$3" = - ] || torch="torch==$3"
    if [ -z "$TORCH_INDEX" ] || ! $pip install -q --no-cache-dir --retries 0 "$torch" --index-url "$TORCH_INDEX"; then
        if [ -z "$cuda" ]; then
            $pip install -q --no-cache-dir --no-deps "$torch" || return 1
            $pip install -q -c "$constraints" numpy filelock fsspec jinja2 networkx sympy typing-extensions || return 1
            "$environment/bin/python" -c 'import torch' || return 1
        fi
    fi
    $pip install -q -c "$constraints" -e "$tree[dev,plots]"
}

versions() { # python and the packages of the table, separated by bars
    "$environment/bin/python" - <<'PYTHON'
import platform
from importlib.metadata import version
print(" | ".join([platform.python_version(), *map(version, ("torch", "fuxictr", "numpy", "pandas", "polars"))]))
PYTHON
}

counted() { # word, pytest's last line: the number before the word, or 0
    grep -oE "[0-9]+ $1" <<<"$2" | grep -oE '[0-9]+' || echo 0
}

failures=0
[ -n "$table" ] && [ -s "$table" ] || report "$HEADER"
while read -r row python torch fuxictr numpy pandas polars; do
    [ -n "$row" ] || continue
    [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " == *" $row "* ]] || continue
    asked="$python | $torch | $fuxictr | $numpy | $pandas | $polars"
    executable=$(interpreter "$python")
    if [ -z "$executable" ]; then
        report "| $row | $asked | not run: no python$python | | | |"
        continue
    fi
    environment="$folder/$row" tree="$folder/$row.tree"
    mkdir -p "$tree" # a copy, so that edits meanwhile do not reach the suite
    (cd "$root" && git ls-files -coz --exclude-standard | while IFS= read -r -d '' file; do
        [ -f "$file" ] && printf '%s\0' "$file"; done | xargs -0 cp --parents -t "$tree")
    if install "$row" "$executable" "$torch" "$fuxictr" "$numpy" "$pandas" "$polars" >"$folder/$row.install.log" 2>&1; then
        started=$SECONDS
        (cd "$tree" && OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -q >"$folder/$row.log" 2>&1)
        last=$(tail -n 1 "$folder/$row.log")
        passed=$(counted passed "$last")
        failed=$(($(counted failed "$last") + $(counted 'errors?' "$last")))
        minutes=$(((SECONDS - started + 30) / 60))
        report "| $row | $(versions) | $passed | $(counted skipped "$last") | $failed | $minutes |"
        [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ] || { failures=1; echo "  see $folder/$row.log"; }
    else
        reason=$(grep -i 'error' "$folder/$row.install.log" | tail -n 1 | cut -c 1-100 | tr '|' '/')
        report "| $row | $asked | not installed: ${reason:-see $folder/$row.install.log} | | | |"
    fi
    rm -rf "$tree"
    [ -n "$keep" ] || rm -rf "$environment"
done <<<"$ROWS"
exit $failures
