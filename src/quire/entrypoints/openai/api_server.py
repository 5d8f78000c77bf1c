"""``python -m quire.entrypoints.openai.api_server --model MODEL ...``: ``quire serve``, as vLLM's guides start it."""

import sys

from quire.server.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
