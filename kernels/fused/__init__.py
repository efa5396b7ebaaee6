"""Triton bodies of the operations, for NVIDIA GPUs; the same names as in kernels/reference, which specifies them.

Rules of the room:
- A host function checks shapes, allocates the result and calls `launch` (launch.py); it never reads a tensor's values
  and never synchronises, so it can be captured in a CUDA graph and recorded with meta tensors.
- What a model fixes (widths, heads, strides, layouts, flags) is a `tl.constexpr`; what a step decides (tokens, rows) is
  a plain integer named in `do_not_specialize`. So a model needs a finite set of compiled forms: declared.py lists it,
  prove.py compiles it without a GPU, a worker warms it before it says it is ready.
- No autotune decorators: configurations come from kernels/tuning or are stated here.
- Products and sums are never contracted behind our back (`enable_fp_fusion=False`); a fused multiply-add that we want
  is written `tl.fma`. A row's result never depends on the other rows of the step.
"""
