"""Fused LoRA matmuls: ``y = x W^T + scale * (drop(x) A^T) B^T + bias`` as Triton kernels, forward and backward.

Importing needs neither a GPU nor Triton; both are looked for when a call wants the kernels.
"""

from . import reference
from .apply import apply_lora, remove_lora
from .autograd import explain, lora_linear
from .dispatch import Choice
from .dora import dora_linear
from .experts_layer import LoRAExperts
from .files import load_adapter, save_adapter
from .gated import recompute_gates
from .lora_config import LoRAConfig
from .multi import MultiLoRALinear
from .nn import FusedLoRALinear
from .over import LoRAOver, MultiLoRAOver
from .packed_layer import PackedLoRALinear, PackedLoRAOver
from .pool import AdapterPool
from .problem import UnsupportedError
from .projections import Projection, lora_linears
from .segments import Segments
from .serving import use_adapters, use_segments
from .shared_input import share_inputs

__version__ = "0.4.0"
__all__ = [
    "AdapterPool",
    "Choice",
    "FusedLoRALinear",
    "LoRAConfig",
    "LoRAExperts",
    "LoRAOver",
    "MultiLoRALinear",
    "MultiLoRAOver",
    "PackedLoRALinear",
    "PackedLoRAOver",
    "Projection",
    "Segments",
    "UnsupportedError",
    "apply_lora",
    "dora_linear",
    "explain",
    "load_adapter",
    "lora_linear",
    "lora_linears",
    "recompute_gates",
    "reference",
    "remove_lora",
    "save_adapter",
    "share_inputs",
    "use_adapters",
    "use_segments",
]
