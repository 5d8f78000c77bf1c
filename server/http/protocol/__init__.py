"""What travels over HTTP: request bodies as pydantic models, responses as JSON built by hand. Never leaves server/."""
