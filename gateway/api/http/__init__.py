"""The OpenAI-compatible HTTP door. Knows nothing of Ray: the application runs under Serve's ingress or any ASGI server."""
