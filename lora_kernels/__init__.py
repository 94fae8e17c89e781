"""Fused LoRA matmuls: ``y = x W^T + scale * (drop(x) A^T) B^T + bias`` as Triton kernels, forward and backward.

Importing needs neither a GPU nor Triton; both are looked for when a call wants the kernels.
"""

from . import reference
from .autograd import explain, lora_linear
from .dispatch import Choice
from .dora import dora_linear
from .multi import MultiLoRALinear
from .nn import FusedLoRALinear
from .problem import UnsupportedError
from .segments import Segments

__version__ = "0.3.0"
__all__ = [
    "Choice",
    "FusedLoRALinear",
    "MultiLoRALinear",
    "Segments",
    "UnsupportedError",
    "dora_linear",
    "explain",
    "lora_linear",
    "reference",
]
