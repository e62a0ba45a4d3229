"""DPO with the loop in your own hands: python examples/dpo_loop.py MODEL."""

import sys

import whet

PAIRS = [{"prompt": f"one {word}", "chosen": "yes please", "rejected": "no"} for word in ("good", "bad", "a", "b")]


def main(model: str, out: str = "runs/dpo_loop") -> None:
    """Train on pairs, and print each loss."""
    with whet.Session("dpo", model=model, data=PAIRS, out=out, num_epochs=2, batch_size=2, lr=1e-3) as session:
        for batch in session.batches():
            session.update(batch)
            print(f"loss {session.metrics()['loss']:.4f}")
        session.export(f"{out}/model")


if __name__ == "__main__":
    main(*sys.argv[1:])
