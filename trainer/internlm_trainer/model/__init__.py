"""InternLM's architecture in plain modules."""
