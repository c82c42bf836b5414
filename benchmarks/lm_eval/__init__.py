"""lm-evaluation-harness against our server and against its own transformers backend."""
