"""Rewards of your own, one per answer and one per token: python examples/own_reward.py MODEL."""

import sys

import whet


def polite(prompts, completions, **columns):
    """One number per answer."""
    return [float("please" in completion) for completion in completions]


def brief(prompts, completions, completion_ids, **columns):
    """One number per token: each costs a little."""
    return [[-0.02] * len(ids) for ids in completion_ids]


if __name__ == "__main__":
    rows = [{"prompt": f"one {word}"} for word in ("yes", "no", "good", "bad")]
    rewards = [{"source": polite, "weight": 1.0}, {"source": brief, "weight": 0.5}]
    whet.train("ppo", model=sys.argv[1], reward=rewards, data=rows, num_steps=2, prompts_per_step=4, mini_batch_size=2,
               max_new_tokens=12, out="runs/own_reward")  # fmt: skip
