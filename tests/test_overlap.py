"""dA and dB beside dX: in which order launches, memory and events are given to the device, and that nothing else changes.

What then happens on a device is for tests/test_cuda.py, what the compiler makes of it for tests/test_compile_only.py.
"""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import launch, layouts, parity, streams
from lora_kernels.parity import Case
from lora_kernels.segments import ONE
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad

TILES = Config(Shrink(16, 16, split=1, num_stages=2), Expand(16, 16, 16, num_warps=4), Wgrad(16, 16, split=2, num_stages=2))
STREAM = replace(TILES, wgrad=replace(TILES.wgrad, beside="stream"))
PDL = replace(TILES, expand=replace(TILES.expand, pdl=True), wgrad=replace(TILES.wgrad, beside="pdl"))
CASE = Case(40, 24, 32, 4)


class Log(TorchDispatchMode):
    """Allocations and sums, in order, in ``events``; launches and streams add themselves."""

    def __init__(self):
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("new_empty", "empty", "zeros", "new_zeros"):
            self.events.append("memory")
        return func(*args, **(kwargs or {}))


def backward(config: Config, needs=(True, True, True), log: Log | None = None) -> tuple[list[str], list[tuple]]:
    """What a backward pass does, in order, and each launch's name, options and arguments, as on a GPU; nothing is launched."""
    t, log, launches = parity.inputs(CASE, torch.device("cpu")), log or Log(), []

    def record(kernel, grid, args, options):
        log.events.append(kernel.__name__)
        launches.append((kernel.__name__, options, args))

    u = torch.zeros(CASE.M, CASE.R)
    with launch.intercept(record), log:
        operands = t["dY"], t["x"], t["weight"], t["lora_A"], t["lora_B"], u
        launch.backward(*operands, None, ONE, 1.0, 0.0, needs, torch.float32, config, kept={})
    return log.events, launches


@pytest.fixture
def compiled(monkeypatch):
    """As where kernels are compiled, not interpreted."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)


@pytest.mark.interpreted
def test_one_after_the_other(compiled):
    events, launches = backward(TILES)
    assert [event for event in events if event != "memory"] == ["shrink", "expand", "wgrad", "wgrad", "add_parts"]
    for _, options, _ in launches:
        assert "launch_pdl" not in options and options.get("LET_GO") is None and options.get("WAIT") is None


@pytest.mark.interpreted
def test_by_programmatic_dependent_launch(compiled):
    """expand lets go where it has waited for shrink, wgrad at once; and no memory is handed out while two launches may run at a time."""
    events, launches = backward(PDL)
    assert "memory" not in events[events.index("expand") :], events
    assert events[events.index("expand") :] == ["expand", "wgrad", "wgrad", "add_parts"]
    (_, shrink, _), (_, expand, args), *wgrads, (_, added, _) = launches
    assert shrink["LET_GO"] is layouts.let_next_begin and "launch_pdl" not in shrink
    assert expand["WAIT"] is layouts.wait_then_let_next_begin and expand["launch_pdl"]
    for _, wgrad, _ in wgrads:
        assert wgrad["LET_GO"] is layouts.let_next_begin and wgrad["WAIT"] is layouts.wait_for_previous and wgrad["launch_pdl"]
    assert "launch_pdl" not in added
    late = args[list(launch.expand.arg_names).index("late")]
    tile = 3 * (16 + 16) * 16 * 4  # bytes of the stages
    assert late == 3 * ((228 << 10) // tile), "three multiprocessors, as many programs on each as fit"


@pytest.mark.interpreted
def test_without_dX_nothing_overlaps(compiled):
    """dA reads what shrink writes, and would not wait for it."""
    for needs in ((False, True, True), (False, False, True)):
        for config in (PDL, STREAM):
            events, launches = backward(config, needs)
            assert "expand" not in events
            assert all("launch_pdl" not in options for _, options, _ in launches)


@pytest.mark.interpreted
def test_a_forward_pass_lets_nothing_begin_that_reads_y(compiled):
    """Its expand lets go as in the backward pass, but the next launch of a forward pass is an ordinary one."""
    t, launches = parity.inputs(CASE, torch.device("cpu")), []
    with launch.intercept(lambda kernel, grid, args, options: launches.append((kernel.__name__, options.get("launch_pdl", False)))):
        launch.forward(t["x"], t["weight"], t["lora_A"], t["lora_B"], None, None, ONE, 1.0, 0.0, True, PDL, kept={})
    assert launches == [("shrink", False), ("expand", True)]


class FakeStream:
    device = torch.device("cpu")

    def __init__(self, name: str, events: list[str]):
        self.name, self.events = name, events

    def wait_event(self, event):
        self.events.append(f"{self.name} waits for {event}")

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


@pytest.mark.interpreted
def test_by_a_second_stream(compiled, monkeypatch):
    """It is forked after shrink, with all memory taken, gets the gradients after dX's launch, and is joined before their sums."""
    log = Log()
    first, second = FakeStream("first", log.events), FakeStream("second", log.events)

    @contextlib.contextmanager
    def on(stream):
        log.events.append(f"to {stream.name}")
        yield
        log.events.append(f"from {stream.name}")

    def fork(t):
        log.events.append("fork")
        return "the fork"

    monkeypatch.setattr(launch, "fork", fork)
    monkeypatch.setattr(streams, "_second", lambda device: second)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: first)
    monkeypatch.setattr(torch.cuda, "stream", on)
    backward(STREAM, log=log)
    events = log.events[log.events.index("fork") :]
    assert [event for event in events if event != "memory"] == [
        "fork", "expand", "second waits for the fork", "to second", "wgrad", "wgrad", "from second", "first waits for second", "add_parts"
    ]  # fmt: skip
    assert "memory" not in events[events.index("expand") :]
    assert log.events.index("shrink") < log.events.index("fork")


def test_after_an_error_the_second_stream_is_joined(monkeypatch):
    """The first gradient's launch may be on it when the second's fails, and its memory is then let go on the first stream."""
    events: list[str] = []
    monkeypatch.setattr(streams, "_second", lambda device: FakeStream("second", events))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream("first", events))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    with pytest.raises(MemoryError), streams.beside("the fork"):
        raise MemoryError
    assert events == ["second waits for the fork", "first waits for second"]


def test_without_a_gpu_there_is_no_second_stream():
    forked = streams.fork(torch.zeros(1))
    assert forked is None
    with streams.beside(forked):
        pass


@pytest.mark.parametrize("config", [STREAM, PDL], ids=["stream", "pdl"])
def test_results_are_those_of_one_after_the_other(config, device):
    if device.type == "cuda" and config is PDL and torch.cuda.get_device_capability(device) < (9, 0):
        config = STREAM
    case = replace(CASE, p=0.1)
    tensors = parity.inputs(case, device)
    plain = replace(config, wgrad=replace(config.wgrad, beside=""))
    before = launch.launches
    pair = [parity.evaluate(replace(case, config=c), tensors, "triton") for c in (config, plain)]
    assert launch.launches == before + 2 * 7
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
