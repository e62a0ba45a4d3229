"""Numbers of the system for trackers: load of the processor, and memory of this process and of its GPU."""

import sys

import psutil

GIB = 1 << 30


class System:
    """Read how much of the machine this process uses."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call starts the interval of the next one

    def numbers(self) -> dict[str, float]:
        """Return `system/cpu_percent` (100 is one whole core, since the last call), `system/memory_gib` (resident), and with CUDA
        `system/gpu_memory_gib` (allocated by torch now) and `system/gpu_memory_peak_gib`."""
        out = {
            "system/cpu_percent": self._process.cpu_percent(),
            "system/memory_gib": self._process.memory_info().rss / GIB,
        }
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            out["system/gpu_memory_gib"] = torch.cuda.memory_allocated() / GIB
            out["system/gpu_memory_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        return out
