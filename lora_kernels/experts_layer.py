"""`LoRAExperts`: one stack of a mixture's experts with an adapter for each expert, without PEFT and with its names.

Around an experts module lie as many as it has adapted stacks, each within the next, as PEFT nests its ``ParamWrapper``:

    LoRAExperts down_proj -> base_layer: LoRAExperts gate_up_proj -> base_layer: the experts
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from . import experts as mixture
from .experts import Factors
from .merging import Mergeable, check_unmerged
from .nn import check_dropout, check_rank, check_written, hooked, init_adapter, scaling_of
from .problem import UnsupportedError, sharded

WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


class LoRAExperts(Mergeable, nn.Module):
    """Experts, of whose stack ``parameter_name`` expert e's matrix W acts as ``W x + scaling * B[e] A[e] dropout(x)``.

    The base stays one module with its parameters under their own names, frozen. A call computes all of it by
    `lora_kernels.experts.forward`, with the adapters of this layer and of those within it; hooks within are refused, for it would pass
    them by. Where none of them acts (disabled, or merged) the experts' own forward answers.

    Args:
        base_layer: Experts with transformers' interface (``num_experts``, ``has_gate``, ``has_bias``, ``is_transposed``, ``_apply_gate``),
            or a `LoRAExperts` around them with another stack, one that the experts declare before this one: PEFT's order.
        parameter_name: The stack, ``[E, N, K]``, or ``[E, K, N]`` where the experts are ``is_transposed``: "gate_up_proj" (without a gate
            "up_proj") or "down_proj".
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: As in `FusedLoRALinear`, the same for each expert. Dropout has a
            mask for each token and expert.
        adapter_dtype: Of A and B: the stack's dtype (None) or float32.
    Shape:
        hidden_states ``[T, K]``, top_k_index ints ``[T, k]`` (from E on: no expert), top_k_weights ``[T, k]`` -> ``[T, K]`` in
        hidden_states' dtype.
    Attributes:
        lora_A ``[E r, K]``: ``[E, r, K]``, flattened. lora_B ``[N, r E]``: ``[N, r, E]``, flattened, the expert innermost. PEFT's layout.
        scaling: The float that multiplies the low-rank term; may be set between calls. Not in a state dict.
        enabled: False: this stack is the base alone. merged: Whether the update sits in the stack.
        num_experts, in_features, out_features: E, K and N of the stack.
    Raises:
        UnsupportedError: experts or a stack that the kernels do not serve; a rank outside 1 to 512. TypeError, ValueError: dtypes and
        values; a stack adapted twice, or out of PEFT's order. Nothing is frozen then.
    """

    base_layer: nn.Module

    def __init__(
        self,
        base_layer: nn.Module,
        parameter_name: str,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool = True,
        adapter_dtype=None,
    ):
        super().__init__()
        if not isinstance(base_layer, nn.Module):
            raise TypeError(f"base_layer: wanted an nn.Module, got {type(base_layer).__name__}")
        self.base_layer, self.parameter_name = base_layer, parameter_name
        reason = why_not_adapted(self.experts, parameter_name)
        if reason:
            raise UnsupportedError(f"base_layer: wanted experts whose {parameter_name} can be adapted, but {reason}")
        self._check_order()
        check_rank("r", r)
        check_dropout(lora_dropout)
        dtype = self.stack.dtype
        if adapter_dtype not in (None, dtype, torch.float32):
            raise TypeError(f"adapter_dtype: wanted the stack's dtype {dtype} or float32, got {adapter_dtype}")
        self.experts.requires_grad_(False)
        self.num_experts, self.out_features, self.in_features = self.weight.shape
        self.r, self.lora_alpha, self.use_rslora, self.lora_dropout = r, lora_alpha, use_rslora, float(lora_dropout)
        self.scaling = scaling_of(lora_alpha, r, use_rslora)
        self.enabled, self.training = True, base_layer.training
        like = self.weight.new_empty(0, dtype=adapter_dtype or dtype)
        self.lora_A = nn.Parameter(like.new_empty(self.num_experts * r, self.in_features))
        self.lora_B = nn.Parameter(like.new_empty(self.out_features, r * self.num_experts))
        self.reset_adapter(init_lora_weights)
        self.register_state_dict_post_hook(_keep_base_apart)

    def _check_order(self) -> None:
        declared = [name for name, _ in self.experts.named_parameters(recurse=False)]
        within = [layer.parameter_name for layer in self.chain()[1:]]
        if self.parameter_name in within:
            raise ValueError(f"parameter_name: wanted a stack without an adapter, got {self.parameter_name}, which has one within")
        after = [name for name in within if declared.index(name) > declared.index(self.parameter_name)]
        if after:
            order = "the order in which the experts declare them, which PEFT's files follow"
            raise ValueError(f"parameter_name: wanted stacks in {order}, got {self.parameter_name} around {after[0]}")

    @property
    def experts(self) -> nn.Module:
        """The module within, which holds the stacks."""
        layer = self.base_layer
        while isinstance(layer, LoRAExperts):
            layer = layer.base_layer
        return layer

    def chain(self) -> list[LoRAExperts]:
        """This layer and those within it."""
        return [self, *(self.base_layer.chain() if isinstance(self.base_layer, LoRAExperts) else ())]

    @property
    def stack(self) -> torch.Tensor:
        """The parameter, as the experts store it."""
        return getattr(self.experts, self.parameter_name)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The stack as ``[E, N, K]``, a view without a gradient."""
        stack = self.stack.detach()
        return stack.mT if self.experts.is_transposed else stack

    def reset_adapter(self, init_lora_weights: bool = True) -> None:
        """Initialise the adapter again; see ``init_lora_weights``. RuntimeError: it is merged. ValueError: parametrized, or pruned."""
        check_unmerged("reset_adapter", self)
        check_written(self)
        init_adapter(self.lora_A, self.lora_B, init_lora_weights)

    def factors(self) -> Factors:
        """The adapter as `lora_kernels.experts.forward` takes it, with gradients back to lora_A and lora_B."""
        A, B = mixture.by_expert(self.lora_A, self.lora_B, self.num_experts)
        return Factors(A, B, self.scaling, self.lora_dropout, self.training)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The experts' answer with the adapters of this layer and of those within it.

        Raises:
            ValueError: shapes. RuntimeError: a stack that is merged and not enabled. UnsupportedError: hooks within.
        """
        layers, experts = self.chain(), self.experts
        wrong = [layer.parameter_name for layer in layers if layer.merged and not layer.enabled]
        if wrong:
            raise RuntimeError(
                f"enabled: wanted True for a merged stack, whose base is kept aside, got False for {wrong[0]}; unmerge() first"
            )
        for within in (*layers[1:], experts):
            if hooked(within):
                raise UnsupportedError(
                    f"base_layer: wanted modules without hooks, which would be passed by, got a {type(within).__name__} with"
                )
        acting = {layer.parameter_name: [layer.factors()] for layer in layers if layer.enabled and not layer.merged}
        if not acting:
            return experts(hidden_states, top_k_index, top_k_weights)
        if hidden_states.dim() != 2:
            raise ValueError(f"hidden_states: wanted [T, K], got shape {list(hidden_states.shape)}")
        if top_k_index.shape != top_k_weights.shape or top_k_index.shape[:1] != hidden_states.shape[:1]:
            given = f"{list(top_k_index.shape)} and {list(top_k_weights.shape)}"
            raise ValueError(f"top_k_index, top_k_weights: wanted [{hidden_states.shape[0]}, k] each, got {given}")
        return mixture.forward(experts, hidden_states, top_k_index, top_k_weights, acting)

    def merge(self, keep: str = "cpu") -> None:
        """Write ``W[e] + scaling B[e] A[e]`` into this layer's stack, expert by expert, each rounded once.

        Args:
            keep: Where the base stack waits for `unmerge`, which gives it back bit for bit: "cpu" or "device".
        Raises:
            RuntimeError: the layer is merged. ValueError: the result is not finite, and nothing has changed. UnsupportedError: the stack
            is sharded.
        """
        check_unmerged("merge", self)
        if sharded(self.stack):
            raise UnsupportedError(f"merge: wanted a stack that is whole on this rank, got shards of {self.parameter_name}; merge first")
        A, B = mixture.by_expert(self.lora_A.detach(), self.lora_B.detach(), self.num_experts)
        self._merge(keep, A, B, self.scaling)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)  # the stack has its name within: `_keep_base_apart`

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self.merged:  # at once, before the stack within is loaded
            raise RuntimeError(
                f"{prefix[:-1] or 'the layer'}: wanted an unmerged layer to load into, got a merged one; call unmerge() first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        parts = [f"parameter_name={self.parameter_name}", f"num_experts={self.num_experts}", f"in_features={self.in_features}"]
        parts += [f"out_features={self.out_features}", f"r={self.r}", f"scaling={self.scaling:g}", f"lora_dropout={self.lora_dropout:g}"]
        parts += ["merged=True"] if self.merged else []
        parts += [] if self.enabled else ["enabled=False"]
        return ", ".join(parts)


def _keep_base_apart(layer: LoRAExperts, state_dict, prefix: str, metadata) -> None:
    """A checkpoint holds base and adapter apart, or loading it would apply the adapter twice."""
    key = prefix + "base_layer." * len(layer.chain()) + layer.parameter_name
    if layer.merged and key in state_dict:
        base = layer.base_weight()
        state_dict[key] = base.mT if layer.experts.is_transposed else base


def why_not_adapted(experts: nn.Module, parameter_name: str) -> str | None:
    """Why a `LoRAExperts` cannot go around this module for this parameter, or None."""
    reason = mixture.why_not_experts(experts, frozen=False)
    if reason:
        return reason
    if hooked(experts):
        return f"its {type(experts).__name__} has hooks, which would be passed by"
    names = mixture.projections(experts)
    if parameter_name not in names:
        return f"its parameter {parameter_name} is not one of {', '.join(names)}"
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """What DistributedDataParallel, say, is around: the module whose names configs and files have."""
    while isinstance(within := getattr(model, "_orig_mod", model), WRAPPERS):
        model = within.module
    return model


def plain_name(model: nn.Module, name: str) -> str:
    """A module's name as it is without the `LoRAExperts` around it and above it, and without torch.compile's wrappers."""
    if "_orig_mod" not in name and "base_layer" not in name:
        return name
    kept, module = [], model
    for part in name.split("."):
        if part != "_orig_mod" and not (part == "base_layer" and isinstance(module, LoRAExperts)):
            kept.append(part)
        module = module.get_submodule(part)
    return ".".join(kept)


def config_name(model: nn.Module, name: str) -> str:
    """What a config calls a module: by its plain name, a `LoRAExperts` by that of its stack."""
    module = model.get_submodule(name)
    return ".".join([plain_name(model, name), *([module.parameter_name] if isinstance(module, LoRAExperts) else [])])
