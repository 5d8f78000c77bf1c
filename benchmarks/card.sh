#!/usr/bin/env bash
# The figures of docs/performance.md on this machine's GPU, part by part, a JSON line for each:
#   benchmarks/card.sh [tests] [small] [large] [quant] [spec] [http] [soak]     # all of them without arguments
# EXTRA is added to every command: EXTRA="--scale 0.01 --num-prompts 2" with SMALL=quire-tiny LARGE=quire-tiny tries the
# script itself out without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

models=benchmarks/models
small=${SMALL:-$models/qwen3-0.6b}
large=${LARGE:-$models/llama-3.1-8b}
draft=${DRAFT:-$models/llama-3.2-1b}
four_bits=${FOUR_BITS:-$models/llama-3.1-8b-awq}
engine=(--tokenizer quire-tiny --load-format dummy --max-model-len "${MAX_MODEL_LEN:-4096}")
read -ra extra <<<"${EXTRA:-}"
parts=${*:-tests small large quant spec http soak}

wants() { [[ " $parts " == *" $1 "* ]]; }
throughput() {
  local model=$1
  shift
  quire bench throughput "$model" "${engine[@]}" --max-num-batched-tokens 16384 --no-compare --json "${extra[@]}" "$@"
}
# served MODEL ARGUMENTS...: what clients see of a server, one at a time, 16 a second, 256 at once.
served() {
  local port=8123 server
  quire serve "$@" "${engine[@]}" --port $port --disable-log-requests &
  server=$!
  until curl -sf "127.0.0.1:$port/health" >/dev/null; do kill -0 $server || return 1; sleep 0.2; done
  for load in "24 --max-concurrency 1" "384 --request-rate 16" "512 --max-concurrency 256"; do
    # shellcheck disable=SC2086
    quire bench serve --base-url "http://127.0.0.1:$port" --input-len 1024 --output-len 128 --json --num-prompts $load
  done
  kill -TERM $server && wait $server
}

if wants tests; then
  python -m pytest -n "${WORKERS:-8}" -m gpu tests/attention tests/ops tests/sample tests/quant tests/spec_decode tests/engine tests/e2e
fi
if wants small; then
  throughput "$small" --workload nano nano-sampled decode-bs1 decode-bs32 decode-bs256 prefill
fi
if wants large; then
  throughput "$large" --workload nano decode-bs1 decode-bs32 decode-bs64 decode-bs128 decode-bs256 \
    decode-bs64x2048x128 prefill
fi
if wants quant; then
  throughput "$four_bits" --workload decode-bs1 decode-bs8 decode-bs32 decode-bs64 nano prefill
  throughput "$large" --quantization fp8 --kv-cache-dtype fp8 --workload decode-bs1 decode-bs32 decode-bs256 nano prefill
  throughput "$large" --quantization int8 --workload decode-bs1 decode-bs32 decode-bs256
  throughput "$large" --kv-cache-dtype fp8 --workload decode-bs256 decode-bs64x2048x128
fi
if wants spec; then
  for accepted in 0.6 0.75 0.9; do
    forced="{\"adaptive\": false, \"forced_acceptance\": $accepted}"
    throughput "$large" --workload decode-bs1 --num-speculative-tokens 4 --spec-method synthetic \
      --speculative-config "$forced"
    throughput "$large" --workload decode-bs1 --num-speculative-tokens 4 --speculative-model "$draft" \
      --speculative-config "$forced"
  done
  adaptive='{"forced_acceptance": 0.75}'
  throughput "$large" --workload decode-bs1 decode-bs64 decode-bs256 --num-speculative-tokens 4 \
    --speculative-model "$draft" --speculative-config "$adaptive"
fi
if wants http; then
  served "$small" --max-num-batched-tokens 16384
  served "$large"
fi
if wants soak; then
  quire bench startup "$large" "${engine[@]}" --json
  quire bench soak "$small" "${engine[@]}" --max-num-batched-tokens 16384 --json
fi
