"""Speed beside the peers and beside plain references, measured in one run: `python -m benchmarks.NAME [--quick]`."""
