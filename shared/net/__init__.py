"""gRPC as Sluice uses it: one way to serve, one way to call, one way to fail."""
