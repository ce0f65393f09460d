#!/usr/bin/env bash
# Everything that must be green: environment, linters, types, tests. Arguments go to pytest: with `-m long` and with
# `-m faults` it runs what takes minutes a test and is left out otherwise.
# Without the system packages some tests skip and say so; with CI=true such a skip is a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
system_packages=(slurm-wlm munge git bubblewrap)

bash tools/setup_env.sh

install_system_packages() {
    local missing=() package
    for package in "${system_packages[@]}"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    echo "run.sh: installing ${missing[*]}"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}"; } \
        >/dev/null </dev/null || echo "run.sh: could not install ${missing[*]}; tests that need them skip" >&2
}
if ((EUID == 0)) && command -v apt-get >/dev/null; then
    install_system_packages
fi

export PATH="$PWD/.venv/bin:$PATH"
failed=()
ruff check . || failed+=("ruff check")
ruff format --check . || failed+=("ruff format")
mypy || failed+=(mypy)
if (($#)); then
    python -m pytest "$@" || failed+=(pytest)
else
    # Tests that start real servers mostly wait, so the others run beside them.
    servers=$(mktemp)
    trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$servers"' EXIT
    python -m pytest -m "not gpu and not faults and not long and (vllm or slurm)" >"$servers" 2>&1 &
    python -m pytest -m "not gpu and not long and not vllm and not slurm" || failed+=(pytest)
    wait $! || failed+=("pytest with servers")
    cat "$servers"
fi
if ((${#failed[@]})); then
    printf 'run.sh: failed: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
    exit 1
fi
