"""Programmatic dependent launch (sm_90 and later): a kernel's programs start while those of the launch before it still run.

The plugs of shrink, which lets the next launch begin; of expand, which waits for all before it and for what they wrote, and may then
let the gradients of A and B begin; and of these, which read nothing of expand's and end after it.
"""

import triton
import triton.language as tl


@triton.jit
def let_next_begin():
    """Once every program of this launch has said so, or ended, those of the next may take what room there is."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Until the launch before this one has ended and its writes are seen."""
    tl.extra.cuda.gdc_wait()


@triton.jit
def wait_then_let_next_begin():
    """The next launch begins where the one before this has ended, so it may read what that one wrote."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def in_order():
    """All of them, where launches follow each other anyway: in the interpreter."""
    pass
