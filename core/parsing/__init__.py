"""From the text of an answer to content, reasoning and tool calls, however the stream is cut."""
