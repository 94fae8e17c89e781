"""DoRA, the adapter's bias and merging against PEFT's own layers in float64: y, every gradient, and the merged weight."""

import peft
import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear

K, N, R = 34, 21, 4
KINDS = pytest.mark.parametrize("kind", ["plain", "rslora", "lora_bias", "dora", "dora, dropout"])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(K, N, dtype=torch.float64)

    def forward(self, x):
        return self.lin(x)


def pair(kind: str) -> tuple[nn.Module, FusedLoRALinear]:
    """A PEFT layer and ours with the same values."""
    kwargs = dict(use_rslora=kind == "rslora", lora_bias=kind == "lora_bias", use_dora=kind.startswith("dora"))
    dropout = 0.4 if "dropout" in kind else 0.0
    config = peft.LoraConfig(r=R, lora_alpha=6, target_modules=["lin"], lora_dropout=dropout, **kwargs)
    theirs = peft.get_peft_model(Model(), config).base_model.model.lin
    ours = FusedLoRALinear(K, N, r=R, lora_alpha=6, lora_dropout=dropout, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        theirs.lora_B["default"].weight.normal_()
        ours.weight.copy_(theirs.base_layer.weight), ours.bias.copy_(theirs.base_layer.bias)
        ours.lora_A.copy_(theirs.lora_A["default"].weight), ours.lora_B.copy_(theirs.lora_B["default"].weight)
        if kind == "lora_bias":
            ours.lora_bias.copy_(theirs.lora_B["default"].bias.normal_())
        if kind.startswith("dora"):
            ours.reset_magnitude()
            theirs.lora_magnitude_vector["default"].weight.copy_(ours.lora_magnitude * torch.rand(N).double())
            ours.lora_magnitude.copy_(theirs.lora_magnitude_vector["default"].weight)
    return theirs, ours


def parameters(theirs, ours) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    named = [("A", theirs.lora_A["default"].weight, ours.lora_A), ("B", theirs.lora_B["default"].weight, ours.lora_B)]
    if ours.lora_bias is not None:
        named.append(("lora_bias", theirs.lora_B["default"].bias, ours.lora_bias))
    if ours.lora_magnitude is not None:
        named.append(("magnitude", theirs.lora_magnitude_vector["default"].weight, ours.lora_magnitude))
    return named


@KINDS
def test_forward_and_gradients(kind):
    theirs, ours = pair(kind)
    x, dy = torch.randn(2, 7, K, dtype=torch.float64), torch.randn(2, 7, N, dtype=torch.float64)
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(3)  # DoRA's dropout is torch's in both
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)
    for name, a, b in parameters(theirs, ours):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@KINDS
def test_merged(kind):
    theirs, ours = pair(kind)
    x = torch.randn(7, K, dtype=torch.float64)
    theirs.eval(), ours.eval()
    base = ours.weight.clone()
    theirs.merge()
    ours.merge()
    torch.testing.assert_close(ours.weight, theirs.base_layer.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-11)
    ours.unmerge()
    assert torch.equal(ours.weight, base)
