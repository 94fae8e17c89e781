"""`AdapterPool`: adapters by name, more of them than slots."""

import copy
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import (
    AdapterPool,
    FusedLoRALinear,
    LoRAConfig,
    MultiLoRALinear,
    PackedLoRALinear,
    Segments,
    apply_lora,
    files,
    load_adapter,
    save_adapter,
    use_adapters,
)

K, E = 16, 3
NAMES = ["a", "b", "c", "d", "e"]
X = torch.randn(4, 3, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(K, 24), nn.Linear(24, K)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).double()


def served() -> nn.Module:
    model = base()
    apply_lora(model, LoRAConfig(target_modules=["up", "down"], r=8), num_adapters=E)
    return model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Five adapters of ranks and scales of their own: the models with one of them each, and their folders."""
    models, folders = {None: base()}, {}
    for n, name in enumerate(NAMES):
        model = base()
        torch.manual_seed(10 + n)
        r = (1, 8, 3, 4, 2)[n]  # scales that float32, as slots have them, holds
        apply_lora(model, LoRAConfig(target_modules=["up", "down"], r=r, lora_alpha=r * (n + 1) / 2, init_lora_weights=False))
        models[name], folders[name] = model.eval(), tmp_path_factory.mktemp(name)
        save_adapter(model, folders[name])
    return models, folders


@pytest.fixture
def pool(trained) -> AdapterPool:
    pool = AdapterPool(served())
    for name, folder in trained[1].items():
        pool.add(name, folder)
    return pool


def hold(pool: AdapterPool, trained, names) -> None:
    """Each sequence's output is that of its own model."""
    with torch.no_grad(), pool.use(names):
        y = pool.model(X[: len(names)])
    for i, name in enumerate(names):
        torch.testing.assert_close(y[i], trained[0][name](X[i]).detach(), rtol=1e-12, atol=1e-12)


@pytest.fixture
def written(monkeypatch):
    """The slots that were written, in order."""
    slots, put = [], files.put
    monkeypatch.setattr(files, "put", lambda adapter, slot, **how: (slots.append(slot), put(adapter, slot, **how)))
    return slots


def test_more_adapters_than_slots(pool, trained, written):
    assert repr(pool) == "AdapterPool(5 adapters, 0 of them in 3 slots)" and pool.names == NAMES and not written
    for names, loads in (
        (["a", "b", None, "a"], 2),
        (["c", "b", "b"], 1),
        (["a", None, None, None], 0),
        (["d", "a", "c", "d"], 1),  # b was named longest ago
        (["e", "a", "b", None], 2),
        ([None] * 4, 0),
        ([], 0),
        (["a", "b", "e"], 0),
    ):
        before = len(written)
        hold(pool, trained, names)
        assert len(written) - before == loads, names
    assert list(pool.resident) == ["a", "b", "e"] and sorted(pool.resident.values()) == [0, 1, 2]


def test_none_of_a_batch_loses_its_slot_to_another(pool, trained):
    hold(pool, trained, ["a", "b", "c"])
    hold(pool, trained, ["d", "a", "e"])  # a was named longest ago, and is wanted
    assert list(pool.resident) == ["a", "d", "e"]


def test_slots_for_a_plan_of_ones_own(pool, trained):
    ids = pool.slots(["d", None, "a", "d"])
    assert ids == [0, -1, 1, 0] and pool.resident == {"d": 0, "a": 1}
    assert pool.slots(iter(["a", None])) == [1, -1]
    with torch.no_grad(), use_adapters(pool.model, ids):
        y = pool.model(X)
    for i, name in enumerate(["d", None, "a", "d"]):
        torch.testing.assert_close(y[i], trained[0][name](X[i]).detach(), rtol=1e-12, atol=1e-12)


def test_an_adapter_is_replaced_from_the_next_batch_on(pool, trained):
    models, folders = trained
    hold(pool, trained, ["a", "b"])
    with torch.no_grad(), pool.use(["a"]):
        before = pool.model(X[:1])
        pool.add("a", folders["c"])
        assert torch.equal(pool.model(X[:1]), before)
    hold(pool, ({**models, "a": models["c"]}, folders), ["a", "b", None])
    assert pool.names == ["a", "b", "c", "d", "e"]


def test_removed(pool, trained):
    hold(pool, trained, ["a", "b", "c"])
    freed = pool.resident["b"]
    pool.remove("b")
    assert pool.names == ["a", "c", "d", "e"] and "b" not in pool.resident
    hold(pool, trained, ["a", "d", "c"])
    assert pool.resident["d"] == freed
    for call in (lambda: pool.remove("b"), lambda: pool.slots(["b"])):
        with pytest.raises(KeyError, match=r"name: wanted one of the pool's 4 adapters \(a, c, d and 1 more\), got 'b'"):
            call()


def test_a_removed_adapter_may_be_without_a_slot(pool, trained):
    pool.remove("e")
    hold(pool, trained, ["a", "b", "c"])


def test_a_copy_is_a_pool_of_its_own_model(pool, trained):
    hold(pool, trained, ["a", "b"])
    again = copy.deepcopy(pool)
    hold(again, trained, ["c", "d"])
    hold(pool, trained, ["a", "b"])
    assert list(pool.resident) == ["a", "b"] and list(again.resident) == ["b", "c", "d"]


def test_files_are_not_needed_afterwards(trained, tmp_path):
    """The very bytes that were read are overwritten, as a file that is mapped into memory would show."""
    path = tmp_path / "adapter_model.safetensors"
    save_adapter(trained[0]["a"], tmp_path)
    pool = AdapterPool(served())
    pool.add("a", tmp_path)
    with open(path, "r+b") as file:
        size = os.path.getsize(path)
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    hold(pool, trained, ["a"])


def test_a_file_that_is_refused_changes_nothing(pool, trained, tmp_path):
    hold(pool, trained, ["a", "b"])
    save_adapter(trained[0]["a"], tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    before = pool.resident
    for name in ("a", "new"):
        with pytest.raises(ValueError, match="1 missing"):
            pool.add(name, tmp_path)
    with pytest.raises(FileNotFoundError):
        pool.add("new", tmp_path / "none")
    assert pool.names == NAMES and pool.resident == before
    hold(pool, trained, ["a", "b"])


def test_partial_and_cast(trained, tmp_path):
    save_adapter(trained[0]["b"], tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(path).items() if ".0." in key}, path)
    pool = AdapterPool(served())
    pool.add("b", trained[1]["b"])
    hold(pool, trained, ["b"])
    pool.add("half", tmp_path, partial=True)
    half = base()
    half[0] = trained[0]["b"][0]
    hold(pool, ({"half": half, **trained[0]}, None), ["half", "b", None])
    narrow = AdapterPool(served().to(torch.float32))
    with pytest.raises(TypeError, match="pass cast=True to round"):
        narrow.add("a", trained[1]["a"])
    narrow.add("a", trained[1]["a"], cast=True)
    with torch.no_grad(), narrow.use(["a"]):
        y = narrow.model(X[:1].float())
    torch.testing.assert_close(y[0], trained[0]["a"](X[0]).detach().float(), rtol=1e-4, atol=1e-4)


def test_an_adapter_that_lacks_layers_leaves_the_generator_alone(trained, tmp_path):
    """So that a seeded, sampled answer does not depend on who had a slot before; and the layers have nothing of the slot's last tenant."""
    q, v = nn.Linear(K, 8), nn.Linear(K, 4)
    plain = nn.ModuleDict({"q_proj": q, "v_proj": v, "up": nn.Linear(K, 8), "down": nn.Linear(K, 8)}).double()
    served = copy.deepcopy(plain)
    for name, targets in (("all", ["q_proj", "v_proj", "up", "down"]), ("few", ["down"])):
        model = copy.deepcopy(plain)
        apply_lora(model, LoRAConfig(target_modules=targets, r=3, init_lora_weights=False))
        save_adapter(model, tmp_path / name)
    apply_lora(served, LoRAConfig(target_modules=["up", "down"], r=4), num_adapters=1)
    parts = [served._modules.pop(name) for name in ("q_proj", "v_proj")]
    served["qv_proj"] = PackedLoRALinear.from_linears(parts, num_adapters=1, r=4, names=("q_proj", "v_proj"))
    pool = AdapterPool(served)
    pool.add("all", tmp_path / "all")
    pool.add("few", tmp_path / "few", partial=True)
    pool.slots(["all"])
    before = torch.get_rng_state()
    with torch.no_grad(), pool.use(["few"]):
        torch.testing.assert_close(served["up"](X[:1]), plain["up"](X[:1]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(served["qv_proj"](X[:1]), torch.cat([q(X[:1]), v(X[:1])], -1), rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_write_that_fails_leaves_the_slot_free(pool, trained, monkeypatch):
    """Half an adapter is in no slot; what had the slot before has none either."""
    hold(pool, trained, ["a", "b", "c"])
    own = torch._foreach_copy_

    def breaks(places, values, *how):
        half = len(places) // 2
        own(places[:half], values[:half], *how)
        raise torch.OutOfMemoryError("as a GPU's")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", breaks)
        with pytest.raises(torch.OutOfMemoryError), pool.use(["d", "c"]):
            raise AssertionError("inside")
    assert list(pool.resident) == ["b", "c"]
    hold(pool, trained, ["d", "b", "c"])
    hold(pool, trained, ["a", None])


@pytest.mark.parametrize(
    "names, error, words",
    [
        (["a", "b", "c", "d"], ValueError, "names: wanted at most 3 adapters at once, for so many slots, got 4"),
        (["a", "x"], KeyError, r"name: wanted one of the pool's 5 adapters \(a, b, c and 2 more\), got 'x'"),
        ("ab", TypeError, "names: wanted one for each sequence, got a str, 'ab'"),
        ([0], KeyError, "got 0"),
    ],
)
def test_refused_batches(pool, trained, names, error, words, written):
    hold(pool, trained, ["a", "e"])
    before, count = pool.resident, len(written)
    for call in (lambda: pool.slots(names), lambda: pool.use(names).__enter__()):
        with pytest.raises(error, match=words):
            call()
    assert pool.resident == before and len(written) == count
    hold(pool, trained, ["a", "b", "c"])


def test_a_batch_in_use_keeps_its_slots(pool, trained, written):
    """Whoever comes meanwhile, in this thread or another, is refused before a slot is written."""
    caught = []

    def others():
        for call in (
            lambda: pool.slots(["d", "e"]),
            lambda: pool.use(["d", "e"]).__enter__(),
            lambda: use_adapters(pool.model, [0]).__enter__(),
        ):
            with pytest.raises(RuntimeError, match="in no use_segments, use_adapters or pool's use yet") as error:
                call()
            caught.append(error)

    with torch.no_grad(), pool.use(["a", "b", "c"]):
        before, count = pool.model(X[:3]), len(written)
        others()
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()
        assert len(caught) == 6 and len(written) == count and torch.equal(pool.model(X[:3]), before)
    hold(pool, trained, ["d", "e"])


def test_some_of_the_slots(trained, tmp_path):
    """Slot 1 is somebody else's."""
    model = served()
    load_adapter(model, trained[1]["e"], slot=1)
    pool = AdapterPool(model, slots=[2, 0])
    for name in NAMES:
        pool.add(name, trained[1][name])
    for names in (["a", "b"], ["c"], ["d", "a"]):
        hold(pool, trained, names)
        assert set(pool.resident.values()) <= {0, 2}
    with torch.no_grad(), use_adapters(model, [1]):
        torch.testing.assert_close(model(X[:1])[0], trained[0]["e"](X[0]).detach(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="wanted at most 2 adapters"):
        pool.slots(["a", "b", "c"])


@pytest.mark.parametrize(
    "slots, error, words",
    [
        ([], ValueError, "slots: wanted at least one, and each once"),
        ([0, 0], ValueError, r"slots: wanted at least one, and each once, got \[0, 0\]"),
        ([3], IndexError, "slots: wanted those from 0 to 2, which every layer has, got 3"),
        ([-1], IndexError, "got -1"),
        ([True], TypeError, "slots: wanted ints, got True"),
        (["a"], TypeError, "slots: wanted ints, got 'a'"),
    ],
)
def test_wrong_slots(slots, error, words):
    with pytest.raises(error, match=words):
        AdapterPool(served(), slots)


def test_wrong_models_and_names(pool, trained):
    with pytest.raises(ValueError, match="model: wanted one with MultiLoRALinear layers"):
        AdapterPool(nn.Sequential(FusedLoRALinear(3, 3, r=1)))
    with pytest.raises(TypeError, match="name: wanted a str, got int"):
        pool.add(0, trained[1]["a"])


def test_other_layers_than_the_pools(pool, trained):
    """What was read was checked against layers that no longer answer."""
    hold(pool, trained, ["a"])
    model = pool.model
    model[1] = copy.deepcopy(model[1])
    with pytest.raises(RuntimeError, match="model: wanted the layers with which the pool was made, got others"):
        pool.slots(["b"])


def test_layers_with_other_numbers_of_slots(trained):
    torch.manual_seed(0)
    layers = nn.ModuleList([MultiLoRALinear(K, 8, num_adapters=n, r=2) for n in (4, 2)])
    assert repr(AdapterPool(layers)) == "AdapterPool(0 adapters, 0 of them in 2 slots)"


def test_packed_layers(tmp_path):
    """q and v of one weight, from files that know them apart; an adapter without one of them."""
    torch.manual_seed(0)
    q, v = nn.Linear(K, 8), nn.Linear(K, 4)
    apart = nn.ModuleDict({"q_proj": copy.deepcopy(q), "v_proj": copy.deepcopy(v)})
    models = {}
    for name, targets in (("both", ["q_proj", "v_proj"]), ("one", ["v_proj"])):
        models[name] = copy.deepcopy(apart)
        apply_lora(models[name], LoRAConfig(target_modules=targets, r=2, init_lora_weights=False))
        save_adapter(models[name], tmp_path / name)
    packed = PackedLoRALinear.from_linears([q, v], num_adapters=2, r=4, names=("q_proj", "v_proj"))
    pool = AdapterPool(nn.ModuleDict({"qv_proj": packed}))
    pool.add("both", tmp_path / "both")
    pool.add("one", tmp_path / "one", partial=True)
    x = X[:3].float()
    with torch.no_grad(), pool.use(["one", None, "both"]):
        y = packed(x)
    for i, model in ((0, models["one"]), (1, apart), (2, models["both"])):
        wanted = torch.cat([model["q_proj"](x[i]), model["v_proj"](x[i])], -1)
        torch.testing.assert_close(y[i], wanted.detach(), rtol=1e-4, atol=1e-5)


def test_segments_of_ones_own(pool, trained):
    """Tokens of one batch named one by one, as continuous batching has them."""
    ids = pool.slots(["b", None, "c"])
    layer = pool.model[0].up
    segments = Segments.from_ids(torch.tensor(ids), E)
    x = X[:3, 0]
    y = layer(x, segments)
    for i, name in enumerate(["b", None, "c"]):
        torch.testing.assert_close(y[i], trained[0][name][0].up(x[i]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", ["remove", "replace"])
def test_another_thread_loads_while_an_adapter_is_put_into_its_slot(pool, trained, monkeypatch, change):
    """Whatever comes in the midst of it, each name has its own adapter afterwards, and a replaced one is the new one."""
    hold(pool, trained, ["a", "b", "c"])
    put, threads = files.put, []
    meanwhile = {"remove": lambda: pool.remove("b"), "replace": lambda: pool.add("d", trained[1]["e"])}[change]

    def slowly(adapter, slot, **how):
        threads.append(threading.Thread(target=meanwhile))
        threads[-1].start()
        threads[-1].join(0.5)
        put(adapter, slot, **how)

    with monkeypatch.context() as patch:
        patch.setattr(files, "put", slowly)
        hold(pool, trained, ["d"])
    threads[0].join()
    hold(pool, ({**trained[0], "d": trained[0]["d" if change == "remove" else "e"]}, None), ["d", "c", None])
