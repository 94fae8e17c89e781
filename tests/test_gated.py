"""`recompute_gates`: the same bits as without, half of what a gated MLP keeps, and where it does not apply."""

import copy
import io
import warnings
import weakref

import pytest
import torch
from test_memory import Kept, mask_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    LoRAConfig,
    UnsupportedError,
    apply_lora,
    gates,
    launch,
    recompute_gates,
    remove_lora,
    share_inputs,
    use_adapters,
)
from lora_kernels.nn import FusedLoRALinear

M, K, WIDTH, R = 10, 12, 40, 3
ALL = ["gate_proj", "up_proj", "down_proj"]


class MLP(nn.Module):
    def __init__(self, act=nn.SiLU, K=K, width=WIDTH):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(K, width, bias=False), nn.Linear(K, width, bias=False)
        self.down_proj, self.act_fn = nn.Linear(width, K), act()

    def forward(self, x):
        """What Llama's does."""
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class AtOnce(MLP):
    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Named(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(x))
        h = gate * self.up_proj(x)
        return self.down_proj(h)


def adapted(mlp=MLP, act=nn.SiLU, p=0.0, targets=ALL, dtype=torch.float64, **config) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": mlp(act)}).to(dtype)
    apply_lora(model, LoRAConfig(target_modules=targets, r=R, lora_dropout=p, **config))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model.train()


def x_of(*lead, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*lead, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).requires_grad_()


def step(model, x=None, call=None) -> dict:
    x = x_of(M, dtype=next(model.parameters()).dtype) if x is None else x
    torch.manual_seed(3)
    y = (model["mlp"] if call is None else call)(x)
    found = {"x": x, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    for each in found.values():
        each.grad = None
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return {"y": y.detach(), **{name: each.grad for name, each in found.items()}}


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 2
    assert all(torch.equal(ours[name], wanted) for name, wanted in theirs.items())


def taken(model) -> None:
    assert recompute_gates(model) == ["mlp"]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU, lambda: nn.GELU(approximate="tanh"), nn.Mish])
def test_the_same_bits(act, dtype, p, nodes):
    model = adapted(act=act, dtype=dtype, p=p)
    plain = step(model)
    taken(model)
    same(step(model), plain)
    assert nodes == [1]
    assert recompute_gates(model, False) == [] and type(model["mlp"]) is MLP
    same(step(model), plain)
    assert nodes == [1]


def test_hooks_of_the_activation_between_the_passes(nodes):
    """They do not act on what is made again."""
    model, x, found = adapted(), x_of(M), []
    for _ in range(2):
        y = model["mlp"](x)
        with model["mlp"].act_fn.register_forward_hook(lambda module, args, out: out * 3):
            found.append(torch.autograd.grad(y.sum(), x)[0])
        recompute_gates(model)
    assert torch.equal(*found) and nodes == [1]


def test_hooks_of_all_modules_are_not_passed_by(nodes):
    model = adapted()
    taken(model)
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module).__name__)):
        step(model)
    assert seen == ["FusedLoRALinear", "FusedLoRALinear", "SiLU", "FusedLoRALinear", "GatedMLP"] and not nodes


def test_what_torch_makes_of_it_does_not_keep_the_product():
    gate, up = torch.randn(2, M, WIDTH)
    product, gradients = gates.made_again(lambda gate, up: nn.functional.gelu(gate) * up, gate, up)
    product = weakref.ref(product.untyped_storage())
    assert product() is None
    assert [g.shape for g in gradients(torch.ones(M, WIDTH))] == [gate.shape, up.shape]


def test_traced_by_fx():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, FusedLoRALinear) or super().is_leaf_module(module, name)

    model = adapted()
    plain = step(model)
    taken(model)
    graph = Tracer().trace(model["mlp"])
    assert torch.equal(torch.fx.GraphModule(model["mlp"], graph)(x_of(M)), plain["y"])


def test_a_compiled_mlp_is_copied_without_what_was_compiled():
    model = adapted()
    taken(model)
    model["mlp"].compile(backend="eager")
    again = copy.deepcopy(model)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    assert not again["mlp"](x_of(M)).any()
    torch.save(model, io.BytesIO())


def bytes_kept(model) -> list[int]:
    """Before `recompute_gates`, and after."""
    kept, x = [], x_of(M)
    for _ in range(2):
        with Kept() as each:
            model["mlp"](x)
        kept.append(each.bytes(besides=model.parameters()))
        recompute_gates(model)
    return kept


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bytes_kept(p):
    """Two tensors of the width where there were four; the rest as before."""
    kept = bytes_kept(adapted(p=p))
    assert kept[0] - kept[1] == 2 * 8 * M * WIDTH
    assert kept[1] == 8 * (M * K + 2 * M * WIDTH + 3 * M * R) + 2 * mask_bytes(p, M, K) + mask_bytes(p, M, WIDTH)


def test_layers_of_one_x_before_it(nodes):
    model = adapted(p=0.2)
    plain = step(model)
    assert share_inputs(model) == [("mlp.gate_proj", "mlp.up_proj")]
    taken(model)
    for name, wanted in step(model).items():
        torch.testing.assert_close(wanted, plain[name])
    assert nodes == [1]


@pytest.mark.parametrize("frozen", ["x", "gate", "down's A", "down", "all but down's A"])
def test_each_gradient_alone(frozen, nodes):
    model = adapted(p=0.3)
    x = x_of(M)
    off = {"x": (), "gate": ("gate_proj",), "down's A": ("down_proj.lora_A",), "down": ("down_proj",)}.get(
        frozen, ("gate", "up", "down_proj.lora_B")
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not any(part in name for part in off))
    x = x.detach() if frozen in ("x", "all but down's A") else x

    def grads():
        torch.manual_seed(3)
        wanted = [p for p in (x, *model.parameters()) if p.requires_grad]
        return torch.autograd.grad(model["mlp"](x).cos().sum(), wanted)

    plain = grads()
    taken(model)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(grads(), plain, strict=True)) and len(plain) > 0
    assert nodes == ([] if frozen == "all but down's A" else [1]), "of gate and up without a gradient torch keeps the product alone"


@pytest.mark.parametrize("grad", [True, False])
def test_torchs_generator_goes_as_before(grad, nodes):
    """Where nothing is trained, too: one seed a layer."""
    model = adapted(p=0.3).requires_grad_(False)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.set_grad_enabled(grad):
            found.append((model["mlp"](x_of(M).detach()), torch.rand(3)))
        recompute_gates(model)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True)) and not nodes


def test_where_each_part_is_computed_as_before(nodes):
    """Hooks, a merged layer, no graph, a compiler, DoRA, a bias of the adapter: the model's own expression."""
    model = adapted()
    taken(model)
    mlp = model["mlp"]
    plain = step(model)
    seen = []
    nodes.clear()
    for hooked in (mlp.down_proj, mlp.act_fn):
        handle = hooked.register_forward_hook(lambda *args: seen.append(args[1][0].shape))
        same(step(model), plain)
        handle.remove()
    assert seen == [(M, WIDTH)] * 2
    with torch.no_grad():
        assert torch.equal(mlp(x_of(M)), plain["y"])
    mlp.down_proj.enabled = False
    step(model)
    mlp.down_proj.enabled = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        for name, wanted in step(model, call=compiled).items():
            torch.testing.assert_close(wanted, plain[name])
    mlp.down_proj.merge()
    torch.testing.assert_close(step(model)["y"], plain["y"])
    assert not nodes
    for special in (dict(use_dora=True), dict(lora_bias=True)):
        model = nn.ModuleDict({"mlp": MLP()})
        for name in ALL:
            setattr(model["mlp"], name, FusedLoRALinear.from_linear(getattr(model["mlp"], name), r=R, **special))
        plain = step(model)
        taken(model)
        same(step(model), plain)
    assert not nodes


def test_layers_with_slots_compute_as_before(nodes):
    model = nn.ModuleDict({"mlp": MLP()})
    apply_lora(model, LoRAConfig(target_modules=ALL, r=R), num_adapters=2)
    recompute_gates(model)
    x = x_of(2, 3, dtype=torch.float32)
    with use_adapters(model, [0, 1]):
        model["mlp"](x).sum().backward()
    assert not nodes and x.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(reentrant, nodes):
    model = adapted(p=0.3)
    plain = step(model)
    taken(model)
    same(step(model, call=lambda x: checkpoint(model["mlp"], x, use_reentrant=reentrant)), plain)
    assert len(nodes) == (1 if reentrant else 2)


def test_copies_and_files(nodes):
    model = adapted()
    names = list(model.state_dict())
    plain = step(model)
    taken(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(again["mlp"]) is type(model["mlp"]) and list(again.state_dict()) == names
        assert again["mlp"].down_proj is not model["mlp"].down_proj
        same(step(again), plain)
    assert len(nodes) == 2
    remove_lora(model)
    assert type(model["mlp"].down_proj) is nn.Linear and model["mlp"](x_of(M)).requires_grad
    assert len(nodes) == 2


def test_autocast(nodes):
    model = adapted(dtype=torch.float32, p=0.2)
    x = x_of(M, dtype=torch.float32)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model["mlp"](x)

    plain = step(model, x, call)
    taken(model)
    same(step(model, x, call), plain)
    assert nodes == [1] and plain["y"].dtype is torch.bfloat16


def test_twice_and_written():
    model = adapted()
    taken(model)
    x = x_of(M)
    (dx,) = torch.autograd.grad(model["mlp"](x).cos().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="create_graph"):
        dx.sum().backward()
    kept = []
    model["mlp"].up_proj.register_forward_hook(lambda module, args, out: kept.append(out))
    y = model["mlp"](x)
    with torch.no_grad():
        kept[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = model["mlp"](x)
    y.sum().backward(retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    y.sum().backward()
    assert torch.equal(x.grad, first), "nothing that was kept is written to"


@pytest.mark.interpreted
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kernel", ["silu", "gelu_tanh"])
def test_by_the_kernels(kernel, p, monkeypatch, launched, nodes):
    """As on a GPU, by the interpreter: one launch forward, two backward, of which the first only where A wants a gradient."""
    act = nn.SiLU if kernel == "silu" else lambda: nn.GELU(approximate="tanh")
    model = adapted(act=act, dtype=torch.float32, p=p)
    plain = step(model)
    taken(model)
    monkeypatch.setattr(gates, "kernel_of", lambda act, up: kernel)
    found = []
    names = launched(lambda: found.append(step(model)))
    assert [name for name in names if name.startswith("gate")] == ["gate_product", "gate_product", "gate_gradients"]
    for name, wanted in plain.items():  # sums of a few hundred terms at most, in another order
        torch.testing.assert_close(found[0][name], wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    model["mlp"].down_proj.lora_A.requires_grad_(False)
    names = launched(lambda: step(model))
    assert [name for name in names if name.startswith("gate")] == ["gate_product", "gate_gradients"]
    assert launch.launches > 0 and len(nodes) == 2


def test_which_activations_have_kernels():
    assert gates.kernel_of(nn.SiLU(), torch.empty(3)) == "", "not on a GPU"
    assert gates.KERNELS["SiLU"] == "silu" and set(gates.KERNELS.values()) <= {"silu", "gelu_tanh"} and "GELU" not in gates.KERNELS
