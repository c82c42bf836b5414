"""The gRPC door: `InferenceService`, `grpc.health.v1` and reflection on the gateway's own port."""
