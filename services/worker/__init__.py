"""One process per device: runs the plans of its scheduler, decides nothing."""
