"""Checkpoint files of learners: whole tensors by name in safetensors files, one file per worker."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from whet.distributed import Workers
from whet.errors import CheckpointError


def write(folder: Path, name: str, tensors: Iterable[tuple[str, Tensor]], workers: Workers) -> list[Exception]:
    """Write `name.safetensors`, or with several workers `name-00001-of-00002.safetensors` and so on.

    All workers iterate over all tensors in the same order, because gathering a tensor may be collective. Each writes its
    share of the bytes, so no worker holds all tensors. Each tensor is complete in one file, so a learner with any backend
    and any number of workers can read them. An error while writing is returned, not raised, so that this worker continues
    in step with the others.
    """
    from safetensors.torch import save_file

    own: dict[str, Tensor] = {}
    sizes = [0] * workers.size
    for key, value in tensors:
        owner = sizes.index(min(sizes))
        sizes[owner] += value.numel() * value.element_size()
        if owner == workers.rank:
            own[key] = value.detach().cpu().contiguous()
    part = f"-{workers.rank + 1:05d}-of-{workers.size:05d}" if workers.size > 1 else ""
    try:
        save_file(own, str(folder / f"{name}{part}.safetensors"))
    except Exception as error:
        return [error]
    return []


class Stored(Mapping[str, Tensor]):
    """The tensors that `write` saved under a name. Each is read from its file on access.

    Raises CheckpointError if files are missing.
    """

    def __init__(self, folder: Path, name: str) -> None:
        from safetensors import SafetensorError, safe_open

        whole = folder / f"{name}.safetensors"
        files = [whole] if whole.is_file() else sorted(folder.glob(f"{name}-[0-9]*-of-[0-9]*.safetensors"))
        if not files or (files != [whole] and len(files) != int(files[0].stem.rpartition("-")[2])):
            raise CheckpointError(f"{folder}: the files of {name} are not all there, found {len(files)}")
        try:
            self._files = [safe_open(str(file), framework="pt") for file in files]
        except SafetensorError as error:
            raise CheckpointError(f"{folder}: the files of {name} are not safetensors files ({error})") from error
        self._where = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        return self._where[key].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading its values."""
        return tuple(self._where[key].get_slice(key).get_shape())
