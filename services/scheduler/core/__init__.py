"""The pure core: plans in, results out; no clock, no I/O, no tensors. Start with README.md and scheduler.py."""
