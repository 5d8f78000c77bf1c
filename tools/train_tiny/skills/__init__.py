"""Generated dialogues, one file a skill; every answer is worked out by a program."""
