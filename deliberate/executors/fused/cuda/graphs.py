"""CUDA graphs of segments, and the few things that decoding asks of a device.

A segment of a small model is a hundred launches of a few microseconds each; replayed as a graph it
is one. What a graph reads and writes has fixed addresses, so every captured function here works on
buffers that outlive it and may be run any number of times on the same inputs.

The calls to CUDA stand behind `Device`, so that the same control flow runs, and is tested, on
machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

# Runs of a function before it is captured: kernels are compiled and libraries make their handles.
WARM_UP_RUNS = 2

Work = Callable[[], None]


class Device(Protocol):
    """What decoding by graphs needs of a device."""

    def capture(self, work: Work) -> Work:
        """Runs `work` to warm up, records it, and returns what replays it.

        After it returns `work` has been run at least once, but callers replay before they read.
        """
        ...

    def host_buffer(self, like: Tensor) -> Tensor:
        """Host memory that `post` may copy to: shape and dtype of `like`."""
        ...

    def post(self, source: Tensor, target: Tensor) -> Work:
        """Begins to copy to a host buffer; what it returns waits until the copy is there.

        Only work given to the device before is waited for, not what follows.
        """
        ...


class CudaDevice:
    """A CUDA device: graphs, pinned memory, events; everything on the current stream.

    Args:
        device: of type "cuda".
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: Any = None
        self._pool: Any = None

    def capture(self, work: Work) -> Work:
        """As `Device.capture`; warm-up is on a stream of its own, as PyTorch asks for."""
        with torch.cuda.device(self._device):
            if self._side is None:
                self._side = torch.cuda.Stream(self._device)
                # One pool for all graphs: they are replayed one after another, and what they leave
                # behind is in buffers that no pool holds.
                self._pool = torch.cuda.graph_pool_handle()
            current = torch.cuda.current_stream(self._device)
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                for _ in range(WARM_UP_RUNS):
                    work()
            current.wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            # Other threads (a server's, a data loader's) may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        return graph.replay

    def host_buffer(self, like: Tensor) -> Tensor:
        """Pinned, or the copy would not be asynchronous."""
        with torch.inference_mode(False):
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def post(self, source: Tensor, target: Tensor) -> Work:
        """As `Device.post`: an event stands between this copy and what is launched later."""
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


class HostDevice:
    """No GPU: what is captured is the function itself, copies are there at once."""

    def capture(self, work: Work) -> Work:
        """The function, unrun."""
        return work

    def host_buffer(self, like: Tensor) -> Tensor:
        """Ordinary memory."""
        with torch.inference_mode(False):
            return torch.empty(like.shape, dtype=like.dtype)

    def post(self, source: Tensor, target: Tensor) -> Work:
        """Copies now; there is nothing to wait for."""
        target.copy_(source)
        return lambda: None


def device_for(device: torch.device) -> Device:
    """The `Device` of a torch device."""
    return CudaDevice(device) if device.type == "cuda" else HostDevice()


class Captures:
    """A device, and why nothing is captured on it any more.

    Args:
        device: captures and replays.

    Attributes:
        device: the same.
        reason: the first error of a capture, or None. Graphs made before go on being replayed.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.reason: str | None = None

    def capture(self, work: Work) -> Work | None:
        """What replays `work`; None where it cannot be captured."""
        if self.reason is not None:
            return None
        try:
            return self.device.capture(work)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.reason = f"capture failed: {lines[0][:200]}"
            return None


class SegmentGraphs:
    """The graphs of one set of buffers, captured when first needed.

    Args:
        captures: of the executor; where one capture has failed, everything new runs eagerly.
    """

    def __init__(self, captures: Captures) -> None:
        self._captures = captures
        self._graphs: dict[Hashable, Work] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def ready(self, key: Hashable, work: Work) -> Work:
        """The graph of `key`, captured now if there is none; `work` itself where that fails.

        Args:
            key: names the buffers and sizes of `work`; the work of its first call is kept.
            work: reads and writes fixed buffers only. To capture it is to run it some times: the
                caller sets what it reads afterwards, if it changes that.
        """
        replay = self._graphs.get(key)
        if replay is None:
            replay = self._captures.capture(work)
            if replay is None:
                return work
            self._graphs[key] = replay
        return replay

    def run(self, key: Hashable, work: Work) -> None:
        """Runs `work`, which does not change what it reads, by its graph.

        An error of the work itself is raised, by running it outside a capture.
        """
        self.ready(key, work)()
