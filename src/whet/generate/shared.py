"""Data-parallel generation: each worker generates its share of the answers, and all workers get all samples."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from whet.data import Sample, Weights
from whet.distributed import Workers
from whet.generate.base import Generator, Request, all_logprobs, cut


class SharedGenerator:
    """The generators of all workers as one. Every worker calls it with the same requests and gets the same samples.

    Requests are split into units before the units are distributed. So an answer does not depend on the worker that
    generates it.
    """

    def __init__(self, own: Generator, workers: Workers, unit: int) -> None:
        self.own, self.workers, self.unit = own, workers, unit
        self.reports, self.version = own.reports, own.version

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """See `Generator.generate`."""
        units = cut(requests, self.unit)
        asked = [requests[place] for unit in self.workers.shard(units) for place in unit]
        shares = self.workers.together(lambda: list(self.own.generate(asked)))
        samples: list[Sample | None] = [None] * len(requests)
        for rank, share in enumerate(shares):
            places = [place for unit in units[rank :: self.workers.size] for place in unit]
            for place, sample in zip(places, share, strict=True):
                samples[place] = sample
        yield from (sample for sample in samples if sample is not None)

    def load_weights(self, weights: Weights) -> None:
        """Load the weights in every worker's generator, or raise on all workers. If a generator then has a different version,
        `version` is that one."""
        self.workers.together(lambda: self.own.load_weights(weights))
        versions = self.workers.gather(self.own.version)
        self.version = next((one for one in versions if one != weights.version), weights.version)

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Return the log-probs of the first engine."""
        return self.all_logprobs(ids)[0]

    def all_logprobs(self, ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the log-probs of every engine of every worker."""
        return [one for every in self.workers.together(lambda: all_logprobs(self.own, ids)) for one in every]

    def sleep(self) -> None:
        """See `Generator.sleep`."""
        self.workers.together(self.own.sleep)

    def close(self) -> None:
        """End this worker's own generator."""
        self.own.close()
