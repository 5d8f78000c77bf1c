#!/usr/bin/env bash
# A live switchback of two policies on one server, which is started for it: some 85 s beside the start.
#   benchmarks/live_switchback.sh FOLDER     report.md, its plots and the server's log go there; the verdict is printed
# From the root of the repository. The defaults are for an H200: 65 requests a second of some 400 tokens in and 24 out are
# 0.7 of what it serves. Without a GPU: MODEL=quire-tiny LOAD_FORMAT= RATE=6 MAX_MODEL_LEN=1024 \
#   LENGTHS=input=lognormal/40/0.3,output=lognormal/6/0.3
set -euo pipefail
out=${1:?name a folder for the report}
PYTHON=${PYTHON:-python3} MODEL=${MODEL:-benchmarks/models/llama-3.1-8b} LOAD_FORMAT=${LOAD_FORMAT-dummy} PORT=${PORT:-8123}
A=${A:-fcfs} B=${B:-sjf,aging=0} RATE=${RATE:-65} PAIRS=${PAIRS:-12} BLOCK=${BLOCK:-3.5} WASHOUT=${WASHOUT:-0.7}
LENGTHS=${LENGTHS:-input=lognormal/400/0.5,output=lognormal/24/0.3}
export PYTHONPATH=${PYTHONPATH:-src}
engine=(--max-model-len "${MAX_MODEL_LEN:-4096}")
if [ -n "$LOAD_FORMAT" ]; then engine+=(--load-format "$LOAD_FORMAT" --tokenizer quire-tiny); fi
url=http://127.0.0.1:$PORT
mkdir -p "$out"
"$PYTHON" -m quire serve "$MODEL" "${engine[@]}" --port "$PORT" --admin-api-key switchback >"$out/server.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true' EXIT
until "$PYTHON" -c "import urllib.request; urllib.request.urlopen('$url/health')" 2>/dev/null; do
  kill -0 $server 2>/dev/null || { tail -20 "$out/server.log"; exit 1; }
  sleep 0.5
done
echo "the server is ready after $SECONDS s"
requests=$("$PYTHON" -c "print(int(2.6 * $RATE * $PAIRS * $BLOCK) + 50)")  # 1.3 times what is expected to come
"$PYTHON" -m quire ab --a "$A" --b "$B" --design switchback --url "$url" --admin-api-key switchback \
  --pairs "$PAIRS" --block "$BLOCK" --washout "$WASHOUT" --trace "synthetic:requests=$requests,$LENGTHS" \
  --arrivals "poisson:rate=$RATE" --slo-ttft-ms 500 --out "$out" >/dev/null 2>"$out/ab.log" || { tail -5 "$out/ab.log"; exit 1; }
sed -n 3p "$out/report.md"
echo "$SECONDS s in all; the report is $out/report.md"
