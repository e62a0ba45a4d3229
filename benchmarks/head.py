"""CPU seconds of the head beside its plain form, forward and backward: the ratio at several sizes.

    python -m benchmarks.head [--short]

The plain form is `F.linear` and `F.cross_entropy(reduction="none")`, or two `F.linear` and their KL. Weights trained or frozen;
the log-prob alone, with the entropy of every eighth token, and with a temperature. One thread, float32, alternating
repetitions; each line has the best seconds of the plain form, the ratio, and the peak memory of the logits. `--short` shows in
seconds that all of it runs; its numbers mean nothing.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from whet.ops import exact_kl, linear_kl, linear_tokens

SHAPES = ((2048, 128, 700), (8192, 512, 400), (49152, 576, 450), (49152, 576, 1200))
"""vocabulary, hidden size, tokens"""


def seconds(runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """The best CPU seconds of each, run in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(repetitions):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - begun)
    return best


def forms(vocabulary: int, size: int, tokens: int, frozen: bool) -> dict[str, Callable[[], object]]:
    """The plain form and ours on the same numbers."""
    noise = torch.Generator().manual_seed(0)
    states, weight = torch.randn(tokens, size, generator=noise), 0.05 * torch.randn(vocabulary, size, generator=noise)
    other = states + 0.1 * torch.randn(tokens, size, generator=noise)
    ids, grown = torch.randint(0, vocabulary, (tokens,), generator=noise), torch.randn(tokens, generator=noise)
    eighth, reference = torch.arange(tokens) % 8 == 0, weight.clone()
    hot = torch.full((tokens,), 0.7)

    def run(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def whole() -> None:
            own = states.clone().requires_grad_()
            head = weight.detach().requires_grad_(not frozen)
            (function(own, head) * grown).sum().backward()

        return whole

    def plain_kl(h: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = functional.linear(other, reference)
        return exact_kl(functional.linear(h, w), theirs)

    return {
        "plain": run(lambda h, w: -functional.cross_entropy(functional.linear(h, w), ids, reduction="none")),
        "logp": run(lambda h, w: linear_tokens(h, w, ids, with_entropy=False)[0]),
        "entropy of 1/8": run(lambda h, w: linear_tokens(h, w, ids, with_entropy=eighth)[0]),
        "temperature": run(lambda h, w: linear_tokens(h, w, ids, with_entropy=False, temperature=hot)[0]),
        "plain kl": run(plain_kl),
        "kl": run(lambda h, w: linear_kl(h, w, other, reference, temperature=None)),
    }


def main() -> None:
    """Prints one line per shape and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    torch.set_num_threads(1)
    for vocabulary, size, tokens in ((64, 8, 16),) if short else SHAPES:
        for frozen in (False, True):
            best = seconds(forms(vocabulary, size, tokens, frozen), 2 if short else 4 if vocabulary > 10_000 else 15)
            start = f"V {vocabulary}  H {size}  N {tokens}  {'frozen ' if frozen else 'trained'}"
            for name in ("logp", "entropy of 1/8", "temperature", "kl"):
                plain = best["plain kl" if name == "kl" else "plain"]
                print(f"{start}  {name:<14}  plain {plain:.4f} s  ratio {best[name] / plain:.2f}", flush=True)


if __name__ == "__main__":
    main()
