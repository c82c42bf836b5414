"""Load generators and measurements behind `stageline bench`. They are clients: they talk to a server over gRPC."""
