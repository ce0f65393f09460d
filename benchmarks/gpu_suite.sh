#!/usr/bin/env bash
# What only a GPU can show, in one command; writes <date>-<gpu>.{json,log} into RA3_RESULTS (default:
# benchmarks/results).
# Needs an interpreter with a CUDA torch 2.13, pytest, numpy, pyyaml and tqdm: PYTHON (default: .venv/bin/python, else python3).
# The fastest tiles for the likelihood kernels, their correctness at full size, then their speed and memory beside their
# peers: those of liger-kernel, verl and cut-cross-entropy that are installed take part, Liger's Hopper kernels with
# nvidia-cutlass-dsl. Nothing here has been run on a GPU yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_suite: $python sees no CUDA device (or has no torch); set PYTHON" >&2
    exit 2
}
name=$(date -u +%Y-%m-%d)-$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
results=${RA3_RESULTS:-benchmarks/results}
mkdir -p "$results"
export RA3_TUNING="$results/$name-tuning.json"
status=0
"$python" -m megatron_ra3 bench tune --rows 16384 2>&1 | tee "$results/$name.log" || status=1
"$python" -m pytest -m gpu tests/test_kernels_gpu.py --junitxml="$results/$name.xml" 2>&1 | tee -a "$results/$name.log" || status=$?
for shape in "8192 2048 151936" "8192 4096 128256" "16384 4096 151936"; do
    read -r rows hidden vocab <<<"$shape"
    "$python" -m megatron_ra3 bench logprob --rows "$rows" --hidden "$hidden" --vocab "$vocab" --repeats 20 \
        --out "$results/$name-$rows-$hidden-$vocab.json" 2>&1 | tee -a "$results/$name.log" | sed '$d' || status=1
done
"$python" - "$results/$name" <<'PY'
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

stem = Path(sys.argv[1])
shapes = sorted(stem.parent.glob(f"{stem.name}-[0-9]*.json"))
benches = {path.stem.removeprefix(f"{stem.name}-"): json.loads(path.read_text()) for path in shapes}
suite = ElementTree.parse(stem.with_suffix(".xml")).getroot().find("testsuite")
record = {
    "gpu": torch.cuda.get_device_name(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "tests": {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")},
    "fp8_rescored_vs_best_bf16_peer": {shape: bench["fp8_rescored_vs_best_bf16_peer"] for shape, bench in benches.items()},
    "logprob": benches,
}
for path in shapes:
    path.unlink()
stem.with_suffix(".xml").unlink()
stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
print(json.dumps(record))
PY
exit "$status"
