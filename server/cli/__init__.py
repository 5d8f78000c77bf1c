"""The commands of ``quire``: ``add_parser(subparsers)`` and ``run(args) -> int``, and what they need."""
