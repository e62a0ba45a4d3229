"""GRPO with the loop in your own hands: python examples/grpo_loop.py MODEL. Started again, it goes on where it was."""

import sys

import whet


def short(prompts, completions, **columns):
    """The reward of an answer: the fewer words, the better."""
    return [-len(completion.split()) / 10 for completion in completions]


ROWS = [{"prompt": f"one {word}"} for word in ("yes", "no", "good", "bad")]
OPTIONS = {
    "num_steps": 4, "prompts_per_step": 4, "num_generations": 4, "mini_batch_size": 8, "max_new_tokens": 12, "lr": 1e-3,
    "save_every": 1,
}  # fmt: skip


def main(model: str, out: str = "runs/grpo_loop") -> None:
    """Train and export. `whet.train` with the same arguments gives the same weights."""
    with whet.Session("grpo", model=model, reward=short, data=ROWS, out=out, resume="auto", **OPTIONS) as session:
        for step in session.steps():
            groups = session.generate()  # prompts x answers, with token ids
            scores = session.score(groups)  # every reward, by name
            batch = session.measure(groups, scores)  # old_logp, ref_logp ...
            batch = session.advantages(batch)
            for mini in session.minibatches(batch):
                session.forward_backward(mini)  # or loss=my_loss
                session.optim_step()
            session.publish()  # new weights to the generator
            step.log(session.metrics())
        session.export(f"{out}/model")


if __name__ == "__main__":
    main(*sys.argv[1:])
