"""Which configuration computes what fastest: candidates (declared), tables (measured, one per device) and the tuner.

Nothing here knows a kernel: kernels.fused asks for a choice when a weight is loaded, the tuner is handed what it runs.
A table belongs to one device and one candidate space; `tables/` holds those that were measured, by device name.
"""
