#!/usr/bin/env bash
# Run the kernel tests under a sanitizer: sanitize.sh asan|ubsan [arguments for pytest]
#
# asan finds reads and writes outside of memory and after its end; ubsan finds overflows, bad shifts, misaligned and null
# pointers. The first error ends the run with its stack. Takes some ten times as long as the plain tests. Variables: see
# build.sh.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kind=${1:?usage: sanitize.sh asan|ubsan [arguments for pytest]}
shift
python=${PYTHON:-$here/../.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)

export PYTHONPATH
PYTHONPATH=$("$here/build.sh" "$kind")
case $kind in
  asan)
    # Python is not built with it: the library has to be there first. What Python leaves behind at its end is no leak of ours.
    export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)"
    export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1
    ;;
  ubsan) export UBSAN_OPTIONS=print_stacktrace=1 ;;
esac
exec "$python" -m pytest -q -p no:cacheprovider "$here/test" "$@"
