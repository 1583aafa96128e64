"""What work runs on: needs, devices, model servers, the Ray cluster, and processes."""
