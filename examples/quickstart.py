"""Train a policy with GRPO in five lines: python examples/quickstart.py MODEL."""

import sys

import whet


def short(prompts, completions, **columns):
    """The reward of an answer: the fewer words, the better."""
    return [-len(completion.split()) / 10 for completion in completions]


if __name__ == "__main__":
    rows = [{"prompt": f"one {word}"} for word in ("yes", "no", "good", "bad")]
    run = whet.train("grpo", model=sys.argv[1], reward=short, data=rows, num_steps=2, prompts_per_step=4, num_generations=4,
                     max_new_tokens=12, lr=1e-3, out="runs/quickstart")  # fmt: skip
    print(f"AutoModelForCausalLM.from_pretrained('{run}/model')")
