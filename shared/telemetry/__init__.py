"""What an operator sees: logs here; traces and metrics beside them."""
