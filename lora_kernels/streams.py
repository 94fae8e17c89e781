"""Where launches go: the device that is current for them, and a second stream beside the first."""

from __future__ import annotations

import contextlib
import functools

import torch


def on_device(t: torch.Tensor):
    """Makes t's GPU the current one for the launches inside, where it is not."""
    return torch.cuda.device(t.device) if t.is_cuda and t.get_device() != torch.cuda.current_device() else _HERE


_HERE = contextlib.nullcontext()


def kept_for(device: torch.device) -> tuple[int, bool]:
    """What tensors that are kept from one call to the next belong to: a stream, which orders what made them, and inference mode or not.

    A tensor of inference mode may not be saved for backward.
    """
    stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
    return stream, torch.is_inference_mode_enabled()


@functools.cache
def sm_count(device: torch.device) -> int:
    """Programs of a persistent grid: one per multiprocessor; few, so that each takes several items, without a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def fork(t: torch.Tensor) -> torch.cuda.Event | None:
    """An event after all that t's GPU has been given so far by the current stream; None without a GPU."""
    return torch.cuda.current_stream(t.device).record_event() if t.is_cuda else None


@contextlib.contextmanager
def beside(forked: torch.cuda.Event | None):
    """Inside, launches go to a second stream, after ``forked``; afterwards the current stream waits for them. None: to the current one.

    Memory that they use has to be taken before `fork`, and let go after: the allocator knows nothing of the second stream.
    """
    if forked is None:
        yield
        return
    first = torch.cuda.current_stream()
    second = _second(first.device)
    second.wait_event(forked)
    try:
        with torch.cuda.stream(second):
            yield
    finally:  # what was launched before an error, too: its memory is let go then
        first.wait_stream(second)


@functools.cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
