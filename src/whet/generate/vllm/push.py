"""Weight updates of a running vLLM engine: checked by name and shape, sent in chunks, and verified."""

import os
import secrets
import socket
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from whet.data import Weights
from whet.errors import ModelError, RecipeError, RunStopped, WhetError, WorkerDied, first_line
from whet.generate.base import weight_files, whole
from whet.generate.vllm.worker import gloo_group

Transfer = Literal["auto", "shared", "gloo", "nccl", "ipc"]
"""How weights are sent: as files in shared memory, over a gloo group, or on GPUs with vLLM's NCCL or CUDA IPC transfer."""

Named = tuple[str, Tensor]

CHUNK = 256 << 20
"""Size of a chunk in bytes: the weights that are copied at a time."""


class Control(Protocol):
    """Methods of an engine that a weight update uses: vLLM's own, and `call` for methods of whet's worker extension."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the workers to the trainer."""

    def start_weight_update(self) -> None:
        """Begin a weight update. From here on the engine's weights are inconsistent until it is finished."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one chunk."""

    def finish_weight_update(self, weight_version: str) -> None:
        """End the weight update after all chunks, and set the version of the weights."""

    def weight_version(self) -> str:
        """Return the version of the weights."""

    def reset_prefix_cache(self) -> bool:
        """Drop keys and values computed with old weights. Return False if some are still in use."""

    def call(self, method: str) -> list[Any]:
        """Call a method of the worker extension. Returns one result per worker."""


@dataclass(frozen=True)
class About:
    """Properties of an engine, as it reports them."""

    shapes: Mapping[str, tuple[int, ...]]
    """shape of each tensor of its model, by name"""
    ignored: frozenset[str]
    """names of tensors that a weight update leaves out"""
    vocabulary: int
    """number of token ids of its model"""
    logprobs_mode: str
    """which log-probs it reports"""
    splits_prompts: bool
    """it runs on a CPU with chunked prefill; it then crashes if it splits the prompt of a request that has a seed"""
    backend: str
    """vLLM's name of the weight transfer"""
    folder: str
    """folder for weight files"""
    workers: int
    """number of workers that receive a weight update"""

    @staticmethod
    def of(control: Control) -> "About":
        """Ask the engine for its properties."""
        told = control.call("whet_about")[0]
        shapes = {name: tuple(shape) for name, shape in told.pop("shapes").items()}
        return About(shapes, frozenset(told.pop("ignored")), **told)


class Route:
    """One weight update. A transport uses it like the engine. `started` is True once the engine's weights were changed."""

    def __init__(self, control: Control, version: int) -> None:
        self.control, self.version, self.started = control, str(version), False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the workers to the trainer."""
        self.control.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        """Discard an unfinished earlier weight update, then begin."""
        self.started = True
        self.control.call("whet_discard_update")
        self.control.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one chunk."""
        self.control.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update: refresh weights that vLLM's reload skips, reset the prefix cache, check the version.

        Raises WorkerDied if the cache cannot be reset, RunStopped if the engine reports a different version.
        """
        self.control.finish_weight_update(weight_version or self.version)
        self.control.call("whet_update_head")
        if not self.control.reset_prefix_cache():
            raise WorkerDied("generator: the prefix cache could not be reset after a push: requests are still running")
        said = self.control.weight_version()
        if said != self.version:
            raise RunStopped(f"generator: weights {self.version} were pushed, but the engine says it has {said!r}")


class Inlet:
    """Load whole weight updates into one engine. If one fails after it started, `incomplete` says so until one succeeds.

    Raises ModelError if the engine's model has no safetensors files.
    """

    def __init__(self, control: Control, transport: "Transport", about: About) -> None:
        if not about.shapes:
            raise ModelError("generator: the engine's model folder has no safetensors files, so no push can be checked")
        self.control, self.transport, self.about = control, transport, about
        self.incomplete = ""

    def push(self, weights: Weights) -> None:
        """Load all weights into the engine.

        Raises ModelError if names or shapes are not those of the engine's model, WorkerDied if the engine could not load
        them. If an error is found before the first chunk is full, the engine is not changed.
        """
        push, transport, handle = Route(self.control, weights.version), self.transport, weights.handle
        try:
            if isinstance(handle, Path) and isinstance(transport, Shared) and transport.sees(handle):
                files = weight_files(handle)
                for _ in checked(_headers(files), self.about):
                    pass
                transport.link(push, files, self.about)
            else:
                transport.carry(push, checked(whole(weights), self.about))
        except BaseException as error:
            if push.started:
                self.incomplete = f"the push of weights {weights.version} failed half-way ({first_line(error)}); push whole weights first"
            if isinstance(error, WhetError) or not isinstance(error, Exception):
                raise
            raise WorkerDied(f"generator: weights {weights.version} did not go in: {first_line(error)}") from error
        self.incomplete = ""


def _headers(files: Sequence[Path]) -> Iterator[Named]:
    """Yield an empty tensor with the name and shape of each tensor in the files. Only the file headers are read."""
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, torch.empty(opened.get_slice(name).get_shape(), device="meta")


def checked(pairs: Iterable[Named], about: About) -> Iterator[Named]:
    """Yield the same tensors. Raises ModelError for an unknown or repeated name, a wrong shape, or a missing tensor.

    vLLM itself accepts a weight update with only some of the tensors, and keeps the old values of the others.
    """
    left = set(about.shapes)
    for name, tensor in pairs:
        if name in about.ignored:
            continue
        if name not in left:
            known = "came twice" if name in about.shapes else "is not of the engine's model"
            raise ModelError(f"generator: tensor {name} {known}")
        if tuple(tensor.shape) != about.shapes[name]:
            raise ModelError(
                f"generator: {name} has shape {tuple(tensor.shape)}, the engine's model {about.shapes[name]}"
            )
        left.remove(name)
        yield name, tensor
    if left:
        raise ModelError(f"generator: {len(left)} tensors of the engine's model are missing, the first {min(left)}")


def chunks(pairs: Iterable[Named], limit: int = CHUNK) -> Iterator[list[Named]]:
    """Yield lists of tensors with at most `limit` bytes in total, or of a single larger tensor."""
    chunk: list[Named] = []
    room = limit
    for name, tensor in pairs:
        size = tensor.numel() * tensor.element_size()
        if chunk and size > room:
            yield chunk
            chunk, room = [], limit
        chunk.append((name, tensor.detach()))
        room -= size
    if chunk:
        yield chunk


class Transport(ABC):
    """A way to send weights to an engine. `backend` is its name in vLLM's configuration."""

    backend: str

    @abstractmethod
    def carry(self, push: Route, pairs: Iterator[Named]) -> None:
        """Start the update, send all tensors and finish it. Raises any error of either side."""

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Release resources that are held between weight updates."""


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
    folder is not on this machine.
    """

    backend = "whet_shared"

    def __init__(self, folder: str, chunk: int = CHUNK) -> None:
        super().__init__(chunk)
        if not Path(folder).is_dir():
            raise RecipeError(f"generator.transfer: the engine's weight folder {folder!r} is not on this machine")
        self.folder = Path(folder)

    def sees(self, folder: Path) -> bool:
        """Return True if the files of a folder can have a second name in `self.folder`: both are on one file system."""
        return folder.is_dir() and folder.stat().st_dev == self.folder.stat().st_dev

    def link(self, push: Route, files: Sequence[Path], about: About) -> None:
        """Send files of checked weights without a copy. Raises any error of either side."""
        push.start_weight_update()
        for file in files:
            name = self.folder / f"{secrets.token_hex(8)}.safetensors"
            os.link(file, name)
            try:
                push.update_weights({"file": name.name, "ignored": sorted(about.ignored)})
            finally:
                name.unlink()
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
