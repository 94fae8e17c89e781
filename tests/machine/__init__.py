"""A GPU that is not there: compiled kernels, run from their PTX by NumPy, so that what the compiler made of them is tested without one.

    PTX_MACHINE=sm_90 python -m pytest tests/test_kernels.py        any test of the kernels, as compiled for sm_90 (or sm_80 to sm_89)

Triton compiles each launch as it would on that GPU, and its own launcher's arguments go to `driver`, which runs the grid's programs one
after the other, or in turns in a shuffled order. `ptx` reads the text, `translate` turns each instruction into a line of NumPy over all
threads of a program, `program` runs them, `memory` holds what they may touch.

What it checks beside the numbers: accesses outside of the arguments' tensors, misaligned ones, descriptors that a driver would refuse,
instructions of whole warps run by a part of one, barriers that are never left, and, by turns, programs that wait for each other.
What it does not: races inside a program, memory ordering weaker than one after the other, speed, and anything of tcgen05.
"""
