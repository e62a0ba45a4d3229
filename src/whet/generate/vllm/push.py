"""New weights for a running vLLM engine: checked by name and shape, carried over in chunks, and verified."""

import socket
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from whet.data import Weights
from whet.errors import ModelError, RecipeError, RunStopped, WhetError, WorkerDied, first_line
from whet.generate.base import whole
from whet.generate.vllm.worker import gloo_group

Transfer = Literal["auto", "shared", "gloo", "nccl", "ipc"]
"""How weights travel: a file in shared memory, a gloo group, or on GPUs vLLM's own NCCL and CUDA IPC."""

Named = tuple[str, Tensor]

CHUNK = 256 << 20
"""Bytes of weights that are copied at a time."""


class Control(Protocol):
    """What an engine lets a trainer do to its weights: vLLM's own calls, and whet's worker extension by name."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the workers to the trainer."""

    def start_weight_update(self) -> None:
        """From here on the engine's weights are torn."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One chunk."""

    def finish_weight_update(self, weight_version: str) -> None:
        """All chunks have come; the weights are called this from now on."""

    def weight_version(self) -> str:
        """What the weights are called."""

    def reset_prefix_cache(self) -> bool:
        """Forget the keys and values that old weights made; False when some are still in use."""

    def call(self, method: str) -> list[Any]:
        """A method of the worker extension, one result per worker."""


@dataclass(frozen=True)
class About:
    """What an engine says of itself."""

    shapes: Mapping[str, tuple[int, ...]]
    """each tensor of its model by name"""
    ignored: frozenset[str]
    """tensors that a push leaves out"""
    vocabulary: int
    """how many token ids its model knows"""
    logprobs_mode: str
    """which log-probs it reports"""
    splits_prompts: bool
    """it may read a prompt in two steps on a CPU, which kills it when the request has a seed"""
    backend: str
    """how weights travel, in vLLM's words"""
    folder: str
    """where weight files may lie"""
    workers: int
    """how many take a push"""

    @staticmethod
    def of(control: Control) -> "About":
        """Asked of the engine once."""
        told = control.call("whet_about")[0]
        shapes = {name: tuple(shape) for name, shape in told.pop("shapes").items()}
        return About(shapes, frozenset(told.pop("ignored")), **told)


class Route:
    """One push, seen by a transport as the engine itself. `started` is True once the engine's weights are torn."""

    def __init__(self, control: Control, version: int) -> None:
        self.control, self.version, self.started = control, str(version), False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the workers to the trainer."""
        self.control.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        """Clear what an earlier push left unfinished, then begin."""
        self.started = True
        self.control.call("whet_forget")
        self.control.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One chunk."""
        self.control.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All chunks have come: mend what a reload passes over, forget the cache, check the version.

        Raises WorkerDied when the cache cannot be reset, RunStopped when the engine says another version.
        """
        self.control.finish_weight_update(weight_version or self.version)
        self.control.call("whet_mend")
        if not self.control.reset_prefix_cache():
            raise WorkerDied("generator: the prefix cache could not be reset after a push: requests are still running")
        said = self.control.weight_version()
        if said != self.version:
            raise RunStopped(f"generator: weights {self.version} were pushed, but the engine says it has {said!r}")


class Inlet:
    """Takes whole pushes into one engine. After a push that failed half-way `torn` says so until one succeeds.

    Raises ModelError where the engine's model has no safetensors files.
    """

    def __init__(self, control: Control, transport: "Transport", about: About) -> None:
        if not about.shapes:
            raise ModelError("generator: the engine's model folder has no safetensors files, so no push can be checked")
        self.control, self.transport, self.about = control, transport, about
        self.torn = ""

    def push(self, weights: Weights) -> None:
        """Push all of them.

        Raises ModelError when names or shapes are not those of the engine's model, WorkerDied when the engine could
        not take them. Nothing is changed by weights that are found wrong before the first chunk is full.
        """
        push = Route(self.control, weights.version)
        try:
            self.transport.carry(push, checked(whole(weights), self.about))
        except BaseException as error:
            if push.started:
                self.torn = f"the push of weights {weights.version} failed half-way ({first_line(error)}); push whole weights first"
            if isinstance(error, WhetError) or not isinstance(error, Exception):
                raise
            raise WorkerDied(f"generator: weights {weights.version} did not go in: {first_line(error)}") from error
        self.torn = ""


def checked(pairs: Iterable[Named], about: About) -> Iterator[Named]:
    """The same tensors, each known and of the right shape, none missing; raises ModelError at the first that is not.

    vLLM itself takes a push of some tensors and leaves the others old.
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
    """Lists of tensors of at most `limit` bytes together, or of one larger tensor alone."""
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
    """A way into an engine. `backend` is its name in vLLM's configuration."""

    backend: str

    @abstractmethod
    def carry(self, push: Route, pairs: Iterator[Named]) -> None:
        """Start, send all tensors, finish; raises whatever goes wrong on either side."""

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Release what is held between pushes."""


class _Chunked(Transport):
    """Sends chunk by chunk, so that no second copy of all weights is made."""

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
        """Before the first chunk of a push."""

    @abstractmethod
    def send(self, push: Route, chunk: Sequence[Named]) -> None:
        """One chunk."""


class Shared(_Chunked):
    """Each chunk is a safetensors file that lives in `folder` until the workers have read it."""

    backend = "whet_shared"

    def __init__(self, folder: str, chunk: int = CHUNK) -> None:
        super().__init__(chunk)
        if not Path(folder).is_dir():
            raise RecipeError(f"generator.transfer: the engine's weight folder {folder!r} is not on this machine")
        self.folder = Path(folder)

    def send(self, push: Route, chunk: Sequence[Named]) -> None:
        """One chunk."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".safetensors") as file:
            # copied, because safetensors refuses tensors that share memory
            save_file({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in chunk}, file.name)
            push.update_weights({"file": Path(file.name).name})


class Gloo(_Chunked):
    """Each chunk is broadcast to the workers; `host` is the address of this machine that they can reach."""

    backend = "whet_gloo"

    def __init__(self, workers: int, host: str = "127.0.0.1", seconds: float = 60.0, chunk: int = CHUNK) -> None:
        super().__init__(chunk)
        self.workers, self.host, self.seconds = workers, host, seconds
        self.group: Any = None

    def ready(self, push: Route) -> None:
        """Build the group at the first push, and again after a failed one."""
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
        """One chunk. A group in which something failed is never used again: the sides may be out of step."""
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
        # a listening socket of our own, because the store by itself would listen on every interface
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
    """vLLM's own trainer side of "nccl" or "ipc". It needs a GPU, and is written from vLLM's sources: never yet run.

    "ipc" hands over memory of GPU `gpu`, which must be the engine's own. "nccl" broadcasts from there, which must be
    another one; its store listens on `host` at a free port. Both meet through torch's default process group where there is
    one, so they are for a process that works alone.
    """

    def __init__(self, backend: str, workers: int, host: str = "127.0.0.1", gpu: int = 0) -> None:
        self.backend, self.workers, self.host, self.gpu = backend, workers, host, gpu
        self.source, self.engine = _Source(), None

    def carry(self, push: Route, pairs: Iterator[Named]) -> None:
        """One push through vLLM's trainer engine, which is made at the first one and after a failed one."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        torch.cuda.set_device(self.gpu)  # each thread has its own
        self.source.pairs = pairs
        engine: Any = self.engine or WeightTransferTrainerFactory.trainer_init(
            self._info(), client=push, source=self.source
        )
        engine.client = push
        self.engine = None  # after a failure a new group is made
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
    """The tensors as vLLM's trainer engines read them: described once (under nccl), then streamed."""

    pairs: Iterable[Named] = ()

    def metadata(self) -> list[_Meta]:
        self.pairs = list(self.pairs)  # described before they are sent, so they must be at hand twice
        return [_Meta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.pairs]

    def __iter__(self) -> Iterator[Named]:
        return ((name, tensor.detach().cuda()) for name, tensor in self.pairs)


BACKENDS = {"shared": Shared.backend, "gloo": Gloo.backend, "nccl": "nccl", "ipc": "ipc"}
"""vLLM's names of the transports."""


def transport(about: About, host: str = "127.0.0.1", gpu: int = 0) -> Transport:
    """The trainer's side of the transport that the engine was started with.

    Raises RecipeError where whet knows none of that name, or a shared folder is not on this machine.
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
