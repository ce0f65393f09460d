#!/usr/bin/env bash
# RA3 mid-training end to end, small, with every real part: a base model from scratch on this Python's standard library,
# two EM rounds (two tensor-parallel Megatron ranks, one vLLM engine), the NTP baseline on as many tokens as its M-steps, and a table.
# Interrupted, the same command goes on where it stopped. RA3_QUICKSTART names its folder, RA3_BASE_STEPS the steps of the
# base model; key=value arguments go to all three runs, before what each sets itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
# A stopped run saves after its current step; torchrun must give it the time.
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120
out=${RA3_QUICKSTART:-runs/quickstart}
settings=("corpus.folder=$out/corpus" "$@")

train() {
    local name=$1
    shift
    echo "== $name"
    torchrun --nproc-per-node 2 --local-addr 127.0.0.1 -m megatron_ra3 midtrain examples/quickstart/run.yaml \
        run_folder="$out/$name" "${settings[@]}" "$@"
}

if [[ ! -e $out/corpus/manifest.json ]]; then
    echo "== corpus"
    ra3 prepare --stdlib --out "$out/corpus" --tokenizer-vocab 4096 --max-lines 16 --max-chars 640 \
        --heldout-fraction 0.05
fi
train base model.init=random em.rounds=0 warmup.steps="${RA3_BASE_STEPS:-300}"
train ra3 model.folder="$out/base/export"
tokens=$(python -c "import json; print(json.load(open('$out/ra3/summary.json'))['mstep_tokens'])")
train ntp model.folder="$out/base/export" latents.comments=strip em.rounds=0 \
    warmup.steps=1000 warmup.max_tokens="$tokens" warmup.learning_rate=5e-4
echo "== result"
ra3 report base="$out/base" ntp="$out/ntp" ra3="$out/ra3" --out "$out/summary.json"
