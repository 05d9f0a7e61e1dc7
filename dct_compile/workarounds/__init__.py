"""Guards against faults of torch, each with the versions that need it."""
