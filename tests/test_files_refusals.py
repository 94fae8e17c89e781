"""Adapter files that are refused, with the model or the folder bit for bit as it was; and saves that break off."""

import json
import os
import struct
import sys

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from peft import PeftModel
from test_files import CONFIG, WEIGHTS, Q, X, assert_unchanged, base, config_of, contents, layers, ours, state, stock
from torch.distributed.fsdp import fully_shard

from lora_kernels import FusedLoRALinear, Segments, UnsupportedError, files, load_adapter, save_adapter, use_segments

HOLDS = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16)]
ROUNDS = [(torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("slot", [None, 0])
@pytest.mark.parametrize("given, mine", HOLDS + ROUNDS)
def test_dtypes(given, mine, slot, tmp_path):
    save_adapter(ours(), tmp_path, dtype=given)
    tensors = contents(tmp_path)
    assert {t.dtype for t in tensors.values()} == {given}
    model = ours(mine, num_adapters=None if slot is None else 1)
    before = state(model)
    if (given, mine) in ROUNDS:
        with pytest.raises(TypeError, match=f"wanted {mine} or what it holds exactly, got {given}; pass cast=True to round"):
            load_adapter(model, tmp_path, slot=slot)
        assert_unchanged(model, before)
    load_adapter(model, tmp_path, slot=slot, cast=(given, mine) in ROUNDS)
    for name, layer in layers(model).items():
        for part in ("lora_A", "lora_B"):
            t = getattr(layer, part).detach()
            wanted = tensors[f"base_model.model.{name}.{part}.weight"].to(mine)
            assert t.dtype == mine and torch.equal(t if slot is None else t[0], wanted)


def test_saving_several_dtypes_needs_one(tmp_path):
    model = ours(torch.bfloat16)
    model.blocks[0].q_proj.lora_A.data = model.blocks[0].q_proj.lora_A.data.float()
    with pytest.raises(ValueError, match="dtype: wanted the one to write in, .* torch.bfloat16, torch.float32; got None"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    save_adapter(model, tmp_path / "new", dtype=torch.float32)
    assert {t.dtype for t in contents(tmp_path / "new").values()} == {torch.float32}


def change_config(folder, **changed):
    config = {**config_of(folder), **changed}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def change_tensors(folder, **changed):
    """Replace, remove (None) or add tensors; a callable makes the new from the old."""
    tensors = contents(folder)
    for key, value in changed.items():
        key = f"base_model.model.{key}"
        value = value(tensors[key]) if callable(value) else value
        tensors = {k: t for k, t in tensors.items() if k != key} | ({} if value is None else {key: value})
    safetensors.torch.save_file({key: t.contiguous() for key, t in tensors.items()}, folder / WEIGHTS)


def rename_layers(folder, old, new):
    safetensors.torch.save_file({key.replace(old, new): t for key, t in contents(folder).items()}, folder / WEIGHTS)


def change_bytes(folder, change):
    (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def change_header(folder, change):
    def rewrite(raw):
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        change(header["base_model.model.blocks.0.q_proj.lora_A.weight"])
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + size :]

    change_bytes(folder, rewrite)


def pickle_instead(folder):
    torch.save(contents(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


A0, B0 = "blocks.0.q_proj.lora_A.weight", "blocks.0.q_proj.lora_B.weight"
WHOLE = "adapter_model.safetensors: wanted a whole safetensors file, got one of"
BAD = {
    "truncated": (lambda d: change_bytes(d, lambda raw: raw[:-8]), ValueError, WHOLE),
    "oversized": (lambda d: change_bytes(d, lambda raw: raw + b"\0" * 64), ValueError, WHOLE),
    "empty": (lambda d: change_bytes(d, lambda raw: b""), ValueError, f"{WHOLE} 0 bytes; safetensors says: Error"),
    "a header larger than the file": (lambda d: change_bytes(d, lambda raw: struct.pack("<Q", 1 << 60) + raw[8:]), ValueError, WHOLE),
    "a header that is no JSON": (lambda d: change_bytes(d, lambda raw: raw[:8] + b"x" + raw[9:]), ValueError, WHOLE),
    "a pickle by another name": (lambda d: torch.save({}, d / WEIGHTS), ValueError, WHOLE),
    "a terabyte declared": (
        lambda d: change_header(d, lambda t: t.update(shape=[1 << 20, 1 << 20], data_offsets=[0, 1 << 42])),
        ValueError,
        WHOLE,
    ),
    "a shape beyond its bytes": (lambda d: change_header(d, lambda t: t.update(shape=[1 << 40, 12])), ValueError, WHOLE),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, f"wanted a directory with {WEIGHTS}, got '.+' without$"),
    "pickled weights": (pickle_instead, FileNotFoundError, "adapter_model.bin is a pickle, which is not read"),
    "no config": (lambda d: (d / CONFIG).unlink(), FileNotFoundError, f"wanted a directory with {CONFIG}"),
    "a broken config": (lambda d: (d / CONFIG).write_text('{"r": 4'), ValueError, "wanted a JSON object, got none"),
    "another method": (lambda d: change_config(d, peft_type="IA3"), ValueError, "peft_type: wanted 'LORA', got 'IA3'"),
    "no rank": (lambda d: change_config(d, r="gone"), ValueError, "wanted r, lora_alpha and target_modules, got none for r"),
    "pissa": (lambda d: change_config(d, init_lora_weights="pissa"), UnsupportedError, "under which PEFT changes the base weights"),
    "another feature": (lambda d: change_config(d, use_qalora=True), UnsupportedError, "wanted plain LoRA, got use_qalora=True"),
    "a rank beyond": (
        lambda d: change_config(d, r=16),
        ValueError,
        r"blocks.0.q_proj: wanted (rank|a rank from 1 to).* got 16 in adapter_config",
    ),
    "a rank that is not the tensors'": (
        lambda d: change_tensors(d, **{A0: lambda t: t[:3]}),
        ValueError,
        r"blocks.0.q_proj.lora_A.weight: wanted shape \[4, 12\], got \[3, 12\]",
    ),
    "another width": (
        lambda d: change_tensors(d, **{B0: lambda t: torch.cat((t, t))}),
        ValueError,
        r"blocks.0.q_proj.lora_B.weight: wanted shape \[16, 4\], got \[32, 4\]",
    ),
    "another architecture": (
        lambda d: rename_layers(d, "blocks.", "model.layers."),
        ValueError,
        "8 missing .*; 8 that the model has no place for .base_model.model.model.layers.0.k_proj.lora_A.weight, .* and 5 more.; "
        "the model's nearest to the first of these is base_model.model.blocks.0.k_proj.lora_A.weight$",
    ),
    "another layer": (
        lambda d: change_tensors(d, **{"head.lora_A.weight": torch.ones(4, 12)}),
        ValueError,
        "1 that the model has no place for",
    ),
    "a missing half": (
        lambda d: change_tensors(d, **{B0: None}),
        ValueError,
        "got 1 missing .base_model.model.blocks.0.q_proj.lora_B.weight.",
    ),
    "no tensors": (lambda d: safetensors.torch.save_file({}, d / WEIGHTS), ValueError, "4 LoRA layers, got 8 missing"),
    "integers": (lambda d: change_tensors(d, **{A0: lambda t: t.to(torch.int32)}), TypeError, "lora_A.weight: wanted F16, .*, got I32"),
    "mixed dtypes": (
        lambda d: change_tensors(d, **{A0: lambda t: t.float()}),
        TypeError,
        "wanted tensors of one dtype, got F32 .*, F64 .*",
    ),
    "NaN": (
        lambda d: change_tensors(d, **{B0: lambda t: t.fill_(float("nan"))}),
        ValueError,
        "wanted finite values in torch.float64, got NaN",
    ),
}


@pytest.mark.parametrize("slot", [None, 1])
@pytest.mark.parametrize("spoil, error, match", BAD.values(), ids=BAD)
def test_a_bad_adapter_is_refused_and_changes_nothing(spoil, error, match, slot, tmp_path):
    save_adapter(ours(), tmp_path)
    model = ours(num_adapters=None if slot is None else 2)
    assert len(load_adapter(model, tmp_path, slot=slot)) == 4, "good until spoilt"
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_A.add_(1)
    spoil(tmp_path)
    before = state(model)
    with pytest.raises(error, match=match) as caught:
        load_adapter(model, tmp_path, slot=slot)
    assert type(caught.value) is error
    assert_unchanged(model, before)


def test_partial(tmp_path):
    stock(tmp_path, target_modules=["q_proj"])
    for kwargs in ({}, {"slot": 1}):
        model = ours(num_adapters=2 if kwargs else None).eval()
        before = state(model)
        with pytest.raises(ValueError, match="4 missing .base_model.model.blocks.0.k_proj.lora_A.weight.*; partial=True takes a file"):
            load_adapter(model, tmp_path, **kwargs)
        assert_unchanged(model, before)
        assert load_adapter(model, tmp_path, partial=True, **kwargs) == Q
        theirs = PeftModel.from_pretrained(base(), tmp_path).eval()
        with use_segments(model, Segments.from_ids(torch.full((12,), 1), 2)) if kwargs else torch.enable_grad():
            torch.testing.assert_close(model(X), theirs(X), rtol=1e-6, atol=1e-6)


def test_a_merged_model_is_saved_apart_and_not_loaded_into(tmp_path):
    model = ours()
    save_adapter(model, tmp_path / "apart")
    for layer in layers(model).values():
        layer.merge()
    save_adapter(model, tmp_path / "merged")
    assert (tmp_path / "apart" / WEIGHTS).read_bytes() == (tmp_path / "merged" / WEIGHTS).read_bytes()
    before = state(model)
    with pytest.raises(RuntimeError, match="wanted unmerged layers to load into, got merged ones .blocks.0.q_proj, .* and 1 more"):
        load_adapter(model, tmp_path / "apart")
    assert_unchanged(model, before)


def test_partial_files_are_still_whole_layers(tmp_path):
    model = ours()
    save_adapter(model, tmp_path)
    before = state(model)
    for spoil, match in (
        (lambda d: change_tensors(d, **{B0: None}), "1 missing"),
        (lambda d: rename_layers(d, "blocks", "layers"), "has no place for"),
        (lambda d: safetensors.torch.save_file({}, d / WEIGHTS), "got none at all"),
    ):
        spoil(tmp_path)
        with pytest.raises(ValueError, match=match):
            load_adapter(model, tmp_path, partial=True)
        assert_unchanged(model, before)
        save_adapter(model, tmp_path)


def test_what_does_not_fit_after_rounding(tmp_path):
    model = ours()
    model.blocks[1].k_proj.lora_A.data[0, 0] = 1e30
    save_adapter(model, tmp_path)
    half = ours(torch.float16)
    before = state(half)
    with pytest.raises(ValueError, match="blocks.1.k_proj.lora_A.weight: wanted finite values in torch.float16, got NaN or Inf"):
        load_adapter(half, tmp_path, cast=True)
    assert_unchanged(half, before)


def test_nothing_is_read_before_the_header_was_checked(tmp_path, monkeypatch):
    save_adapter(ours(r=16), tmp_path)
    monkeypatch.setattr(files, "_finite", lambda *args: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="wanted rank 4, the layer's, got 16"):
        load_adapter(ours(), tmp_path)


@pytest.mark.parametrize(
    "make, kwargs, error, match",
    [
        (base, {}, ValueError, "model: wanted one that contains FusedLoRALinear or MultiLoRALinear layers, got none; apply_lora"),
        (lambda: FusedLoRALinear(4, 4), {}, ValueError, "model: wanted one that contains FusedLoRALinear"),
        (lambda: ours(num_adapters=2), {}, ValueError, "slot: wanted the number of an adapter, for MultiLoRALinear layers .*, got None"),
        (ours, {"slot": 0}, ValueError, "slot: wanted None, for layers of one adapter .*, got 0"),
        (lambda: ours(num_adapters=2), {"slot": 2}, IndexError, "slot: wanted an adapter of blocks.0.q_proj from 0 to 1, got 2"),
        (lambda: ours(num_adapters=2), {"slot": -1}, IndexError, "slot: wanted an adapter of blocks.0.q_proj from 0 to 1, got -1"),
        (lambda: ours(num_adapters=2), {"slot": True}, TypeError, "slot: wanted an adapter's number, an int, got bool"),
        (lambda: ours().to("meta"), {}, ValueError, "blocks.0.q_proj: wanted a layer with storage, got one on the meta device"),
    ],
)
def test_models_that_neither_save_nor_load(make, kwargs, error, match, tmp_path):
    save_adapter(ours(), tmp_path / "good")
    with pytest.raises(error, match=match):
        load_adapter(make(), tmp_path / "good", **kwargs)
    with pytest.raises(error, match=match):
        save_adapter(make(), tmp_path / "new", **kwargs)
    assert not (tmp_path / "new").exists()


def spoil_values(model):
    model.blocks[1].q_proj.lora_B.data[3, 1] = float("inf")


def spoil_scaling(model):
    model.blocks[1].q_proj.scaling = float("nan")


@pytest.mark.parametrize(
    "spoil, kwargs, error, match",
    [
        (spoil_values, {}, ValueError, "blocks.1.q_proj.lora_B.weight: wanted finite values in torch.float64, got NaN or Inf"),
        (spoil_scaling, {}, ValueError, "model: wanted finite scalings, got nan in blocks.1.q_proj"),
        (None, {"dtype": torch.int8}, TypeError, "dtype: wanted torch.float16, .* or None, got torch.int8"),
        (None, {"task_type": "CHAT"}, ValueError, "task_type: wanted SEQ_CLS, .* or None, got 'CHAT'"),
    ],
)
def test_a_save_that_is_refused_leaves_the_folder(spoil, kwargs, error, match, tmp_path):
    model = ours()
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if spoil:
        spoil(model)
    with pytest.raises(error, match=match):
        save_adapter(model, tmp_path, **kwargs)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_where_a_file_is(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="folder: wanted a directory, got a file"):
        save_adapter(ours(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


class PowerCut(BaseException):
    pass


def cut_after(steps, calls, real):
    def call(*args, **kwargs):
        calls.append(real)
        if len(calls) > steps:
            raise PowerCut
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("same_config", [False, True])
def test_a_save_that_breaks_off(same_config, tmp_path, monkeypatch):
    """At every call that changes the folder: the old adapter, the new one, or no config; never one's config beside the other's weights."""
    old, new = ours(), ours(lora_alpha=6 if same_config else 60)
    with torch.no_grad():
        new.blocks[0].q_proj.lora_A.add_(1)
    pairs = []
    for name, model in (("old", old), ("new", new)):
        save_adapter(model, tmp_path / name)
        pairs.append({file: (tmp_path / name / file).read_bytes() for file in (CONFIG, WEIGHTS)})
    assert (pairs[0][CONFIG] == pairs[1][CONFIG]) == same_config
    seen, steps = [], 0
    while True:
        folder = tmp_path / str(steps)
        save_adapter(old, folder)
        (folder / "README.md").write_text("mine")
        calls = []
        with monkeypatch.context() as m:
            for owner, name in ((os, "replace"), (os, "unlink"), (os, "fsync"), (safetensors.torch, "save_file")):
                m.setattr(owner, name, cut_after(steps, calls, getattr(owner, name)))
            try:
                save_adapter(new, folder)
                done = True
            except PowerCut:
                done = False
        left = {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS) if (folder / file).exists()}
        assert left in pairs or (not same_config and CONFIG not in left), f"after {steps} steps"
        assert (folder / "README.md").read_text() == "mine" and WEIGHTS in left
        seen.append(pairs.index(left) if left in pairs else None)
        if done:
            break
        steps += 1
    assert seen[0] == 0 and seen[-1] == 1 and steps > 5 and (None in seen) == (not same_config), seen
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_a_save_between_the_reading_of_config_and_weights(tmp_path, monkeypatch):
    """Another process's: its weights are not taken with the old config's scale."""
    first, second, model = ours(), ours(), ours()
    for layer in layers(second).values():
        layer.scaling *= 4
    save_adapter(first, tmp_path)
    before, opened = state(model), files.opened

    def late(path):
        save_adapter(second, tmp_path)
        return opened(path)

    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="before and after the weights were opened, got another; load again"),
    ):
        patch.setattr(files, "opened", late)
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    load_adapter(model, tmp_path)
    assert torch.equal(model(X), second(X))


def test_shards_are_refused(tmp_path):
    save_adapter(ours(), tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(ours(), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        for call in (lambda: load_adapter(model, tmp_path), lambda: save_adapter(model, tmp_path / "new")):
            with pytest.raises(UnsupportedError, match="model: wanted whole layers, got shards in blocks.0.q_proj; gather them"):
                call()
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "new").exists()


def test_both_files_are_readable_alike(tmp_path):
    save_adapter(ours(), tmp_path / "a" / "b")
    modes = {os.stat(tmp_path / "a" / "b" / name).st_mode & 0o777 for name in (CONFIG, WEIGHTS)}
    (tmp_path / "any").write_text("")
    assert modes == {os.stat(tmp_path / "any").st_mode & 0o777}


def test_without_safetensors(tmp_path, monkeypatch):
    save_adapter(ours(), tmp_path)
    model = ours()
    before = state(model)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: load_adapter(model, tmp_path), lambda: save_adapter(model, tmp_path / "new")):
        with pytest.raises(ImportError, match=r'wanted safetensors, got none to import; pip install "lora_kernels\[peft\]"'):
            call()
    assert_unchanged(model, before)
    assert not (tmp_path / "new").exists()
