"""LoRA adapters of a running vLLM engine: each update loads the new adapter and removes the old one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whet.data import Weights
from whet.errors import ModelError, RunStopped, WorkerDied, first_line

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of `max_lora_rank` that vLLM supports."""


class Adapters:
    """Load adapters into an engine that has one slot for them. `current` is the loaded adapter, which every request names.

    `do` makes a call to vLLM. `incomplete` says why no request may be made after an adapter failed to load; "" otherwise.
    """

    def __init__(self, do: Callable[[Callable[[Any], Any]], Any], folder: Path) -> None:
        self.do, self.folder = do, folder
        self.current: Any = None
        self.incomplete = ""
        self._number = 0

    def push(self, weights: Weights) -> None:
        """Remove the old adapter and load the new one under a new id, because vLLM keeps the old adapter of an id in use.

        Raises ModelError for a folder without an adapter, WorkerDied if the engine died or could not load the adapter,
        RunStopped if the engine reports a different version or adapter afterwards.
        """
        from vllm.lora.request import LoRARequest

        folder = self._adapter_folder(weights.handle)
        self._number += 1
        new = LoRARequest(f"whet-{self._number}", self._number, str(folder))
        self.incomplete = f"the adapter of weights {weights.version} did not go in; push another one first"
        try:
            said = self.do(lambda llm: _swap(llm, new, str(weights.version)))
        except WorkerDied:
            raise
        except Exception as error:
            raise WorkerDied(f"generator: weights {weights.version} did not go in: {first_line(error)}") from error
        if said != ({self._number}, str(weights.version), True):
            raise RunStopped(
                f"generator: adapter {self._number} of weights {weights.version} was pushed, "
                f"but the engine says adapters, version and whether its cache is clear are {said}"
            )
        self.current, self.incomplete = new, ""

    def _adapter_folder(self, handle: Any) -> Path:
        if isinstance(handle, Path):
            folder = handle
        else:
            folder = self.folder / "adapter"
            shutil.rmtree(folder, ignore_errors=True)
            handle.export(folder, None, merge=False)
        if not (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: no adapter_config.json in it, and this generator takes adapters (lora)")
        return folder


def _swap(llm: Any, new: Any, version: str) -> tuple[set[int], str, bool]:
    """Replace the adapter. Return the adapter ids of the engine, its version, and whether its prefix cache was reset."""
    engine = llm.llm_engine
    for old in engine.list_loras():
        engine.remove_lora(old)
    engine.add_lora(new)
    llm.update_weight_version(version)
    return set(engine.list_loras()), llm.get_weight_version(), bool(llm.reset_prefix_cache())
