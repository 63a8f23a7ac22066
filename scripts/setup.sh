#!/bin/sh
# Make the virtual environment $VENV with tinier and its tools in it.
# torch comes first and is pinned, so that nothing pulls a second one (a plain `pip install` of a
# package that needs torch can fetch gigabytes of CUDA); a torch that $PYTHON has already is kept.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=torch==2.13.0

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "$PYTHON is $("$PYTHON" -V 2>&1); tinier needs Python 3.11 to 3.13. Type: make PYTHON=python3.12" >&2
    exit 2
}

# Debian and Ubuntu split venv off their python3
if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    packages="python$version-venv"
    if [ "$(id -u)" = 0 ]; then
        apt-get update -q && apt-get install -qy "$packages"
    else
        echo "$PYTHON cannot make virtual environments. Type: sudo apt-get install $packages" >&2
        exit 2
    fi
fi

site=""
# not where $PYTHON is itself that of a virtual environment, whose packages a new one does not see
if "$PYTHON" -c 'import sys, torch; sys.exit(sys.prefix != sys.base_prefix)' 2>/dev/null; then
    site=--system-site-packages
fi
"$PYTHON" -m venv $site "$VENV"
pip="$VENV/bin/python -m pip --disable-pip-version-check"
if [ -z "$site" ]; then $pip install -q "$TORCH"; fi

# hold torch at what is there now
installed=$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
echo "torch==$installed" > "$constraints"
$pip install -q -c "$constraints" -c constraints.txt -e '.[dev]'
if ! command -v g++ > /dev/null && ! command -v clang++ > /dev/null; then
    echo "no C++ compiler: on a CPU the engine runs step by step, slower. Type: sudo apt-get install g++"
fi
echo "ready: $VENV with torch $installed"
