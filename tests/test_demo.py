"""The demo: its data, the layers it replaces, its comparison, its errors, and one quick run from end to end."""

from __future__ import annotations

import argparse
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear, demo, demo_data, demo_peft


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(flags)


def need(*packages: str) -> None:
    for name in packages:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; it belongs to the optional extra [demo]")


@pytest.fixture(scope="module")
def encoder():
    need("transformers", demo_data.MODEL_PACKAGE)
    return demo_data.load_encoder(torch.device("cpu"))[0]


def test_quick_run(capsys):
    need("transformers", demo_data.MODEL_PACKAGE, demo_data.CORPUS_PACKAGE)
    assert demo.run(parse("--quick", "--device", "cpu")) == 0
    shown = capsys.readouterr().out
    for wanted in ("'torch' in 36 of 36 layers", "accuracy after 1 epoch ", "PEFT / fused", "36 of 36 weights given back bit for bit"):
        assert wanted in shown
    assert "FAILED" not in shown


def test_quick_run_through_peft(capsys):
    need("transformers", "peft", demo_data.MODEL_PACKAGE, demo_data.CORPUS_PACKAGE)
    assert demo.run(parse("--peft", "--quick", "--device", "cpu")) == 0
    shown = capsys.readouterr().out
    for wanted in ("36 LoRA layers fused, 0 left", "accuracy after 1 epoch ", "the same topic for 32 of 32", "PEFT / fused"):
        assert wanted in shown
    assert "FAILED" not in shown


def write_articles(folder, articles) -> None:
    for i, (topic, first_line) in enumerate(articles):
        (folder / topic).mkdir(exist_ok=True)
        (folder / topic / f"{i:03}.txt").write_bytes(first_line + b"\n\nThe body of the article.\n")


def test_titles_are_read_whatever_their_encoding(tmp_path):
    first_lines = [("tech", "Price falls to £9".encode()), ("tech", b"Price falls to \xa38"), ("tech", b""), ("sports", b"Cup\r")]
    write_articles(tmp_path, first_lines)
    assert demo_data.read_titles(tmp_path) == [("Cup", "sports"), ("Price falls to £9", "tech"), ("Price falls to £8", "tech")]


def test_no_articles_is_an_error(tmp_path):
    with pytest.raises(demo_data.CannotRun, match="wanted articles"):
        demo_data.read_titles(tmp_path)


def key(title: str) -> str:
    return " ".join(title.casefold().split())


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_are_dropped_before_the_split(seed):
    titles = [(f"Title {i}", "tech") for i in range(20)]
    rows = titles + [("TITLE  3", "tech"), ("Title 3", "tech"), ("title 7 ", "tech")]
    train, test = demo_data.split(rows, 8, seed)
    assert len(test) == 8 and len(train) == 12
    assert sorted(train + test) == sorted(titles)
    assert not {key(t) for t, _ in train} & {key(t) for t, _ in test}
    assert (train, test) == demo_data.split(rows, 8, seed)


def test_split_refuses_a_test_set_that_leaves_nothing_to_train_on():
    with pytest.raises(ValueError, match="wanted from 1 to 1 of the 2 distinct titles, got 2"):
        demo_data.split([("a", "tech"), ("b", "tech"), ("A", "tech")], 2, 0)


def test_the_real_corpus_splits_into_disjoint_parts():
    need(demo_data.CORPUS_PACKAGE)
    rows = demo_data.read_titles()
    train, test = demo_data.split(rows, demo.TEST, 0)
    assert (len(rows), len(train), len(test)) == (2225, 1596, 500)
    assert len({key(t) for t, _ in train} | {key(t) for t, _ in test}) == 2096
    assert len({topic for _, topic in train}) == len({topic for _, topic in test}) == 5


def test_batches_are_padded_and_masked():
    def tokenizer(titles, truncation, max_length):
        return {"input_ids": [[1] * min(len(title), max_length) for title in titles]}

    tokenizer.pad_token_id = 9
    rows = [("a" * n, "tech") for n in (3, 1, 2, 50)]
    batches = list(demo_data.Headlines(rows, ["tech"], tokenizer, torch.device("cpu")).batches(3))
    assert batches[0].ids.tolist() == [[1, 1, 1], [1, 9, 9], [1, 1, 9]]
    assert batches[0].mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batches[1].ids.shape == (1, demo_data.MAX_LENGTH)


@pytest.mark.parametrize("missing", [["transformers"], [demo_data.MODEL_PACKAGE, demo_data.CORPUS_PACKAGE]])
def test_missing_packages_end_with_one_clear_error(monkeypatch, capsys, missing):
    real = importlib.util.find_spec

    def find_spec(name, *rest):
        return None if name in missing else real(name, *rest) or SimpleNamespace()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert demo.run(parse("--quick")) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert 'pip install "lora_kernels[demo]"' in shown.err and all(name in shown.err for name in missing)


def test_peft_missing_ends_with_one_clear_error(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else SimpleNamespace())
    assert demo.run(parse("--peft", "--quick")) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1 and 'pip install "lora_kernels[demo,peft]"' in shown.err


def test_a_missing_gpu_is_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "check_packages", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo.run(parse("--device", "cuda")) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--rank", "0"), ("--rank", "513"), ("--epochs", "x"), ("--dropout", "1"), ("--lr", "nan")])
def test_flags_out_of_range_are_refused(capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        parse(*flags)
    assert f"got {flags[1]!r}" in capsys.readouterr().err


def test_every_targeted_linear_is_replaced_and_shares_its_weight(encoder):
    linears = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    pointers = {name: (linear.weight.data_ptr(), linear.bias.data_ptr()) for name, linear in linears.items()}
    layers = demo.adapt(encoder, rank=4, dropout=0.0)
    assert len(layers) == 36 and layers.keys() == linears.keys()
    for name, layer in layers.items():
        assert encoder.get_submodule(name) is layer and type(layer) is FusedLoRALinear
        assert (layer.weight.data_ptr(), layer.bias.data_ptr()) == pointers[name]
    model = demo_data.Classifier(encoder, nn.Linear(384, 5))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {f"encoder.{name}.{part}" for name in layers for part in ("lora_A", "lora_B")}
    assert trained == wanted | {"head.weight", "head.bias"}


def test_other_linears_are_left_alone():
    linears = {name: nn.Linear(4, 4) for name in ("query", "key", "value", "other")}
    block = nn.ModuleDict({**linears, "output": nn.ModuleDict({"dense": nn.Linear(4, 4)})})
    assert demo.adapt(block, rank=2, dropout=0.0).keys() == {"query", "key", "value", "output.dense"}
    assert type(block["other"]) is nn.Linear


def test_peft_formula_is_the_same_function():
    torch.manual_seed(0)
    layer = FusedLoRALinear(6, 5, r=2, init_lora_weights=False, dtype=torch.float64)
    formula = demo.PeftFormula(layer)
    x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 7, 5, dtype=torch.float64)
    wanted = [x, layer.lora_A, layer.lora_B]
    results = [(f(x), *torch.autograd.grad(f(x), wanted, dy)) for f in (layer, formula)]
    for name, ours, theirs in zip(("y", "dX", "dA", "dB"), *results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


def test_kept_bytes_count_each_storage_once_and_no_parameter():
    model = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    batch = demo_data.Batch(ids=torch.zeros(1), mask=torch.zeros(1), labels=torch.zeros(1))
    assert demo.step_bytes(model, lambda _: model(x).sum().backward(), batch) == x.nbytes
    assert demo.step_bytes(model, lambda _: (x * x.view(4, 8)).sum().backward(), batch) == x.nbytes


def test_failures_name_what_does_not_hold():
    assert demo.failures(0.8, 0.9, 1.0, 36, 36, quick=False) == []
    assert demo.failures(0.9, 0.8, 1.0, 36, 36, quick=True) == []
    (lora,) = demo.failures(0.9, 0.9, 1.0, 36, 36, quick=False)
    assert lora.startswith("head + LoRA: wanted a better accuracy")
    assert [s.split(":")[0] for s in demo.failures(0.9, 0.8, 0.994, 35, 36, quick=False)] == ["head + LoRA", "merge", "unmerge"]


def test_peft_failures_name_a_lower_accuracy():
    assert demo_peft.failures(0.90, 0.91, 500) == demo_peft.failures(0.91, 0.90, 500) == []
    (sentence,) = demo_peft.failures(0.87, 0.90, 500)
    assert sentence == "accuracy: wanted PEFT's 0.900 within its standard error of 0.013, got 0.870"


def test_merge_and_unmerge_notices_a_wrong_layer(monkeypatch):
    layer = FusedLoRALinear(4, 3, r=2, init_lora_weights=False)
    originals = {"layer": layer.weight.clone()}
    data = SimpleNamespace(batches=lambda size: [torch.randn(200, 4, generator=torch.Generator().manual_seed(0))])
    agree, gap, exact = demo.merge_and_unmerge(layer, {"layer": layer}, originals, data)
    assert agree == 1.0 and gap < 1e-5 and exact == 1
    monkeypatch.setattr(FusedLoRALinear, "merge", lambda self: self.weight.data.mul_(-1))
    monkeypatch.setattr(FusedLoRALinear, "unmerge", lambda self: None)
    agree, gap, exact = demo.merge_and_unmerge(layer, {"layer": layer}, originals, data)
    assert agree < 0.9 and gap > 1e-3 and exact == 0
