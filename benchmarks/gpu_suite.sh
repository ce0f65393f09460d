#!/usr/bin/env bash
# What only a GPU can show, in one command; writes <date>-<gpu>.{json,log} into RA3_RESULTS (default:
# benchmarks/results).
#
#     benchmarks/gpu_suite.sh [tests] [tune] [ROWS,HIDDEN,VOCAB ...]
#
# Parts (default: all, at three full sizes): the correctness of the likelihood kernels at full size; the fastest tiles;
# speed and memory beside their peers: those of liger-kernel, verl, cut-cross-entropy and quack-kernels that are
# installed take part, Liger's Hopper kernels and QuACK's with nvidia-cutlass-dsl. All must be done within RA3_SECONDS
# (default 540); a part that fails, or for which no time is left, is named, and the others are kept. Parts that are run
# later on the same day are added to the same record. No network is used.
# Needs an interpreter with a CUDA torch 2.13, pytest, numpy, pyyaml and tqdm: PYTHON (default: .venv/bin/python, else python3).
# Nothing here has been run on a GPU yet.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
machine=$("$python" -c '
import sys, torch
torch.cuda.is_available() or sys.exit(1)
print(torch.cuda.get_device_name().replace(" ", "-").lower(), torch.__version__, torch.version.cuda)') || {
    echo "gpu_suite: $python sees no CUDA device (or has no torch); set PYTHON" >&2
    exit 2
}
read -r gpu torch cuda <<<"$machine"
results=${RA3_RESULTS:-benchmarks/results}
stem=$results/$(date -u +%Y-%m-%d)-$gpu
mkdir -p "$results" || exit 2
export RA3_TUNING="$stem-tuning.json"
deadline=$((SECONDS + ${RA3_SECONDS:-540}))
[[ $# -gt 0 ]] || set -- tests tune 8192,2048,151936 8192,4096,128256 16384,4096,151936
status=0

# record NAME STATUS FILE: put what a part left into the record of the day, whatever the part came to.
record() {
    "$python" - "$stem.json" "$gpu" "$torch" "$cuda" "$@" <<'PY'
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

path, machine, name, status, file = Path(sys.argv[1]), sys.argv[2:5], sys.argv[5], int(sys.argv[6]), Path(sys.argv[7])
record = json.loads(path.read_text()) if path.is_file() else {}
record |= dict(zip(("gpu", "torch", "cuda"), machine, strict=True))
part = {"exit_status": status}
if file.is_file() and file.suffix == ".xml":
    suite = ElementTree.parse(file).getroot().find("testsuite")
    part |= {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
elif file.is_file():
    part["result"] = json.loads(file.read_text())
record.setdefault("parts", {})[name] = part
path.write_text(json.dumps(record, indent=1) + "\n")
PY
}

# run NAME FILE COMMAND...: within the time that is left, beside the log.
run() {
    local name=$1 file=$2 left=$((deadline - SECONDS)) code=124
    shift 2
    rm -f "$file"
    if ((left > 5)); then
        timeout --kill-after=10 "$left" "$@" 2>&1 | tee -a "$stem.log"
        code=${PIPESTATUS[0]}
    fi
    ((code == 0)) || {
        status=1
        echo "gpu_suite: $name: exit status $code$([[ $code -eq 124 ]] && echo ' (no time left)')" | tee -a "$stem.log" >&2
    }
    record "$name" "$code" "$file" || status=1
}

for part in "$@"; do
    case $part in
    tests) run tests "$stem.xml" "$python" -m pytest -m gpu tests/test_kernels_gpu.py --junitxml="$stem.xml" ;;
    tune) run tune "$RA3_TUNING" "$python" -m megatron_ra3 bench tune --rows 16384 ;;
    *,*,*)
        IFS=, read -r rows hidden vocab <<<"$part"
        run "$part" "$stem-$part.json" "$python" -m megatron_ra3 bench logprob --rows "$rows" --hidden "$hidden" \
            --vocab "$vocab" --repeats 20 --out "$stem-$part.json"
        rm -f "$stem-$part.json"
        ;;
    *)
        echo "gpu_suite: $part: parts are tests, tune and ROWS,HIDDEN,VOCAB" >&2
        status=2
        ;;
    esac
done
rm -f "$stem.xml"
cat "$stem.json"
exit "$status"
