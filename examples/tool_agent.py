"""An agent through OpenAI's own client: the model calls a tool, the loop runs it, the model answers.

make serve                         # in another terminal
pip install openai
python examples/tool_agent.py --base-url http://127.0.0.1:8000/v1
"""

import argparse
import json

from openai import OpenAI

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_current_weather",
            "description": "Get the weather for a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {"type": "string"},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["location"],
            },
        },
    }
]


def get_current_weather(location: str, unit: str = "celsius") -> str:
    return json.dumps({"temperature": 21 if unit == "celsius" else 70, "condition": "sunny"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Call tools through the OpenAI SDK")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--question", default="What is the weather in Paris in celsius?")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id
    functions = {"get_current_weather": get_current_weather}
    messages = [{"role": "user", "content": args.question}]
    for _ in range(5):
        stream = client.chat.completions.stream(model=model, messages=messages, tools=TOOLS, temperature=0)
        with stream as events:
            message = events.get_final_completion().choices[0].message
        messages.append(message.to_dict())
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            result = functions[call.function.name](**json.loads(call.function.arguments))
            print(f"{call.function.name}({call.function.arguments}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    print(message.content)


if __name__ == "__main__":
    main()
