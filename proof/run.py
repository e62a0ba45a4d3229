"""`make proof`: every known answer at full length, over seeds; prints the table and writes docs/proof.json.

With --only, or --missing (what docs/proof.json does not have yet), the other cases keep what they had there.

python -m proof.run [--jobs 2] [--seeds 3] [--only REGEX OF CASES] [--missing] [--out docs/proof.json]
"""

import argparse
import json
import re
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from proof.enumeration import Problem, kl

FILE = Path(__file__).parent.parent / "docs" / "proof.json"
OFFLINE = (
    "dpo, soft labels",
    "dpo, soft labels, constant rate",
    "dpo, 384,000 sampled labels",
    "exact KL by enumeration",
)
BOUNDS = {
    "dpo, soft labels": 0.001, "dpo, soft labels, constant rate": 0.004, "dpo, 384,000 sampled labels": 0.0305,
    "exact KL by enumeration": 0.0023,
}  # fmt: skip


def one(name: str, seed: int) -> dict[str, float]:
    """One case with one seed: nats from the start and from what was learned to its own end, and from that end to pi*."""
    import torch

    from proof import cases

    torch.set_num_threads(1)
    problem = Problem()
    reference = problem.token_logp(problem.model(seed))
    optimum = problem.optimum(reference.sum(-1))
    with TemporaryDirectory() as folder:
        if name in OFFLINE:
            own, end = offline(name, problem, Path(folder), seed), optimum
        else:
            case = cases.cases(problem)[name]
            end, _ = cases.ends(case, problem, reference)
            own = cases.learned(case, problem, Path(folder), cases.Budget(), seed=seed)
    return {
        "start": kl(reference.sum(-1), end), "left": max(kl(own, end), 0.0), "elsewhere": max(kl(end, optimum), 0.0),
    }  # fmt: skip


def offline(name: str, problem: Problem, folder: Path, seed: int):
    """The policy (P, Y) after DPO, or after the exact KL by enumeration: the same network without any sampling."""
    from proof import cases

    if name == "exact KL by enumeration":
        return cases.enumerated(problem, cases.Budget(), seed=seed)
    if "sampled" in name:
        labels = cases.pairs(problem, labels=384_000, seed=seed)
        return cases.preferred(problem, labels, folder, steps=600, batch=len(labels) // 600, lr=0.003, seed=seed)
    pairs = cases.pairs(problem)
    final = 1.0 if "constant" in name else 0.0
    return cases.preferred(problem, pairs, folder, steps=300, batch=len(pairs), lr=0.003, final=final, seed=seed)


def _row(own: list[dict[str, float]], method: str, bound: float) -> dict:
    """One case over its seeds."""
    return {
        "method": method, "left": sorted(one["left"] for one in own), "bound": bound,
        "elsewhere": statistics.mean(one["elsewhere"] for one in own),
        "start": statistics.mean(one["start"] for one in own),
    }  # fmt: skip


def _write(rows: dict[str, dict | None], seeds: int, file: Path) -> None:
    """`file` (docs/proof.json): what was run, when and with which versions, and the cases so far."""
    about = {"date": datetime.now(UTC).date().isoformat(), "seeds": seeds, "samples": 240 * 512}
    about |= {name: metadata.version(name) for name in ("torch", "transformers")}
    whole = {"about": about, "cases": {name: row for name, row in rows.items() if row}}
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Runs all; 1 when a case is further from its end than it may be."""
    from proof import cases

    parser = argparse.ArgumentParser(prog="python -m proof.run")
    for option, default in (("--jobs", 2), ("--seeds", 3)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--only", default="")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    known = cases.cases(Problem())
    before = json.loads(given.out.read_text(encoding="utf-8"))["cases"] if given.out.is_file() else {}
    names = [
        name for name in (*known, *OFFLINE) if re.search(given.only, name) and not (given.missing and name in before)
    ]
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    rows: dict[str, dict] = {}
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        runs = {pool.submit(one, name, seed): (name, seed) for name in names for seed in range(given.seeds)}
        for done in as_completed(runs):
            name, seed = runs[done]
            found[name][seed] = done.result()
            print(f"{name}, seed {seed}: {found[name][seed]['left']:.5f} nats left", file=sys.stderr, flush=True)
            if len(found[name]) == given.seeds:  # a run that is cut off keeps the cases that were done
                bound = BOUNDS.get(name) or (known[name].bound if known[name].field == "regularized" else 0.005)
                rows[name] = _row(list(found[name].values()), known[name].method if name in known else "dpo", bound)
                _write(
                    {case: rows.get(case) or before.get(case) for case in (*known, *OFFLINE)}, given.seeds, given.out
                )
    print(f"{'case':<42}{'start':>8}{'worst left':>12}{'bound':>8}{'its end to pi*':>16}")
    for name in names:
        row = rows[name]
        worst, bound = max(row["left"]), row["bound"]
        mark = "" if worst < bound else "   above the bound"
        print(f"{name:<42}{row['start']:>8.3f}{worst:>12.5f}{bound:>8.4f}{row['elsewhere']:>16.4f}{mark}")
    return int(any(max(row["left"]) >= row["bound"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
