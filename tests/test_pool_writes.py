"""A pool whose slots others write to: what it put there is not taken for what is there."""

import pytest
import torch
from test_pool import NAMES, X, hold, served, trained  # noqa: F401  a fixture

from lora_kernels import AdapterPool, MultiLoRALinear, load_adapter

WHO = ["a", None, "b", "a"]


def check(pool, model, models, who=WHO) -> None:
    with torch.no_grad(), pool.use(who):
        found = model(X)
    for row, name in enumerate(who):
        torch.testing.assert_close(found[row], models[name](X)[row], rtol=1e-6, atol=1e-6, msg=f"{name} by its own adapter")


def two_pools(model, folders):
    other = AdapterPool(model)
    other.add("c", folders["c"])
    other.slots(["c"])


def a_state_dict(model, folders):
    model.load_state_dict(served().state_dict())


def a_file(model, folders):
    for slot in range(3):
        load_adapter(model, folders["d"], slot=slot)


@pytest.mark.parametrize("write", [two_pools, a_state_dict, a_file])
def test_what_others_wrote_is_replaced(trained, write):  # noqa: F811
    models, folders = trained
    model = served()
    pool = AdapterPool(model)
    for name in NAMES:
        pool.add(name, folders[name])
    check(pool, model, models)
    assert pool.resident.keys() == {"a", "b"}
    write(model, folders)
    assert not pool.resident
    check(pool, model, models)
    before = model[0].up.writes.copy()
    check(pool, model, models)
    assert model[0].up.writes == before, "what is there stays there"


def test_pools_in_turn(trained):  # noqa: F811
    models, folders = trained
    model = served()
    pools = [AdapterPool(model), AdapterPool(model, [2, 0])]
    for pool in pools:
        for name in NAMES:
            pool.add(name, folders[name])
    for turn in range(6):
        check(pools[turn % 2], model, models, [NAMES[turn % 5], None, NAMES[(turn + 1) % 5], None])


def test_other_slots_are_others(trained):  # noqa: F811
    models, folders = trained
    model = served()
    pool = AdapterPool(model, [0, 1])
    for name in NAMES:
        pool.add(name, folders[name])
    check(pool, model, models)
    before = model[0].up.writes[:2]
    load_adapter(model, folders["d"], slot=2)
    check(pool, model, models)
    assert model[0].up.writes[:2] == before


def test_a_write_is_one_of_all_layers(trained, monkeypatch):  # noqa: F811
    """As many torch calls for four layers as for one: on a GPU each would be a launch, and a read of a number on the host a wait."""
    pool = AdapterPool(served())
    for name in NAMES:
        pool.add(name, trained[1][name])
    calls = []
    for name in ("_foreach_copy_", "_foreach_zero_"):
        own = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, own=own, name=name: (calls.append((name, len(args[0]))), own(*args)))
    for name, rest in (("a", 8), ("b", 0)):  # of rank 1 and of the stacks' rank
        calls.clear()
        pool.slots([name])
        zeroed = [("_foreach_zero_", rest)] if rest else []
        assert calls == [*zeroed, ("_foreach_copy_", 8), ("_foreach_copy_", 4), ("_foreach_copy_", 4)], name
    hold(pool, trained, ["a", "b"])


def test_a_gpus_adapters_are_page_locked(trained, monkeypatch):  # noqa: F811
    """What is copied without being waited for is what torch locked, which torch keeps until it was read."""
    locked, given = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: locked.append(t.clone()) or locked[-1])
    copied = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, values, *how: (given.append((values, *how)), copied(to, values, *how)))
    pool = AdapterPool(served())
    pool._pins = True  # as for a model on a GPU
    pool.add("a", trained[1]["a"])
    hold(pool, trained, ["a"])
    values, non_blocking = given[0]
    assert non_blocking and len(values) == len(locked) == 8 and all(own is kept for own, kept in zip(values, locked, strict=True))
    load_adapter(pool.model, trained[1]["b"], slot=1)
    assert not given[3][1], "a file's tensors are not locked"


def test_what_lost_its_storage_is_not_taken_for_written(trained):  # noqa: F811
    """Layers that are offloaded after the pool was made: the slot would go on with the adapter that it had."""
    _, folders = trained
    model = served()
    pool = AdapterPool(model)
    pool.add("a", folders["a"])
    whole, ranks = model[1].up.lora_A, list(model[0].up._ranks)
    model[1].up.lora_A = torch.nn.Parameter(whole.detach().to("meta"))
    with pytest.raises(ValueError, match="slot 0: wanted a layer with storage, got one on the meta device"):
        pool.slots(["a"])
    assert not pool.resident and model[0].up._ranks == ranks and model[0].up.writes[0] == model[1].up.writes[0]
    model[1].up.lora_A = whole
    assert pool.slots(["a"]) == [0]


def test_a_write_that_fails_leaves_the_rank_that_the_device_has(monkeypatch):
    layer = MultiLoRALinear(6, 5, num_adapters=2, r=[2, 4], init_lora_weights=False)

    def full(places, values, non_blocking=False):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "_foreach_copy_", full)
    with pytest.raises(torch.OutOfMemoryError):
        layer.load_adapter(0, torch.randn(4, 6), torch.randn(5, 4))
    assert layer.ranks.tolist() == [layer.adapter(i)[0].shape[0] for i in range(2)] == [2, 4]
