"""The doors: gRPC and OpenAI-compatible HTTP, over one frontend."""
