#!/usr/bin/env bash
# Build the extension in place, incrementally: build.sh [release|asan|ubsan]
#
# The module lands in python/sgl_kernel (release) or build/NAME/python/sgl_kernel (the others); the last line printed is
# the folder for PYTHONPATH.
#   PYTHON   interpreter with nanobind (default: the .venv beside this package, else python3)
#   ONLY     "gemm convert": build only these op groups, into build/only-gemm-convert/python
#   JOBS     compile jobs (default 2)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kind=${1:-release}
python=${PYTHON:-$here/../.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)

case $kind in
  release) sanitize="" ;;
  asan) sanitize=address ;;
  ubsan) sanitize=undefined ;;
  *) echo "usage: build.sh [release|asan|ubsan]" >&2; exit 2 ;;
esac

name=$kind
[[ -n ${ONLY:-} ]] && name=$kind-only-${ONLY// /-}
only=${ONLY:-}
only=${only// /;}
build=$here/build/$name
mkdir -p "$build"
exec 9>"$build/.lock"
flock 9  # two builds in one folder would break each other

generator=()
command -v ninja >/dev/null && generator=(-G Ninja)
[[ -f $build/CMakeCache.txt ]] || cmake -S "$here" -B "$build" "${generator[@]}" -DPython_EXECUTABLE="$python" \
  -DML_SANITIZE="$sanitize" -DML_ONLY="${only}" >"$build/configure.log" || { cat "$build/configure.log"; exit 1; }
cmake --build "$build" -j "${JOBS:-2}" >"$build/build.log" || { grep -vE '^\[[0-9]+/[0-9]+\] (Building|Linking)' "$build/build.log"; exit 1; }

package=$here/python/sgl_kernel
if [[ $name != release ]]; then
  package=$build/python/sgl_kernel
  mkdir -p "$package"
  ln -sf "$here"/python/sgl_kernel/*.py "$package/"
fi
module=$(cd "$build" && echo _C*.so)
# A rename, not an overwrite: running processes keep the file they mapped.
cp "$build/$module" "$package/.$module.new"
mv "$package/.$module.new" "$package/$module"
dirname "$package"
