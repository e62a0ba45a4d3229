"""The ways to send weights to a vLLM engine: files in shared memory, gloo, and on GPUs NCCL and CUDA IPC."""

import os
import secrets
import socket
import tempfile
import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from whet.errors import RecipeError, WorkerDied, first_line
from whet.generate.vllm.push import CHUNK, About, Named, Route, Transport, chunks
from whet.generate.vllm.worker import gloo_group
from whet.private import owned_folder, user


class _Chunked(Transport):
    """Send weights chunk by chunk, so that no second copy of all weights is made."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk

    def carry(self, push: Route, pairs: Iterator[Named]) -> None:
        for chunk in chunks(pairs, self.chunk):
            if not push.started:
                self.ready(push)
                push.start_weight_update()
            self.send(push, chunk)
        push.finish_weight_update()

    def ready(self, push: Route) -> None:
        """Prepare the transfer, before the first chunk of an update."""

    @abstractmethod
    def send(self, push: Route, chunk: Sequence[Named]) -> None:
        """Send one chunk."""


class Shared(_Chunked):
    """Send each chunk as a safetensors file in `folder`, which is removed after the workers have read it.

    Files that are already in shared memory are not copied: they get a second name in `folder`. Raises RecipeError if the
    folder is not on this machine, or does not belong to this user, who would write the weights for another one.
    """

    backend = "whet_shared"

    def __init__(self, folder: str, chunk: int = CHUNK) -> None:
        super().__init__(chunk)
        if not Path(folder).is_dir():
            raise RecipeError(f"generator.transfer: the engine's weight folder {folder!r} is not on this machine")
        self.folder = Path(folder)
        if not owned_folder(self.folder):
            raise RecipeError(
                f"generator.transfer: the engine's weight folder {folder!r} is a link or belongs to "
                f"{user(self.folder.lstat().st_uid)}; start the engine as the user of the run, or with gloo"
            )

    def sees(self, folder: Path) -> bool:
        """Return True if the files of a folder can have a second name in `self.folder`: both are on one file system."""
        return folder.is_dir() and folder.stat().st_dev == self.folder.stat().st_dev

    def link(self, push: Route, files: Sequence[Path], about: About) -> None:
        """Send files of checked weights without a copy. Raises any error of either side."""
        names: list[Path] = []
        try:
            for file in files:  # before the engine is changed, because a file system may refuse links
                names.append(self.folder / f"{secrets.token_hex(8)}.safetensors")
                os.link(file, names[-1])
            push.start_weight_update()
            for name in names:
                push.update_weights({"file": name.name, "ignored": sorted(about.ignored)})
        finally:
            for name in names:
                name.unlink(missing_ok=True)
        push.finish_weight_update()

    def send(self, push: Route, chunk: Sequence[Named]) -> None:
        """Send one chunk."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".safetensors") as file:
            save_file({name: _alone(tensor) for name, tensor in chunk}, file.name)
            push.update_weights({"file": Path(file.name).name})


def _alone(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU. A view of a larger storage is copied, because safetensors does not save shared memory."""
    own = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor.to("cpu", copy=tensor.device.type == "cpu" and not own).contiguous()


class Gloo(_Chunked):
    """Broadcast each chunk to the workers over gloo. `host` is an address of this machine that they can reach."""

    backend = "whet_gloo"

    def __init__(self, workers: int, host: str = "127.0.0.1", seconds: float = 60.0, chunk: int = CHUNK) -> None:
        super().__init__(chunk)
        self.workers, self.host, self.seconds = workers, host, seconds
        self.group: Any = None

    def ready(self, push: Route) -> None:
        """Create the group at the first update, and again after a failed one."""
        if self.group is not None:
            return
        store = self._store()
        size = 1 + self.workers
        joined: list[Any] = []
        # the workers join while the call to them blocks, so this side joins in a thread
        thread = threading.Thread(
            target=lambda: joined.append(gloo_group(store, self.host, 0, size, self.seconds)), daemon=True
        )
        thread.start()
        push.init_weight_transfer_engine({"host": self.host, "port": store.port, "size": size, "seconds": self.seconds})
        thread.join(self.seconds)
        if not joined:
            raise WorkerDied(f"generator: no gloo group with the engine within {self.seconds:g} s")
        self.group = joined[0]

    def send(self, push: Route, chunk: Sequence[Named]) -> None:
        """Send one chunk. After a failure the group is not used again, because its members may be out of step."""
        group, self.group = self.group, None
        held = [tensor.cpu().contiguous() for _, tensor in chunk]
        failed: list[BaseException] = []
        thread = threading.Thread(target=_broadcast, args=(group, held, failed), daemon=True)
        thread.start()
        push.update_weights(
            {
                "names": [name for name, _ in chunk],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in held],
                "shapes": [list(tensor.shape) for tensor in held],
            }
        )
        thread.join(self.seconds)
        if failed or thread.is_alive():
            raise WorkerDied(
                f"generator: the gloo broadcast failed: {first_line(failed[0]) if failed else 'no answer'}"
            )
        self.group = group

    def close(self) -> None:
        """Leave the group."""
        self.group = None

    def _store(self) -> Any:
        # create the listening socket here, because by default the store listens on all interfaces
        with socket.create_server((self.host, 0)) as listener:
            port, handle = listener.getsockname()[1], listener.detach()
        from torch.distributed import TCPStore

        return TCPStore(self.host, port, is_master=True, wait_for_workers=False, master_listen_fd=handle)


def _broadcast(group: Any, held: Sequence[Tensor], failed: list[BaseException]) -> None:
    try:
        for tensor in held:
            group.broadcast(tensor, 0).wait()
    except BaseException as error:
        failed.append(error)


class OnGPU(Transport):
    """The trainer side of vLLM's "nccl" and "ipc" transfers. Needs a GPU. Written from vLLM's sources and not yet run.

    "ipc" shares memory of GPU `gpu`, which must be the engine's GPU. "nccl" broadcasts from GPU `gpu`, which must not be
    the engine's GPU; its store listens on `host` at a free port. Both use torch's default process group if there is one,
    so this process must not be part of a group with other processes.
    """

    def __init__(self, backend: str, workers: int, host: str = "127.0.0.1", gpu: int = 0) -> None:
        self.backend, self.workers, self.host, self.gpu = backend, workers, host, gpu
        self.source, self.engine = _Source(), None

    def carry(self, push: Route, pairs: Iterator[Named]) -> None:
        """Send one weight update with vLLM's trainer engine, which is created for the first one and after a failed one."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        torch.cuda.set_device(self.gpu)  # the current device is set per thread
        self.source.pairs = pairs
        engine: Any = self.engine or WeightTransferTrainerFactory.trainer_init(
            self._info(), client=push, source=self.source
        )
        engine.client = push
        self.engine = None  # stays None after a failure, so that the next update creates a new group
        engine.send_weights()
        self.engine = engine

    def close(self) -> None:
        """Leave the group."""
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None

    def _info(self) -> Any:
        if self.backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=0, packed=True)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with socket.create_server((self.host, 0)) as listener:
            port = listener.getsockname()[1]
        return NCCLTrainerInitInfo(self.host, port, 1 + self.workers, rank=0)


@dataclass(frozen=True)
class _Meta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Source:
    """The tensors in the form that vLLM's trainer engines read: metadata first (only for nccl), then the tensors."""

    pairs: Iterable[Named] = ()

    def metadata(self) -> list[_Meta]:
        self.pairs = list(self.pairs)  # iterated twice: for the metadata and for sending
        return [_Meta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.pairs]

    def __iter__(self) -> Iterator[Named]:
        return ((name, tensor.detach().cuda()) for name, tensor in self.pairs)


BACKENDS = {"shared": Shared.backend, "gloo": Gloo.backend, "nccl": "nccl", "ipc": "ipc"}
"""vLLM's name of each transport."""


def transport(about: About, host: str = "127.0.0.1", gpu: int = 0) -> Transport:
    """Create the trainer side of the transport that the engine was started with.

    Raises RecipeError if whet does not know its name, or a shared folder is not on this machine.
    """
    if about.backend == Shared.backend:
        return Shared(about.folder)
    if about.backend == Gloo.backend:
        return Gloo(about.workers, host)
    if about.backend in ("nccl", "ipc"):
        return OnGPU(about.backend, about.workers, host, gpu)
    raise RecipeError(
        f"generator.transfer: the engine takes weights by {about.backend!r}, known are {sorted(BACKENDS)}"
    )
