"""Several real processes on this machine that work together over gloo, and what each of them returned."""

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from whet.distributed import free_port


def _run(rank: int, size: int, port: int, folder: str, job: Callable[..., Any], given: Sequence[Any]) -> None:
    from whet import distributed as workers

    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    try:
        own = workers.join(rank, size, "127.0.0.1", port, timeout=90)
        torch.save(job(own, *given), Path(folder) / f"{rank}.pt")
        workers.leave()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def together(size: int, folder: Path, job: Callable[..., Any], *given: Any) -> list[Any]:
    """What `job(workers, *given)` returned in each of `size` processes; the first error of any of them is raised."""
    import torch.multiprocessing as processes

    folder.mkdir(parents=True, exist_ok=True)
    try:
        processes.spawn(_run, (size, free_port(), str(folder), job, given), nprocs=size)
    except Exception as error:
        told = [file.read_text() for file in sorted(folder.glob("*.error"))]
        raise AssertionError("\n".join(told) or str(error)) from None
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
