"""What one GPU must show in ten minutes: `python -m benchmarks.gpu.check`, described in benchmarks/README.md."""
