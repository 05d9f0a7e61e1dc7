"""Models and data sets in plain PyTorch, for the demo, tests and benchmarks; nothing here knows of compression."""
