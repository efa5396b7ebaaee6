"""The OpenAI-compatible door: JSON in, JSON and server-sent events out, over the same Session as gRPC."""
