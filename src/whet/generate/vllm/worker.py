"""Extension of vLLM's workers: weight transfer without a GPU, and workarounds for vLLM's weight reload.

vLLM imports this module in each worker because it is configured as the worker extension. It can be imported without
vLLM, but then its classes cannot be used.
"""

import json
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from whet.processes import watch

try:
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
except ImportError:
    WeightTransferEngine = WeightTransferInitInfo = WeightTransferUpdateInfo = object
    WeightTransferEngineFactory = None

EXTENSION = "whet.generate.vllm.worker.Extension"
FOLDER = "whet_folder"
"""The key in vLLM's additional_config for the folder of weight files."""
OWNER = "whet_owner"
"""The key in vLLM's additional_config for the id of the process that started the engine. The engine ends when it ends."""


def gloo_group(store: TCPStore, host: str, rank: int, size: int, seconds: float) -> ProcessGroupGloo:
    """Join the gloo group that transfers weights. It listens only on `host` and its timeout is `seconds`.

    The group is created directly, so that the default process group of this process is not changed.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=seconds)
    return ProcessGroupGloo(PrefixStore("whet", store), rank, size, options)


class Extension:
    """Methods that vLLM adds to its worker class. The driver calls them by name."""

    def whet_about(self) -> dict[str, Any]:
        """Return the fields of `push.About` as JSON values. Also start the thread that watches the owner process."""
        worker: Any = self
        owner = worker.vllm_config.additional_config.get(OWNER)
        if owner is not None and not any(one.name == "whet-owner" for one in threading.enumerate()):
            threading.Thread(target=watch, args=(owner,), daemon=True, name="whet-owner").start()
        names = _shapes(_model_folder(worker.model_config))
        tied = getattr(worker.model_config.hf_text_config, "tie_word_embeddings", False)
        ignored = [
            name for name in names if (tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")
        ]
        return {
            "shapes": {name: shape for name, shape in names.items() if name not in ignored},
            "ignored": sorted({*ignored, *(["lm_head.weight"] if tied else [])}),
            "vocabulary": worker.model_config.get_vocab_size(),
            "logprobs_mode": worker.model_config.logprobs_mode,
            "splits_prompts": worker.device.type == "cpu" and worker.scheduler_config.enable_chunked_prefill,
            "backend": getattr(worker.vllm_config.weight_transfer_config, "backend", ""),
            "folder": worker.vllm_config.additional_config.get(FOLDER, ""),
            "workers": worker.parallel_config.world_size,
        }

    def whet_close(self, ids: list[int]) -> None:
        """Give these ids probability 0 from now on, in sampling and in the scores of prompts: no token has them."""
        worker: Any = self
        model = worker.get_model()
        compute = getattr(model, "whet_compute_logits", None) or model.compute_logits
        model.whet_compute_logits = compute
        closed = torch.tensor(ids, dtype=torch.long, device=worker.device)

        def computed(*given: Any, **options: Any) -> Any:
            logits = compute(*given, **options)  # None on workers that do not have them
            return logits if logits is None else logits.index_fill(-1, closed, -torch.inf)

        model.compute_logits = computed

    def whet_discard_update(self) -> None:
        """Discard the state of an unfinished weight update.

        Otherwise vLLM counts its tensors as part of the next update, and finishes layers before all their tensors arrived.
        """
        from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

        worker: Any = self
        worker._weight_update_active = False
        for layer in worker.get_model().modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                if info.kernel_tensors is not None:
                    _place_kernel_tensors(layer, info)
                info.reset()

    def whet_update_head(self) -> None:
        """Update a tied head to the new weights of the embedding. vLLM's reload skips it, and on a CPU it keeps a packed copy
        of the old weights."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

        worker: Any = self
        for module in worker.get_model().modules():
            # processing a quantized head twice would be wrong, so only unquantized heads are processed
            if isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
                module.quant_method.process_weights_after_loading(module)


@dataclass
class SharedInit(WeightTransferInitInfo):
    """No parameters: the folder was set when the worker started."""


@dataclass
class SharedUpdate(WeightTransferUpdateInfo):
    """One chunk: the name of a safetensors file in the worker's folder, and the names in it that are not loaded."""

    file: str
    ignored: list[str] = field(default_factory=list)


@dataclass
class GlooInit(WeightTransferInitInfo):
    """Address and port of the trainer's store, size of the group including the trainer, and timeout in seconds."""

    host: str
    port: int
    size: int
    seconds: float


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """One chunk: its tensors in the order in which the trainer broadcasts them."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class _Reloading(WeightTransferEngine):
    """A weight update in checkpoint format. vLLM reloads layer by layer as the tensors arrive."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's version synchronizes the accelerator, and torch raises if there is none
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()


class SharedEngine(_Reloading):
    """Load weights from safetensors files in one folder, preferably in shared memory. Files outside it are refused."""

    init_info_cls, update_info_cls = SharedInit, SharedUpdate

    def init_transfer_engine(self, init_info: SharedInit) -> None:
        """Do nothing."""

    def receive_weights(self, update_info: SharedUpdate) -> None:
        """Load one file. Raises ValueError for a path outside the folder."""
        folder = Path(self.vllm_config.additional_config[FOLDER]).resolve()
        file = (folder / update_info.file).resolve()
        if file.parent != folder:
            raise ValueError(f"{update_info.file!r} is not a file of the weight folder")
        with safe_open(str(file), "pt") as tensors:
            names = [name for name in tensors.keys() if name not in update_info.ignored]  # noqa: SIM118
            self.model.load_weights((name, tensors.get_tensor(name)) for name in names)

    def shutdown(self) -> None:
        """Do nothing."""


class GlooEngine(_Reloading):
    """Receive weights that the trainer broadcasts over gloo."""

    init_info_cls, update_info_cls = GlooInit, GlooUpdate
    group: Any = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Join the trainer's group. The trainer is rank 0."""
        rank = 1 + self.parallel_config.rank
        limit = timedelta(seconds=init_info.seconds)
        store = TCPStore(init_info.host, init_info.port, is_master=False, timeout=limit)
        self.group = gloo_group(store, init_info.host, rank, init_info.size, init_info.seconds)

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Receive one chunk into host memory and load it."""
        self.model.load_weights(self._received(update_info))

    def _received(self, chunk: GlooUpdate) -> list[tuple[str, Tensor]]:
        # receive the whole chunk before loading any of it, so that a loading error leaves no broadcast unmatched
        if self.group is None:
            raise RuntimeError("the group for weights was not joined")
        out = []
        for name, dtype, shape in zip(chunk.names, chunk.dtypes, chunk.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(tensor, 0).wait()
            out.append((name, tensor))
        return out

    def shutdown(self) -> None:
        """Leave the group."""
        self.group = None


if WeightTransferEngineFactory is not None:
    WeightTransferEngineFactory.register_engine("whet_shared", SharedEngine)
    WeightTransferEngineFactory.register_engine("whet_gloo", GlooEngine)


def _model_folder(model_config: Any) -> Path:
    """Return the folder of the weights that the engine was started with."""
    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor in a folder of safetensors files. Only the file headers are read."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
    out: dict[str, list[int]] = {}
    for file in files:
        with safe_open(str(folder / file), "pt") as tensors:
            out |= {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return out
