"""The `sluice` command. It may import anything, lazily; nothing imports it."""
