"""The stage's gRPC server: control, framed data, claims."""
