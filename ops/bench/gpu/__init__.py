"""What only a GPU can tell: `python -m ops.bench.gpu` (README.md beside this). No section needs the internet."""
