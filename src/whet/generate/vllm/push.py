"""Weight updates of a running vLLM engine: checked by name and shape, sent in chunks, and verified."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from whet.data import Weights
from whet.errors import ModelError, RunStopped, WhetError, WorkerDied, first_line
from whet.generate.base import weight_files, whole

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

    def call(self, method: str, *given: Any) -> list[Any]:
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
            if isinstance(handle, Path) and transport.sees(handle):
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

    def sees(self, folder: Path) -> bool:
        """Return True if the files of a folder can be sent without a copy, by `link`."""
        return False

    def link(self, push: "Route", files: Sequence[Path], about: "About") -> None:
        """Send files of checked weights without a copy. Raises any error of either side."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Release resources that are held between weight updates."""
