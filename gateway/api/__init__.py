"""The doors: gRPC and OpenAI-compatible HTTP, both in front of one `generate` path (`service.Frontend`)."""
