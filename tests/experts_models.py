"""Experts with transformers' interface but without transformers, small, and their adapted answer written out in float64."""

import torch
from torch import nn

from lora_kernels import LoRAExperts, philox

E, K, I, TOP, T = 5, 24, 16, 2, 13
X = torch.randn(T, K, generator=torch.Generator().manual_seed(1))
INDEX = torch.rand(T, E, generator=torch.Generator().manual_seed(2)).topk(TOP).indices % (E - 1)  # no token for the last
WEIGHTS = torch.rand(T, TOP, generator=torch.Generator().manual_seed(3))


class Experts(nn.Module):
    """Gated experts; ``is_transposed``: stored as gpt-oss stores them, with biases."""

    num_experts, has_gate = E, True

    def __init__(self, is_transposed=False, has_bias=False):
        super().__init__()
        self.is_transposed, self.has_bias = is_transposed, has_bias
        for name, n, k in (("gate_up_proj", 2 * I, K), ("down_proj", K, I)):
            self.register_parameter(name, nn.Parameter(0.3 * torch.randn(E, *((k, n) if is_transposed else (n, k)))))
            if has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(0.3 * torch.randn(E, n)))

    def _apply_gate(self, h):
        gate, up = h.chunk(2, -1)
        return torch.tanh(gate) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return by_hand(self, {}, hidden_states, top_k_index, top_k_weights)


class NotGated(Experts):
    has_gate = False

    def __init__(self, is_transposed=False, has_bias=False):
        super().__init__(is_transposed, has_bias)
        self.up_proj, self.act_fn = nn.Parameter(self.gate_up_proj.detach().clone()), lambda h: torch.tanh(h[..., :I])
        del self.gate_up_proj, self.down_proj  # declared anew, so that up_proj comes first
        self.down_proj = nn.Parameter(0.3 * torch.randn(E, K, I))


KINDS = {"gated": Experts, "stored the other way round, biases": lambda: Experts(True, True), "not gated": NotGated}


class Net(nn.Module):
    """A linear layer, a router and experts."""

    def __init__(self, kind=Experts):
        super().__init__()
        self.inner, self.router = nn.Linear(K, K), nn.Linear(K, E)
        self.mlp = nn.ModuleDict({"experts": kind()})

    def forward(self, x):
        x = x + self.inner(x)
        weights = self.router(x).softmax(-1).gather(1, INDEX)
        return x + self.mlp["experts"](x, INDEX, weights)


def adapted(kind=Experts, dtype=torch.float32, *, adapter_dtype=None, **options) -> LoRAExperts:
    """Both stacks adapted, with B other than zero."""
    torch.manual_seed(0)
    experts = kind().to(dtype)
    names = [name for name, _ in experts.named_parameters() if name.endswith("proj")]
    layer = experts
    for name in names:
        layer = LoRAExperts(layer, name, **{"r": 3, "lora_alpha": 6, "init_lora_weights": False, "adapter_dtype": adapter_dtype, **options})
    for each in layer.chain():
        nn.init.normal_(each.lora_A, std=0.3), nn.init.normal_(each.lora_B, std=0.3)
    return layer


def by_hand(experts, adapters, x, index, weights, masks=None):
    """Token by token, expert by expert, in the tensors' dtype, PEFT's layout read as its docs write it: A [E, r, K], B [N, r, E].

    adapters: lora_A, lora_B, r, scaling of a stack. masks: what drops, kept over 1 - p, by stack a row for each token and expert.
    """
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    gate = experts._apply_gate if experts.has_gate else experts.act_fn

    def linear(name, e, v, row):
        W = getattr(experts, name)[e].T if experts.is_transposed else getattr(experts, name)[e]
        y = W.to(v.dtype) @ v
        if experts.has_bias:
            y = y + getattr(experts, f"{name}_bias")[e].to(v.dtype)
        if name in adapters:
            A, B, r, scaling = adapters[name]
            v = v if masks is None else v * masks[name][row]
            y = y + scaling * (B[:, e :: experts.num_experts] @ (A[e * r : (e + 1) * r] @ v))
        return y

    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t])
        for j, e in enumerate(index[t].tolist()):
            if e < experts.num_experts:
                row = t * index.shape[1] + j
                total = total + weights[t, j] * linear("down_proj", e, gate(linear(first, e, x[t], row)), row)
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def truth(layer: LoRAExperts, x=X, index=INDEX, weights=WEIGHTS, masks=None) -> dict[str, torch.Tensor]:
    """`results` by `by_hand` in float64 from the same inputs."""
    leaves = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
    adapters = {}
    for depth, each in enumerate(layer.chain()):
        prefix = "base_layer." * depth
        adapters[each.parameter_name] = (leaves[f"{prefix}lora_A"], leaves[f"{prefix}lora_B"], each.r, each.scaling)
    y = by_hand(layer.experts, adapters, x, index, weights, masks)
    return _graded(y, x, weights, leaves)


def results(layer: nn.Module, x=X, index=INDEX, weights=WEIGHTS) -> dict[str, torch.Tensor]:
    """y, and the gradients of x, of the routing's weights and of every parameter that has one."""
    layer.zero_grad()
    x, weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    return _graded(layer(x, index, weights), x, weights, dict(layer.named_parameters()))


def _graded(y, x, weights, leaves):
    ramp = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).reshape(y.shape)
    (y.double() * ramp).sum().backward()
    grads = {f"d {name}": p.grad for name, p in leaves.items() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **grads}


def keep(seed: torch.Tensor, rows: int, features: int, p: float) -> torch.Tensor:
    """What dropout of this seed multiplies each element by."""
    return philox.keep_mask(seed, rows, features, p).double() * philox.inv_keep(p)
