#!/usr/bin/env bash
# Build the documentation site from docs/ into site/: bash docs/build.sh
# Arguments go to mkdocs: bash docs/build.sh --site-dir /somewhere/else
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$ROOT"
if ! "$PYTHON" -c 'import mkdocs, material' 2>/dev/null; then
    if [ -n "${MOT_PYTHON:-}" ]; then
        _stop "MOT_PYTHON=$MOT_PYTHON lacks mkdocs-material, and nothing is installed into it"
    fi
    _say "installing the packages of requirements-docs.txt"
    "$PYTHON" -m pip install --disable-pip-version-check --quiet \
        --constraint requirements.txt --requirement requirements-docs.txt ||
        _stop "pip could not install requirements-docs.txt; its messages above say why"
fi
# mkdocs-material would print a notice about the future of mkdocs.
export NO_MKDOCS_2_WARNING=1
"$PYTHON" -m mkdocs build --strict --clean "$@"
