"""The most bytes in tensors that a piece of work makes, kernels' scratch included."""

from __future__ import annotations

from collections.abc import Callable

import torch


def most_bytes(work: Callable[[], object]) -> int:
    """Call `work`, and go by the allocator's own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
