"""bfloat16 bodies that numba compiles: what torch does in a dozen passes over memory, done in one.

Only the modules of kernels/cpu import these, and only where they can run (kernels/cpu/choice.py). Each kernel computes
in float32 and treats a row alike whatever the other rows are. Compiled code is kept in `__pycache__`, or where
NUMBA_CACHE_DIR says, so only the first process on a machine waits for it.
"""
