"""``inspect`` on adapters that PEFT saved: its numbers against PEFT's own update, what it refuses, and its exit codes."""

import copy
import json
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import analysis, cli

FILE = "adapter_model.safetensors"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(12, 24), "v": nn.Linear(24, 12)}) for _ in range(11)])
        self.conv = nn.Conv1d(4, 8, 3)
        self.head = nn.Linear(12, 2)


CHANGED = dict(rank_pattern={"0.q": 2}, alpha_pattern={"layers.1.v": 3}, use_rslora=True, modules_to_save=["head"])


def saved(folder, seed=0, **changed):
    """A PEFT model and the folder it was saved to; A and B are random, of one magnitude."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(9)
    net = Net()
    torch.manual_seed(seed)
    config = LoraConfig(**{"target_modules": ["q", "v", "words", "conv"], "r": 4, "lora_alpha": 8, "init_lora_weights": False, **changed})
    model = get_peft_model(copy.deepcopy(net), config)
    model.save_pretrained(folder)
    save_file(net.state_dict(), folder / "base.safetensors")
    return model, folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("adapter"), **CHANGED)


@pytest.fixture
def folder(adapter, tmp_path):
    """A copy to be spoiled."""
    return shutil.copytree(adapter[1], tmp_path / "copy")


def inspect(capsys, *args) -> tuple[int, str, str]:
    code = cli.main(["inspect", *map(str, args)])
    out = capsys.readouterr()
    return code, out.out, out.err


def rows_of(capsys, *args) -> dict:
    code, out, err = inspect(capsys, *args, "--json")
    assert code == 0, err
    return json.loads(out)


def rewrite(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def reconfigure(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


Q5, V5 = "base_model.model.layers.5.q.lora_A.weight", "base_model.model.layers.5.v.lora_B.weight"


def test_every_row_is_pefts_update(adapter, capsys):
    """get_delta_weight is PEFT's own scale * B A: embeddings, convolutions, patterns of rank and alpha, and rank-stabilised scales."""
    model, folder = adapter
    rows = {row["name"]: row for row in rows_of(capsys, folder)["matrices"]}
    layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert rows.keys() == layers.keys() and len(rows) == 24
    for name, layer in layers.items():
        delta, row = layer.get_delta_weight("default").detach().double(), rows[name]
        s = torch.linalg.svdvals(delta.flatten(1))[: row["r"]]
        assert row["norm"] == pytest.approx(delta.norm().item(), rel=1e-5), name
        assert row["r"] == row["rank"] == layer.r["default"] and row["scale"] == pytest.approx(layer.scaling["default"])
        assert row["stable_rank"] == pytest.approx((s.square().sum() / s[0] ** 2).item(), rel=1e-5)
        assert row["effective_rank"] == pytest.approx((-(s / s.sum()) * (s / s.sum()).log()).sum().exp().item(), rel=1e-5)
        share = (s.square().cumsum(0) / s.square().sum()).tolist()
        assert row["top_1"] == pytest.approx(share[0], rel=1e-5) and row["top_90"] == 1 + [x >= 0.9 for x in share].index(True)
    assert rows["layers.0.q"]["r"] == 2 and rows["layers.10.q"]["r"] == 4, "the pattern 0.q names layer 0 alone"
    names = [name for name in rows if name.endswith("q")]
    assert names == [f"layers.{i}.q" for i in range(11)], "layer 10 comes after layer 9"


def test_the_table_and_the_summary(adapter, capsys):
    model, folder = adapter
    code, out, err = inspect(capsys, folder)
    assert code == 0 and not err
    lines = out.splitlines()
    assert lines[0].split() == "matrix shape r scale |dW| rank effective stable top 1 90%".split()
    assert next(line for line in lines if line.startswith("layers.3.q")).split()[1:4] == ["24x12", "4", "4"]
    parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    others = sum(p.numel() for p in nn.Linear(12, 2).parameters())
    assert f"parameters  {parameters:,} of A and B (F32), and {others} in other tensors" in out
    q = sum(p.numel() for name, p in model.named_parameters() if ".q.lora_" in name)
    assert f"{8 * parameters / 1000:.3g} kB of Adam's moments" in out and f"q {q / parameters:.1%}" in out
    assert "2 tensors trained whole (modules_to_save, biases) are left out" in out


def test_amplification_of_the_base(adapter, capsys):
    model, folder = adapter
    found = rows_of(capsys, folder, "--base", folder / "base.safetensors")
    base = load_file(folder / "base.safetensors")
    for row in found["matrices"]:
        W = base[row["name"] + ".weight"].flatten(1).double()
        delta = model.base_model.model.get_submodule(row["name"]).get_delta_weight("default").detach().flatten(1).double()
        U, _, Vh = torch.linalg.svd(delta)
        projected = (U[:, : row["r"]].T @ W @ Vh[: row["r"]].T).norm().item()
        assert row["weight_norm"] == pytest.approx(W.norm().item(), rel=1e-9)
        assert row["projected"] == pytest.approx(projected, rel=1e-4) and row["factor"] == pytest.approx(row["norm"] / projected, rel=1e-4)
    summary = found["summary"]
    sizes = [(folder / name).stat().st_size for name in (FILE, "base.safetensors")]
    assert [summary["bytes"], summary["base_bytes"]] == sizes and summary["shared_bytes"] == sizes[1] + 100 * sizes[0]
    assert summary["copies_bytes"] == 100 * sizes[1] and summary["adapters_per_copy"] == sizes[1] // sizes[0]


def test_a_base_in_shards_with_another_prefix(adapter, tmp_path, capsys):
    _, folder = adapter
    base = {f"model.{name}": tensor for name, tensor in load_file(folder / "base.safetensors").items()}
    names = sorted(base)
    save_file({name: base[name] for name in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: base[name] for name in names[1::2]}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({name: base[name] for name in names}, tmp_path / "consolidated.safetensors")
    found = rows_of(capsys, folder, "--base", tmp_path)
    assert all("factor" in row for row in found["matrices"])
    assert found["summary"]["base_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("model-*")), "not the whole a second time"
    code, out, _ = inspect(capsys, folder, "--base", tmp_path)
    assert code == 0 and "|UtWV|" in out and "100 such adapters" in out


def test_a_base_without_the_adapters_prefix(adapter, folder, capsys):
    """An adapter of bert.layers.0.q on a checkpoint of layers.0.q."""
    rewrite(
        folder, lambda tensors: [tensors.update({key.replace("model.model.", "model.model.bert."): tensors.pop(key)}) for key in [*tensors]]
    )
    base = adapter[1] / "base.safetensors"
    straight, longer = (rows_of(capsys, f, "--base", base)["matrices"] for f in (adapter[1], folder))
    assert [row["factor"] for row in straight] == [row["factor"] for row in longer]


def test_fan_in_fan_out(folder, tmp_path, capsys):
    """GPT-2's weights are stored [K, N]."""
    straight = rows_of(capsys, folder, "--base", folder / "base.safetensors")["matrices"]
    base = {n: t.T.contiguous() if n.startswith("layers") and t.ndim == 2 else t for n, t in load_file(folder / "base.safetensors").items()}
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "conv" in key])
    reconfigure(folder, fan_in_fan_out=True)
    save_file(base, tmp_path / "turned.safetensors")
    turned = rows_of(capsys, folder, "--base", tmp_path / "turned.safetensors")["matrices"]
    for row, wanted in zip(turned, straight[1:], strict=True):
        assert row == {key: pytest.approx(value, rel=1e-12) if isinstance(value, float) else value for key, value in wanted.items()}


def test_similarity_of_two_adapters(adapter, tmp_path, capsys):
    model, folder = adapter
    other, theirs = saved(tmp_path, seed=1, r=6)
    found = rows_of(capsys, folder, "--against", theirs)["matrices"]
    for row in found:
        pair = [load_file(f / FILE) for f in (folder, theirs)]
        ours = [[v.flatten(1) for k, v in t.items() if f".{row['name']}.lora_" in k] for t in pair]  # A, B of each
        for place, factor, side in ((0, "A", "right"), (1, "B", "left")):
            grid = analysis.subspace_similarity(ours[0][place], ours[1][place], side)
            assert row[f"{factor}_1"] == pytest.approx(grid[0, 0].item()) and row[f"{factor}_all"] == pytest.approx(grid[-1, -1].item())
            dim = row["shape"][1 - place]
            assert row[f"{factor}_by_chance"] == pytest.approx(max(grid.shape) / dim), row
    itself = rows_of(capsys, folder, "--against", folder)["matrices"]
    assert all(row[key] == pytest.approx(1) for row in itself for key in ("A_1", "A_all", "B_1", "B_all"))
    code, out, _ = inspect(capsys, folder, "--against", theirs)
    assert code == 0 and out.splitlines()[0].split()[-10:] == "A 1:1 A all by chance B 1:1 B all by chance".split()[-10:]


def test_a_fresh_adapter(tmp_path, capsys):
    _, folder = saved(tmp_path, init_lora_weights=True)
    code, out, err = inspect(capsys, folder, "--base", folder / "base.safetensors", "--against", folder)
    assert code == 0, err
    assert out.count("dW = 0, as before training") == 24 and "nan" not in out
    row = next(line for line in out.splitlines() if line.startswith("layers.0.q")).split()
    assert row[4:8] == ["0", "0", "0.00", "0.00"]


@pytest.mark.parametrize(
    "field, note",
    [
        ("use_dora", "DoRA: its 11 magnitude vectors are left out; every number is of scale * B A alone"),
        ("lora_bias", "11 more LoRA tensors (such as a bias of the adapter) are left out"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*invalid shape")  # PEFT takes its own bias of the adapter for a broken shard
def test_what_is_left_out_is_named(field, note, tmp_path, capsys):
    _, folder = saved(tmp_path, target_modules=["q"], **{field: True})
    code, out, _ = inspect(capsys, folder)
    assert code == 0 and note in out


def test_changed_bases_are_named(folder, capsys):
    reconfigure(folder, init_lora_weights="pissa_niter_4")
    assert "init_lora_weights = 'pissa_niter_4' changed the base" in inspect(capsys, folder)[1]


def test_nan_is_exit_code_1(folder, capsys):
    rewrite(folder, lambda tensors: tensors[Q5].fill_(float("nan")))
    code, out, _ = inspect(capsys, folder)
    bad = [line for line in out.splitlines() if "BAD" in line]
    assert code == 1 and len(bad) == 1 and bad[0].startswith("layers.5.q ") and "NaN or Inf in lora_A or lora_B" in bad[0]
    assert inspect(capsys, folder, "--json")[0] == 1


def test_nan_beside_the_adapter_is_exit_code_1(adapter, folder, capsys):
    ours = adapter[1]
    rewrite(folder, lambda tensors: tensors[V5].fill_(float("inf")))
    code, out, _ = inspect(capsys, ours, "--against", folder)
    assert code == 1 and out.count("BAD: NaN or Inf in the other's lora_B") == 1
    base = load_file(ours / "base.safetensors")
    base["conv.weight"][0, 0, 0] = float("nan")
    save_file(base, folder / "base.safetensors")
    code, out, _ = inspect(capsys, ours, "--base", folder / "base.safetensors")
    assert code == 1 and out.count("BAD: NaN or Inf in the base's weight") == 1


def test_heat_maps_of_every_matrix(adapter, tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(analysis, "plot_similarity", lambda grid, path, **labels: drawn.update({path: (grid, labels)}))
    _, theirs = saved(tmp_path / "other", seed=1, r=6)
    assert inspect(capsys, adapter[1], "--against", theirs, "--plot", tmp_path / "plots")[0] == 0
    assert len(drawn) == 24 and (tmp_path / "plots").is_dir()
    grid, labels = drawn[tmp_path / "plots" / "layers.10.v.png"]
    first, second = (load_file(f / FILE)["base_model.model.layers.10.v.lora_A.weight"] for f in (adapter[1], theirs))
    assert torch.equal(grid, analysis.subspace_similarity(first, second)) and labels["title"] == "layers.10.v"
    assert torch.equal(labels["control"], analysis.random_similarity(4, 6, 24))


def test_one_matrix_missing_in_the_other(folder, adapter, capsys):
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.5.q" in key])
    rows = {row["name"]: row for row in rows_of(capsys, adapter[1], "--against", folder)["matrices"]}
    assert "A_1" not in rows["layers.5.q"] and rows["layers.5.q"]["note"] == "not in the other" and "A_1" in rows["layers.5.v"]


def test_one_matrix_missing_in_the_base(adapter, tmp_path, capsys):
    base = load_file(adapter[1] / "base.safetensors")
    del base["conv.weight"]
    save_file(base, tmp_path / "base.safetensors")
    rows = rows_of(capsys, adapter[1], "--base", tmp_path / "base.safetensors")["matrices"]
    assert [row["name"] for row in rows if "factor" not in row] == ["conv"] and rows[0]["note"] == "not in the base"


def alone(folder):
    rewrite(folder, lambda tensors: tensors.pop(V5))


def alone_in_B(folder):
    rewrite(folder, lambda tensors: tensors.pop(Q5))


def cut(folder):
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:-100])


def claims_more_than_it_holds(folder):
    header = json.dumps({Q5: {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def pickled(folder):
    (folder / FILE).rename(folder / "adapter_model.bin")


def wide(folder):
    (folder / "adapter_config.json").write_text(" " * ((1 << 24) + 1))


def integers(folder):
    rewrite(folder, lambda tensors: tensors.update({Q5: torch.ones(4, 12, dtype=torch.int8)}))


def nothing_in_it(folder):
    save_file({"model.weight": torch.ones(2)}, folder / FILE)


SPOILED = [
    (alone, "wanted a lora_A and a lora_B for each matrix, got base_model.model.layers.5.v.lora_A.weight alone"),
    (alone_in_B, "got base_model.model.layers.5.q.lora_B.weight alone"),
    (cut, "wanted a whole safetensors file, got"),
    (claims_more_than_it_holds, "wanted a whole safetensors file, got"),
    (pickled, "adapter_model.bin is a pickle, which is not read"),
    (lambda folder: (folder / FILE).unlink(), f"wanted a directory with {FILE}, got"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "wanted a directory with adapter_config.json, got"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json: wanted a JSON object, got none"),
    (lambda folder: (folder / "adapter_config.json").write_text("[" * 500_000), "adapter_config.json: wanted a JSON object, got none"),
    (wide, "wanted at most 16777216 bytes, got more"),
    (integers, "wanted base_model.model.layers.5.q.lora_A.weight as F16, BF16, F32, F64, got I8"),
    (nothing_in_it, "wanted tensors named ...lora_A.weight, got model.weight"),
    (lambda folder: reconfigure(folder, peft_type="IA3"), "wanted peft_type 'LORA', got 'IA3'"),
    (lambda folder: reconfigure(folder, r=5), "wanted lora_A [5, K] and lora_B [N, 5], the rank that adapter_config.json says, got [4, "),
    (lambda folder: reconfigure(folder, r="4"), "wanted r of conv as a rank, got '4'"),
    (lambda folder: reconfigure(folder, lora_alpha=float("nan")), "wanted lora_alpha of conv as a number, got nan"),
    (lambda folder: reconfigure(folder, lora_alpha=10**400), "wanted lora_alpha of conv as a number, got 1000"),
    (lambda folder: reconfigure(folder, rank_pattern={"(": 2}), "wanted rank_pattern as regular expressions"),
    (lambda folder: reconfigure(folder, alpha_pattern=[1]), "wanted alpha_pattern as regular expressions"),
    (lambda folder: reconfigure(folder, target_parameters=["w"]), "wanted adapted modules, got target_parameters"),
]


@pytest.mark.parametrize("spoil, message", SPOILED, ids=[message[:40] for _, message in SPOILED])
def test_what_cannot_be_read_is_exit_code_2(spoil, message, folder, capsys):
    spoil(folder)
    code, out, err = inspect(capsys, folder)
    assert code == 2 and not out and err.startswith("inspect: ") and message in err


def test_wrong_companions_are_exit_code_2(adapter, folder, tmp_path, capsys):
    ours = adapter[1]
    empty, foreign, small, scalar = (
        tmp_path / name for name in ("empty", "foreign.safetensors", "small.safetensors", "scalar.safetensors")
    )
    empty.mkdir()
    save_file({"a.weight": torch.ones(2, 2)}, foreign)
    save_file({"layers.0.q.weight": torch.ones(3, 12)}, small)
    save_file({"conv.weight": torch.ones(())}, scalar)
    rewrite(folder, lambda tensors: [tensors.update({key.replace("layers", "h"): tensors.pop(key)}) for key in list(tensors)])
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".h." not in key])
    reconfigure(folder, rank_pattern={"h.0.q": 2})
    for args, message in [
        (("--base", empty), "wanted a .safetensors file or a folder of them, got none"),
        (("--base", tmp_path / "absent"), "wanted a .safetensors file or a folder of them, got none"),
        (("--base", foreign), "wanted a weight such as conv.weight, got none of them"),
        (("--base", small), "wanted layers.0.q.weight as floats [24, 12], got F32 [3, 12]"),
        (("--base", scalar), "wanted conv.weight as floats [8, 12], got F32 []"),
        (("--against", folder), "wanted a matrix such as conv, got none in common"),
        (("--against", empty), f"wanted a directory with adapter_config.json, got '{empty}' without"),
        (("--plot", tmp_path / "plots"), "--plot: wanted --against OTHER_DIR beside it, got none"),
    ]:
        code, out, err = inspect(capsys, ours, *args)
        assert code == 2 and not out and message in err, (args, err)


def test_a_missing_package_is_named(adapter, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    code, _, err = inspect(capsys, adapter[1])
    assert code == 2 and 'pip install "lora_kernels[peft]"' in err


def test_from_the_shell(adapter):
    out = subprocess.run([sys.executable, "-m", "lora_kernels", "inspect", str(adapter[1])], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.startswith("matrix") and not out.stderr, out.stderr


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["inspect", "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    for word in ("ADAPTER_DIR", "--base", "--against", "--plot", "--json", "2106.09685", "effective", "factor", "Exit code"):
        assert word in out
