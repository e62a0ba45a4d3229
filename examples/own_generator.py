"""A generator of your own, for sampling and evaluation: python examples/own_generator.py MODEL."""

import sys

import whet


class Echo:
    """Answers each prompt with its own last message. The keyword-only parameters are the options."""

    reports = frozenset()  # what the samples carry beside ids and text
    version = 0

    def __init__(self, *, end: str = "!") -> None:
        self.end = end

    def generate(self, requests):
        """One sample per request, in order."""
        for request in requests:
            text = request.prompt.text + self.end
            yield whet.Sample(request.draw, request.answer, (), (), 0, "stop", text)

    def load_weights(self, weights):
        """There are none."""

    def logprobs(self, ids):
        """There are none."""

    def sleep(self):
        """There is no memory to free."""

    def close(self):
        """There is nothing to close."""


if __name__ == "__main__":
    generator = {"name": "examples/own_generator.py:Echo", "end": " ?"}
    rows = [{"prompt": f"one {word}"} for word in ("yes", "no")]
    out = whet.sample(
        model=sys.argv[1],
        data=rows,
        generator=generator,
        num_generations=2,
        max_new_tokens=9,
        out="runs/echo/metrics.jsonl",
    )
    print(out.read_text())
