"""Batch inference: OpenAI's batch files, planned by pure code, kept in a database that outlives the server."""
