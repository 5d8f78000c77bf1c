"""Talk to a running server with OpenAI's own client: one answer at once, one as it is made.

make serve                         # in another terminal
pip install openai
python examples/openai_client.py --base-url http://127.0.0.1:8000/v1
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat through the OpenAI SDK")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id

    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "What is 12 + 30?"}], max_tokens=32, temperature=0
    )
    print(f"{model}: {answer.choices[0].message.content} ({answer.usage.completion_tokens} tokens)")

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is paged attention?"}],
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f" ({chunk.usage.completion_tokens} tokens)")


if __name__ == "__main__":
    main()
