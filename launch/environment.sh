# Set up the Python environment for all commands of this repository. Source this file from scripts
# that use set -e, then run "$PYTHON"; it exits on errors. (In an interactive shell, use
# source .venv/bin/activate instead.)
#
# It creates .venv in the repository root and installs the pinned packages of requirements.txt and
# this package with its C++ extension. It reuses whatever exists and is unchanged.
#   MOT_PYTHON=/path/to/python   use this interpreter with the packages it has, and install nothing
#                                (for a machine with its own torch and no package index)
#   CXX=/path/to/compiler        C++17 compiler; default: c++

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

_stop() {
    printf 'error: %s\n' "$1" >&2
    shift
    [ "$#" -eq 0 ] || printf '%s\n' "$@" >&2
    exit 2
}

_say() {
    printf '[environment] %s\n' "$*"
}

_is_recent_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

# Hash the given files and folders (relative to ROOT) together with standard input.
_fingerprint() {
    {
        cat
        cd "$ROOT" && find "$@" -type f ! -name '*.so' -print0 | LC_ALL=C sort -z | xargs -0 cat
    } | sha256sum | cut -d ' ' -f 1
}

_find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13; do
        if _is_recent_python "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    _stop "no Python 3.11 to 3.13 found (looked for python3, python3.11, python3.12, python3.13);" \
        "  install one, for example: apt-get install python3.11 python3.11-venv python3.11-dev"
}

# $1: the interpreter that the extension is built for.
_check_compiler() {
    local include
    command -v "${CXX:-c++}" >/dev/null ||
        _stop "no C++ compiler: '${CXX:-c++}' is not a command;" \
            "  install one (apt-get install g++) or name it: CXX=/path/to/compiler"
    include="$("$1" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')"
    [ -f "$include/Python.h" ] ||
        _stop "Python's headers are missing: no $include/Python.h;" \
            "  install them, for example: apt-get install python3-dev"
}

_make_venv() {
    local base
    # Check pip too: an interrupted venv has only a python.
    if _is_recent_python "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    base="$(_find_python)"
    _check_compiler "$base"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        _stop "$base has no venv module;" "  install it, for example: apt-get install python3-venv"
    _say "creating .venv with $("$base" --version) ($base)"
    rm -rf "$VENV"
    "$base" -m venv "$VENV"
}

_install_requirements() {
    local stamp="$VENV/.requirements-stamp" wanted
    wanted="$("$PYTHON" --version | _fingerprint requirements.txt)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    rm -f "$stamp"
    _say "installing the packages of requirements.txt (takes minutes the first time)"
    # Install torch first, because DeepSpeed's build imports it. Whether this is the CPU or the CUDA
    # build depends on the package index.
    "$PYTHON" -m pip install --disable-pip-version-check \
        "$(grep '^setuptools==' "$ROOT/requirements.txt")" "$(grep '^torch==' "$ROOT/requirements.txt")" ||
        _stop "pip could not install torch; see its messages above"
    "$PYTHON" -m pip install --disable-pip-version-check --no-build-isolation \
        --requirement "$ROOT/requirements.txt" ||
        _stop "pip could not install requirements.txt; see its messages above"
    printf '%s\n' "$wanted" >"$stamp"
}

# $1: the stamp file; the rest: the build command.
_build_when_changed() {
    local stamp="$1" wanted
    shift
    wanted="$("$PYTHON" -c 'import sys; print(sys.version, sys.executable)' |
        _fingerprint setup.py pyproject.toml mot_megatron/csrc)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] &&
        (cd "$ROOT" && "$PYTHON" -c 'import mot_megatron.data._native' 2>/dev/null); then
        return
    fi
    rm -f "$stamp"
    _check_compiler "$PYTHON"
    _say "building the C++ extension"
    (cd "$ROOT" && "$@") || _stop "the C++ extension could not be built; see the messages above"
    mkdir -p "$(dirname "$stamp")"
    printf '%s\n' "$wanted" >"$stamp"
}

if [ -n "${MOT_PYTHON:-}" ]; then
    _is_recent_python "$MOT_PYTHON" || _stop "MOT_PYTHON=$MOT_PYTHON is not Python 3.11, 3.12 or 3.13"
    PYTHON="$("$MOT_PYTHON" -c 'import sys; print(sys.executable)')"
    for _module in torch megatron.core deepspeed pybind11 setuptools pydantic tokenizers tensorboard \
        tqdm PIL scipy sklearn soundfile tomli_w threadpoolctl; do
        "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$_module') is None)" \
            2>/dev/null ||
            _stop "MOT_PYTHON=$MOT_PYTHON lacks the module $_module; install it there"
    done
    _build_when_changed "$ROOT/build/extension-stamp" "$PYTHON" setup.py --quiet build_ext --inplace
else
    _make_venv
    PYTHON="$VENV/bin/python"
    _install_requirements
    _build_when_changed "$VENV/.extension-stamp" \
        "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation \
        --editable .
fi
# Lets tools, and ranks started by the deepspeed launcher, import this package from any folder.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
PATH="$(dirname "$PYTHON"):$PATH"
export PATH PYTHON
