#!/bin/sh
# Tokens per second of quire-tiny on this machine, beside transformers.generate on the same prompts.
exec quire bench throughput --workload nano --model quire-tiny "$@"
