"""A pool whose slots others write to: what it put there is not taken for what is there."""

import pytest
import torch
from test_pool import NAMES, X, served, trained  # noqa: F401  a fixture

from lora_kernels import AdapterPool, load_adapter

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
