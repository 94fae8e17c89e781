"""Small models with PEFT's LoRA, stock and fused, and the comparison of the two against float64."""

import contextlib
import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels.integrations.peft as ours
import lora_kernels.integrations.peft_mixed as ours_mixed
from lora_kernels import philox
from lora_kernels.integrations.peft import fuse
from lora_kernels.parity import budget_used

X = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second = nn.Linear(24, 32, dtype=dtype), nn.Linear(32, 16, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def config(**changed) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["first", "second"], "r": 4, "lora_alpha": 8, "init_lora_weights": False, **changed})


def pair(dtype=torch.float32, net=Net, **changed):
    """The same model with PEFT's layers, and fused; and fuse's report."""
    torch.manual_seed(0)
    stock = get_peft_model(net(dtype), config(**changed))
    fused = copy.deepcopy(stock)
    return stock, fused, fuse(fused)


def both(stock, fused, change) -> None:
    """The same change to both models, from the same random numbers."""
    for model in (stock, fused):
        torch.manual_seed(3)
        change(model)


def layers(model) -> list[lora.Linear]:
    return [m for m in model.modules() if isinstance(m, lora.Linear)]


def train_all(model) -> None:
    """Gradients for every adapter, not for the active ones alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def adapters_to(model, dtype) -> None:
    for layer in layers(model):
        layer.lora_A.to(dtype), layer.lora_B.to(dtype)


class Masked(nn.Module):
    """Dropout with the mask that a fused call on an input of this shape makes of this seed; of these samples of it."""

    def __init__(self, p, seed, shape, samples=slice(None)):
        super().__init__()
        self.p, self.keep = p, philox.keep_mask(seed, math.prod(shape[:-1]), shape[-1], p).reshape(shape)[samples]

    def forward(self, x):
        return torch.where(self.keep, x * philox.inv_keep(self.p), 0.0)


def count_calls(monkeypatch, name: str, *modules) -> list[dict]:
    """The calls of this function that the modules make from here on: their keyword arguments."""
    made, real = [], getattr(modules[0], name)

    def count(*args, **kwargs):
        made.append(kwargs)
        return real(*args, **kwargs)

    for module in modules:
        monkeypatch.setattr(module, name, count)
    return made


@pytest.fixture
def counted(monkeypatch):
    """The calls of lora_linear that fused layers made."""
    return count_calls(monkeypatch, "lora_linear", ours, ours_mixed)


def results(model, x, within=contextlib.nullcontext, **kwargs) -> dict[str, torch.Tensor]:
    """y, dX and every parameter's gradient, of a loss that weighs each element differently."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with within():
        y = model(x, **kwargs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    (y.double() * weights).sum().backward()
    grads = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads}


def checkpoint_first(model, reentrant: bool) -> None:
    """Have the model's first layer computed again in the backward pass."""
    inner = model.base_model.model
    first, second = inner.first, inner.second
    inner.forward = lambda x: second(torch.tanh(checkpoint(first, x, use_reentrant=reentrant)))


def checkpointed_alike(model, x, reentrant: bool) -> None:
    """y and all gradients bit for bit the same where the first layer is computed again, its dropout mask too."""
    torch.manual_seed(5)
    plain = results(model, x)
    checkpoint_first(model, reentrant)
    torch.manual_seed(5)
    for name, value in results(model, x).items():
        assert torch.equal(plain[name], value), name


def autocast_alike(stock, fused, calls) -> None:
    """In bfloat16's precision, and each result in PEFT's dtype; two fused calls."""
    within = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    mine, theirs = results(fused, X, within), results(stock, X, within)
    assert len(calls) == 2 and mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype is value.dtype, name
        torch.testing.assert_close(mine[name], value, rtol=0.05, atol=0.03 * value.abs().max().item(), msg=name)


def dropped_alike(stock, fused, calls) -> None:
    """With dropout of 0.4 the same numbers of torch's generator, so that a seed gives PEFT's masks; two fused calls."""
    found = []
    for model in (stock, fused):
        torch.manual_seed(7)
        found.append(results(model, X))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item(), msg=name)
    assert [call["dropout_p"] for call in calls] == [0.4, 0.4] and all(call["training"] for call in calls)


def trained_alike(stock, fused, calls) -> None:
    """Five steps by AdamW give PEFT's losses; merged then, the fused model is PEFT's own."""
    losses = []
    for model in (stock, fused):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        own = []
        for _ in range(5):
            loss = model(X).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(loss.item())
        losses.append(own)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-6)
    assert len(calls) == 10 and losses[0][-1] < losses[0][0]
    both(stock, fused, lambda model: model.merge_adapter())
    torch.testing.assert_close(fused(X), stock(X))
    assert len(calls) == 10, "merged it is PEFT's forward"


def agree(stock, fused, x=X, within=contextlib.nullcontext, precise=None, rounded=None, **kwargs) -> None:
    """y and all gradients within the budget of docs/numerics.md: truth is the stock model in float64, torch's error the stock model's.

    precise: The model in float64, where the stock one's base is no matrix that could be widened.
    rounded: The dtype of the budget's roundings, x's, also where gradients are float32; None: each tensor's own, which is less.

    In 16 bits the stock model runs under autocast: float32 adapters enter the product rounded to x's dtype, there as here.
    """
    truth = results(copy.deepcopy(stock).double() if precise is None else precise, x.double(), **kwargs)
    sixteen = x.dtype in (torch.float16, torch.bfloat16)
    same = results(stock, x, (lambda: torch.autocast("cpu", x.dtype)) if sixteen else within, **kwargs)
    got = results(fused, x, within, **kwargs)
    assert got.keys() == same.keys() == truth.keys() and len(got) > 2
    for name, value in got.items():
        assert value.dtype == same[name].dtype and value.shape == same[name].shape, name
        used = budget_used(value, same[name], truth[name], rounded)
        assert used <= 1, f"{name} uses {used:.2f} of its budget"
