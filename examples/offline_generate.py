"""Complete a batch of prompts in this process, then have a short conversation.

python examples/offline_generate.py --model quire-tiny
"""

import argparse

from quire import LLM, SamplingParams

PROMPTS = ["def add(a, b):", "The list holds", "Sort these words:"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Offline generation")
    parser.add_argument("--model", default="quire-tiny")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    llm = LLM(model=args.model)
    print(llm.ready_line)

    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=args.max_tokens)
    for output in llm.generate(PROMPTS, sampling):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")

    greedy = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    print(llm.chat(messages, greedy)[0].outputs[0].text)
    llm.shutdown()


if __name__ == "__main__":
    main()
