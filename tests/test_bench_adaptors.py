"""Adaptors to peers' kernels, on stand-ins for the peers in plain torch: what they import, in which order they call, and with what."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # bench is not installed with the package
    sys.path.insert(0, str(ROOT))

pytest.importorskip("triton")
from bench import multi_peers, peer_modules, single_peers  # noqa: E402
from bench.multi_check import Arm, Checker  # noqa: E402
from bench.multi_workloads import MultiPoint  # noqa: E402
from bench.workloads import Point  # noqa: E402

CPU = torch.device("cpu")
MANY = MultiPoint("popularity", "small", 12, 64, 48, 8, dtype=torch.float32, loaded=16, popularity="uniform")
POINTS = (MANY, replace(MANY, popularity="none"), replace(MANY, popularity="distinct", r=16, ranks=(4, 16)))
PUT_THERE = ("git clone", "pip install")

LORAFUSION = {
    "config": """
from loguru import logger
from dataclasses import dataclass
from types import SimpleNamespace
@dataclass(frozen=True)
class Tile:
    num_stages: int = 4
H100_CONFIG = SimpleNamespace(fused_lora_xw_sb=Tile(), fused_lora_dys_dyb=Tile(), fused_lora_dyw_dsa=Tile())
def get_hardware_config():
    raise ValueError("GPU H200 not supported")
""",
    "dropout": """
import torch
from lorafusion.utils.benchmark import benchmark
def seeded_dropout(x, p, seed=None, *, store_mask=True):
    keep = torch.rand_like(x) >= p
    return torch.where(keep, x / (1 - p), 0.0), keep
""",
    "fused_lora_xw_sb": """
from triton import OutOfResources
def fused_lora_xw_sb(x, w, s, b, alpha, bias=None, *, config=None):
    if config.num_stages > 2:
        raise OutOfResources(2, 1, "shared memory")
    return x @ w.T + (s @ b.T) * alpha
""",
    "fused_lora_dys_dyb": """
def fused_lora_dys_dyb(dy, b, s, alpha, *, config=None):
    return (dy.T @ s) * alpha, (dy @ b) * alpha
""",
    "fused_lora_dyw_dsa": """
import torch
def fused_lora_dyw_dsa(dy, w, ds, a, dropout_p, dropout_mask=None, *, config=None):
    assert dropout_mask.shape == (len(dy), w.shape[1])
    return dy @ w + torch.where(dropout_mask, ds @ a / (1 - dropout_p), 0.0)
""",
}
VLLM = {
    "utils": """
from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.math_utils import next_power_of_2
_LORA_A_PTR_DICT, _LORA_B_PTR_DICT = {"stale": 1}, {"stale": 1}
init_logger(__name__).warning_once("default tiles")
""",
    "lora_kernel_metadata": """
from dataclasses import dataclass
@dataclass
class LoRAKernelMeta:
    ids: object
    @staticmethod
    def make(max_loras, max_num_tokens, device):
        return LoRAKernelMeta(None)
    def prepare_tensors(self, ids):
        self.ids = ids
    def meta_args(self, token_nums, specialize_active_lora):
        return self.ids[:token_nums], specialize_active_lora
""",
    "lora_shrink_op": """
import torch
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import direct_register_custom_op
def lora_shrink(x, A, u, ids, specialized, scale):
    for i, its in enumerate(A):
        assert its.is_contiguous()
        u[i] = (its[ids] @ x[:, :, None])[:, :, 0].float() * scale * (ids >= 0)[:, None]
try:
    direct_register_custom_op(op_name="lora_shrink", op_func=lora_shrink, mutates_args=[])
    lora_shrink = None
except AttributeError:
    pass
""",
    "lora_expand_op": """
import torch
def lora_expand(u, B, y, ids, specialized, offset_start=0, add_inputs=False):
    y += torch.cat([(its[ids] @ part.to(y.dtype)[:, :, None])[:, :, 0] for its, part in zip(B, u, strict=True)], 1)
""",
}
SGLANG = {
    "srt/lora/utils": """
from enum import Enum
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.utils.hf_transformers_utils import AutoConfig
class Phase(str, Enum):
    DECODE, PREFILL = "decode", "prefill"
""",
    "srt/lora/workspace": "class LoraWorkspace: pass",
    "kernels/ops/lora/common/routing": "from sglang.kernels.ops.lora.moe.virtual_experts import _align_block_size_jit",
    "srt/lora/dense/runner": """
from types import SimpleNamespace
from sglang.kernels.ops.lora.common import routing
from sglang.srt.environ import envs
import torch
DenseLoraKind = SimpleNamespace(LINEAR="linear")
class DenseLoraRunner:
    def __init__(self, workspace, *, max_loras, device):
        assert envs.SGLANG_LORA_DENSE_CONFIG_DIR.get() is None
    def begin_batch(self, *, token_slots, lora_ranks, scalings, num_tokens, phase, graph_mode):
        assert phase == "decode" and len(token_slots) == num_tokens
        self.ids, self.scalings, self.lora_ranks = token_slots, scalings, lora_ranks
    def plan_for(self, kind, max_rank, in_features, out_features, *, num_tokens):
        return max_rank, in_features, out_features
    def apply(self, x, base_fn, plan, *, a, b, offsets):
        assert plan == (b.shape[2], x.shape[1], offsets[-1]) and self.lora_ranks.max() == b.shape[2]
        scale = self.scalings[self.ids] * (self.ids >= 0)
        As, ends = a.chunk(len(offsets) - 1, 1), zip(offsets, offsets[1:])
        parts = [(b[self.ids, i:j] @ (A[self.ids] @ x[:, :, None]))[:, :, 0] for A, (i, j) in zip(As, ends)]
        return base_fn() + torch.cat(parts, 1) * scale[:, None]
""",
}
PUNICA = """
import punica.utils
def add_lora_bgmv(y, x, A, B, ids, layer, scale):
    assert (ids >= 0).all() and A.is_contiguous() and B.is_contiguous()
    y += (B[ids, layer] @ (A[ids, layer] @ x[:, :, None]))[:, :, 0] * scale
"""


@pytest.fixture
def peers(tmp_path, monkeypatch) -> Path:
    """An empty folder for peers; what they leave in sys goes with it."""
    monkeypatch.setattr(peer_modules, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    before = dict(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("lorafusion", "loguru", "vllm", "sglang", "punica"):
            del sys.modules[name]


def put(folder: Path, files: dict[str, str]) -> None:
    """The files, in packages that cannot be imported as they are."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").write_text("import a_module_that_is_not_there")


def test_what_is_not_there_says_how_to_get_it(peers):
    refused = peer_modules.load("lora_linear")[1] | multi_peers.load()[1]
    assert set(refused) == {f"peer:{name}" for names in peer_modules.KNOWN.values() for name in names}
    for reason in refused.values():
        assert reason.startswith("there is no bench/peers/") and any(command in reason for command in PUT_THERE)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_lorafusion(peers, p):
    put(peers / "lorafusion/lorafusion/ops/triton_ops", LORAFUSION)
    module = peer_modules.load("lora_linear")[0]["peer:lorafusion"]
    assert single_peers.wrong(Point("train", "small", 64, 256, 80, 8, p, torch.float32), module, CPU) is None
    assert module.TILES["fused_lora_xw_sb", 8].num_stages == 2 and module.TILES["fused_lora_dyw_dsa", 8].num_stages == 4
    with pytest.raises(ValueError, match="multiple of 256.* got 64"):
        single_peers.wrong(Point("train", "small", 64, 64, 80, 8, p, torch.float32), module, CPU)


@pytest.mark.parametrize(
    "name, folder, files",
    [
        ("vllm", "vllm/vllm/lora/ops/triton_ops", VLLM),
        ("sglang", "sglang/python/sglang", SGLANG),
        ("punica", "site/punica", {"ops": PUNICA}),
    ],
)
def test_many_adapters(peers, name, folder, files):
    put(peers / folder, files)
    if name == "punica":
        put(peers / folder / "utils", {"kvcache": ""})
        (peers / folder / "utils/__init__.py").write_text("")
    module = multi_peers.load()[0][f"peer:{name}"]
    packed = replace(MANY, widths=(32, 7, 9))
    assert multi_peers.packs(module) == (name != "punica")
    for point in (*POINTS, packed) if multi_peers.packs(module) else POINTS:
        assert Checker(CPU).wrong(point, name, Arm(multi_peers.formula(module, decode=True))) is None
    if name == "vllm":
        assert not module.utils._LORA_A_PTR_DICT and module.plan(torch.zeros(3), [8], 1.0, True)[0][1] is True
    if name == "punica":
        with pytest.raises(ValueError, match="got 1 of 2 without"):
            module.plan(torch.tensor([-1, 0]), [8], 1.0, True)
