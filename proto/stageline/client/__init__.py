"""The Python client of Stageline's gRPC InferenceService."""
