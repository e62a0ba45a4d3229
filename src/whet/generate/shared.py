"""Answers from all workers together: each generates its share, and all end up with all samples."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from whet.data import Sample, Weights
from whet.distributed import Workers
from whet.generate.base import Generator, Request, all_logprobs, cut


class SharedGenerator:
    """A generator in each worker as one. Every worker calls it with the same requests and gets the same samples.

    Units are cut before they are dealt, so that which worker makes an answer does not change it.
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
        """Every worker's generator takes them, or all raise. Where one has another version in the end, that is what is told."""
        self.workers.together(lambda: self.own.load_weights(weights))
        versions = self.workers.gather(self.own.version)
        self.version = next((one for one in versions if one != weights.version), weights.version)

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """The scores of the first engine."""
        return self.all_logprobs(ids)[0]

    def all_logprobs(self, ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """The scores of every worker's engines."""
        return [one for every in self.workers.together(lambda: all_logprobs(self.own, ids)) for one in every]

    def sleep(self) -> None:
        """See `Generator.rest`."""
        self.workers.together(self.own.sleep)

    def close(self) -> None:
        """Each worker ends its own."""
        self.own.close()
