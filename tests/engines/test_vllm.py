"""vLLM as a generator: the contract, transformers' log-probs, new weights, failed pushes, dead engines.

These start real engines; they are skipped where vLLM is not installed.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from generate.contract import Contract
from models import helpers as h

from benchmarks import pushes
from engines import helpers as e
from whet.cluster.folders import WeightWriter, contents, unpacked
from whet.data import Weights
from whet.distributed import Workers
from whet.errors import ModelError, RecipeError, RunStopped, WorkerDied
from whet.generate import Request
from whet.generate.vllm import push as vllm_push
from whet.generate.vllm import transports
from whet.generate.vllm.engine import VLLMGenerator
from whet.methods.options import LoRA, Sampling
from whet.models.lora import attach
from whet.models.roles import Role
from whet.planning import traffic
from whet.planning.memory import Layout
from whet.planning.shape import Shape

pytest.importorskip("vllm")
pytestmark = [
    # vLLM walks over every name of torch.distributed when its worker is imported
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
]
BOUND = 1e-4
SEEDS = (0, 1)
ONE = Layout(backend="local", workers=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Two models of each kind."""
    root = tmp_path_factory.mktemp("models")
    return {(kind, seed): e.folder(root / f"{kind}{seed}", kind, seed) for kind in ("qwen3", "llama") for seed in SEEDS}


@pytest.fixture(scope="module")
def fresh(folders: dict) -> dict[str, list[tuple]]:
    """What engines say that were started on the second model of each kind."""
    out = {}
    for kind in ("qwen3", "llama"):
        engine = VLLMGenerator(folders[kind, 1], e.END, e.text, **e.options(separate=False))
        out[kind] = e.plain(list(engine.generate(e.asked())))
        engine.close()
    return out


@pytest.fixture(scope="module")
def tied(folders: dict, fresh: dict) -> Iterator[VLLMGenerator]:
    """An engine in this process, on the first model with tied embeddings."""
    engine = VLLMGenerator(folders["qwen3", 0], e.END, e.text, **e.options(separate=False, sleep=True))
    engine.role = e.role("qwen3", 0)  # type: ignore[attr-defined]  (what the contract adopts)
    yield engine
    engine.close()


@pytest.fixture
def generator(tied: VLLMGenerator) -> VLLMGenerator:
    """The same engine, back at its first weights."""
    tied.inlet.transport.chunk = vllm_push.CHUNK
    if tied.version or tied.inlet.incomplete:
        tied.load_weights(Weights(0, tied.role))
    return tied


class TestContract(Contract):
    """It keeps the generators' contract."""


def test_scores_are_those_of_transformers_over_several_cache_blocks(generator: Any) -> None:
    gap = e.score_gap(generator, generator.role.model)
    print(f"\nscore gap to transformers {gap:.1e}")
    assert gap < BOUND


@pytest.mark.parametrize(
    "sampling",
    [Sampling(6), Sampling(6, 0.7), Sampling(6, top_k=5), Sampling(6, 1.3, top_p=0.8), Sampling(6, min_p=0.1)],
)
def test_log_probs_are_of_the_distribution_that_was_sampled_from(generator: Any, sampling: Sampling) -> None:
    asked = e.asked(sampling)
    gap = e.sampling_gap(list(generator.generate(asked)), asked, generator.role.model)
    print(f"\nsampling gap to transformers {gap:.1e}")
    assert gap < BOUND


class Fewer:
    """A tokenizer of the ids 0 to 19 without 7."""

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(20) if number != 7}


def test_ids_without_a_token_have_probability_0_before_and_after_a_push(generator: Any) -> None:
    """Sampled and scored as softmax over the ids that have one says, by transformers."""
    known = [number for number in range(20) if number != 7]
    role, prompts = e.role("qwen3", 1), [h.prompt(0, (2, 3, 4)), h.prompt(1, (9, 8, 11, 12, 4))]
    asked = [
        Request(prompt, draw, answer, Sampling(12), 7) for draw, prompt in enumerate(prompts) for answer in range(6)
    ]
    generator._close(Fewer())
    try:
        for own in (generator.role, role):
            if own is role:
                generator.load_weights(Weights(1, own))
            for sample in generator.generate(asked):
                prompt = prompts[sample.draw].ids
                assert set(sample.ids) <= set(known)
                logits = h.full_logits(own.model, torch.tensor(prompt + sample.ids))
                logp = logits - logits[:, known].logsumexp(-1, keepdim=True)
                expected = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(sample.sampler_logp), expected, rtol=BOUND, atol=BOUND)
            ids = torch.tensor(known * 2)
            logits = h.full_logits(own.model, ids)[:-1]
            scored = logits.gather(1, ids[1:, None])[:, 0] - logits[:, known].logsumexp(-1)
            torch.testing.assert_close(generator.logprobs([ids])[0], scored, rtol=BOUND, atol=BOUND)
    finally:
        generator._close(None)
    assert {token for sample in generator.generate(asked) for token in sample.ids} - set(known)


def test_greedy_takes_the_most_probable_token_and_is_certain(generator: Any) -> None:
    for sample, request in zip(generator.generate(e.asked(Sampling(4, 0.0))), e.asked(), strict=True):
        logits = h.full_logits(generator.role.model, torch.tensor(request.prompt.ids + sample.ids))
        assert list(sample.ids) == logits[len(request.prompt.ids) - 1 : -1].argmax(-1).tolist()
        assert set(sample.sampler_logp) == {0.0}


def test_an_answer_in_segments_goes_on_behind_what_there_is(generator: Any) -> None:
    asked = [replace(request, most=2) for request in e.asked()]
    first = list(generator.generate(asked))
    assert {sample.finish for sample in first} == {"paused", "stop"}
    paused = [(s, r) for s, r in zip(first, asked, strict=True) if s.finish == "paused"]
    again = [replace(request, begun=sample.ids, most=0) for sample, request in paused]
    second = list(generator.generate(again))
    assert max(len(sample.ids) for sample in second) == 4
    assert e.sampling_gap(second, again, generator.role.model) < BOUND
    for (one, _), two in zip(paused, second, strict=True):
        assert two.text == e.text(one.ids + two.ids)
        assert two.finish in ("stop", "length")


def test_what_does_not_fit_is_refused_instead_of_cut(generator: Any) -> None:
    long = h.prompt(0, (7,) * (e.LENGTH - 5))
    request = replace(e.asked()[0], prompt=long)
    assert len(list(generator.generate([replace(request, sampling=Sampling(5))]))) == 1
    with pytest.raises(RecipeError, match="max_model_len: 395 tokens and 6 new ones"):
        list(generator.generate([request]))
    with pytest.raises(RecipeError, match="max_model_len"):
        generator.logprobs([torch.full((e.LENGTH,), 7)])


def test_a_token_that_the_model_does_not_know_is_refused_and_the_engine_lives(generator: Any) -> None:
    bad = replace(e.asked()[0], prompt=h.prompt(0, (2, 300)))
    with pytest.raises(RecipeError, match="outside the model's 27"):
        list(generator.generate([*e.asked(), bad]))
    assert len(list(generator.generate(e.asked()))) == len(e.asked())


@pytest.mark.parametrize("chunk", [vllm_push.CHUNK, 1 << 13, 1])
@pytest.mark.parametrize("source", ["role", "folder"])
def test_new_weights_answer_exactly_like_an_engine_started_on_them(
    generator: Any, fresh: dict, folders: dict, source: str, chunk: int
) -> None:
    generator.inlet.transport.chunk = chunk
    before = e.plain(list(generator.generate(e.asked())))
    role = e.role("qwen3", 1)
    generator.load_weights(Weights(1, role if source == "role" else folders["qwen3", 1]))
    after = list(generator.generate(e.asked()))
    assert e.plain(after) == fresh["qwen3"] != before
    assert {sample.version for sample in after} == {1}
    gap = e.score_gap(generator, role.model)
    print(f"\nscore gap after a push {gap:.1e}")
    assert gap < BOUND
    assert not list(generator._folder.iterdir())


@pytest.mark.parametrize("change", [e.missing, e.unknown, e.twice, e.reshaped, e.stops(3)])
def test_wrong_weights_that_fit_one_chunk_change_nothing(generator: Any, change: Any) -> None:
    before = e.plain(list(generator.generate(e.asked())))
    with pytest.raises((ModelError, WorkerDied)) as caught:
        generator.load_weights(Weights(4, e.Handle(e.role("qwen3", 1), change)))
    assert "up_proj" in str(caught.value) or "disk is gone" in str(caught.value)
    assert generator.version == 0
    assert e.plain(list(generator.generate(e.asked()))) == before


@pytest.mark.parametrize("change", [e.missing, e.unknown, e.twice, e.reshaped, *map(e.stops, range(2, 24, 2))])
def test_after_a_half_failed_push_nothing_is_generated_until_a_whole_one(
    generator: Any, fresh: dict, change: Any
) -> None:
    generator.inlet.transport.chunk = 1
    role = e.role("qwen3", 1)
    with pytest.raises((ModelError, WorkerDied)):
        generator.load_weights(Weights(4, e.Handle(e.role("qwen3", 2), change)))
    with pytest.raises(WorkerDied, match="weights 4 failed half-way"):
        list(generator.generate(e.asked()))
    with pytest.raises(WorkerDied, match="push whole weights first"):
        generator.logprobs([torch.tensor([2, 3])])
    generator.load_weights(Weights(5, role))
    assert e.plain(list(generator.generate(e.asked()))) == fresh["qwen3"]


def test_files_in_shared_memory_are_loaded_without_a_copy(generator: Any, fresh: dict, monkeypatch: Any) -> None:
    writer = WeightWriter(Workers(), secrets.token_hex(8), adapter=False, everywhere=True)
    folder = writer(e.role("qwen3", 1))
    sent: list[tuple[str, int]] = []
    update = generator.update_weights

    def counted(info: dict[str, Any]) -> None:
        file = generator._folder / info["file"]
        sent.append((info["file"], file.stat().st_nlink))
        update(info)

    monkeypatch.setattr(transports, "save_file", None)
    monkeypatch.setattr(generator, "update_weights", counted)
    generator.load_weights(Weights(1, folder))
    assert [links for _, links in sent] == [2]  # a second name of the file that the learner wrote
    assert e.plain(list(generator.generate(e.asked()))) == fresh["qwen3"]
    assert not list(generator._folder.iterdir())
    said = traffic.push(Shape.of(e.role("qwen3", 1).model.config.to_dict()), ONE, traffic.Network(), engines=1)
    written = sum(one.stat().st_size for one in folder.iterdir())
    assert written == pytest.approx(said.received, rel=0.03)  # and a header
    writer.close()


def test_the_bytes_of_a_push_from_memory_are_those_of_the_plan(generator: Any, monkeypatch: Any) -> None:
    generator.inlet.transport.chunk = 1 << 16
    sizes: list[int] = []
    update = generator.update_weights

    def counted(info: dict[str, Any]) -> None:
        files = list(generator._folder.iterdir())
        assert [file.name for file in files] == [info["file"]]  # one chunk is held at a time
        sizes.append(files[0].stat().st_size)
        update(info)

    monkeypatch.setattr(generator, "update_weights", counted)
    generator.load_weights(Weights(1, e.role("qwen3", 1)))
    said = traffic.push(Shape.of(generator.role.model.config.to_dict()), ONE, traffic.Network(), engines=1, direct=True)
    assert len(sizes) > 1
    assert sum(sizes) == pytest.approx(said.received, rel=0.05)


def test_files_of_another_model_change_nothing(generator: Any, folders: dict) -> None:
    before = e.plain(list(generator.generate(e.asked())))
    with (
        unpacked(contents(folders["llama", 0])) as folder,
        pytest.raises(ModelError, match="tensors of the engine's model are missing"),
    ):
        generator.load_weights(Weights(1, folder))
    assert e.plain(list(generator.generate(e.asked()))) == before


def test_the_benchmark_of_pushes_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushes, "SIZES", {"tiny": (64, 1)})
    seconds = pushes.timed("tiny", 1)
    assert {way: len(each) for way, each in seconds.items()} == {"twice": 1, "memory": 1, "files": 1}


def test_a_corrupt_file_is_not_loaded(generator: Any, fresh: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(transports, "save_file", lambda tensors, path: Path(path).write_bytes(b"\x10" + b"\0" * 99))
        with pytest.raises(WorkerDied, match="weights 4 did not go in"):
            generator.load_weights(Weights(4, e.role("qwen3", 1)))
    with pytest.raises(WorkerDied, match="half-way"):
        list(generator.generate(e.asked()))
    generator.load_weights(Weights(5, e.role("qwen3", 1)))
    assert e.plain(list(generator.generate(e.asked()))) == fresh["qwen3"]


def test_files_outside_its_folder_are_refused(generator: Any, folders: dict) -> None:
    generator.start_weight_update()
    with pytest.raises(ValueError, match="not a file of the weight folder"):
        generator.update_weights({"file": str(folders["qwen3", 1] / "model.safetensors")})
    generator.call("whet_discard_update")
    generator.start_weight_update()
    with pytest.raises(ValueError, match="not a file of the weight folder"):
        generator.update_weights({"file": "../model.safetensors"})
    generator.load_weights(Weights(0, generator.role))


def test_the_engine_must_say_the_pushed_version(generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(generator, "weight_version", lambda: "9")
        with pytest.raises(RunStopped, match=r"weights 4 were pushed.*'9'"):
            generator.load_weights(Weights(4, generator.role))
    with pytest.raises(WorkerDied):
        list(generator.generate(e.asked()))
    generator.load_weights(Weights(4, generator.role))
    generator._llm.update_weight_version("3")
    with pytest.raises(RunStopped, match="asked for an answer of weights 4, got one of"):
        list(generator.generate(e.asked()))


def test_a_sleeping_engine_wakes_by_itself(generator: Any) -> None:
    before = e.plain(list(generator.generate(e.asked())))
    generator.sleep()
    generator.sleep()
    assert e.plain(list(generator.generate(e.asked()))) == before
    generator.sleep()
    generator.load_weights(Weights(0, generator.role))
    assert e.score_gap(generator, generator.role.model) < BOUND
    generator.sleep()
    generator.wake()


def test_an_interrupted_batch_is_never_mixed_into_the_next(tied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one on this engine, which is closed here."""

    def interrupt(*_given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tied._llm.llm_engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(tied.generate(e.asked()))
    with pytest.raises(WorkerDied, match="middle of a batch"):
        list(tied.generate(e.asked()))
    with pytest.raises(WorkerDied, match="middle of a batch"):
        tied.load_weights(Weights(1, tied.role))
    tied.close()
    with pytest.raises(WorkerDied, match="closed"):
        list(tied.generate(e.asked()))
    assert not tied._folder.exists()


def test_adapters_answer_like_the_merged_model(folders: dict, tmp_path: Path) -> None:
    engine = VLLMGenerator(folders["qwen3", 0], e.END, e.text, **e.options(separate=False, lora=True, lora_rank=8))
    try:
        base = e.plain(list(engine.generate(e.asked())))
        said = []
        for version in (1, 2):
            role = adapters(version)
            role.export(tmp_path / f"merged{version}")
            merged = merged_model(tmp_path / f"merged{version}")
            if version == 1:
                engine.load_weights(Weights(version, role))
            else:
                role.export(tmp_path / "adapter", merge=False)
                engine.load_weights(Weights(version, tmp_path / "adapter"))
            samples = list(engine.generate(e.asked()))
            gaps = e.score_gap(engine, merged), e.sampling_gap(samples, e.asked(), merged)
            print(f"\nadapter {version}: gaps {gaps[0]:.1e} {gaps[1]:.1e}")
            assert max(gaps) < BOUND
            assert {sample.version for sample in samples} == {version}
            said.append(e.plain(samples))
        assert said[0] != said[1] != base != said[0]
        with pytest.raises(ModelError, match="takes adapters"):
            engine.load_weights(Weights(3, folders["qwen3", 1]))
        assert e.plain(list(engine.generate(e.asked()))) == said[1]
        with pytest.raises(WorkerDied, match="weights 4 did not go in"):
            engine.load_weights(Weights(4, adapters(4, rank=32)))
        with pytest.raises(WorkerDied, match="weights 4 did not go in"):
            list(engine.generate(e.asked()))
        engine.load_weights(Weights(5, tmp_path / "adapter"))
        assert e.plain(list(engine.generate(e.asked()))) == said[1]
    finally:
        engine.close()


def adapters(seed: int, rank: int = 4) -> Role:
    """A policy that is an adapter on the first tied model."""
    model = tiny.causal_lm("qwen3", seed=0, **e.SHAPE)
    role = Role("policy", model, True, wrapped=attach(model, LoRA(rank, 8), ("policy",), seed=seed), adapter="policy")
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in role.parameters().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return role


def merged_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_an_engine_in_processes_of_its_own(folders: dict, fresh: dict) -> None:
    """Untied embeddings, weights over gloo, a failed push, then its death and its successor with a file in memory."""
    engine = VLLMGenerator(folders["llama", 0], e.END, e.text, **e.options(transfer="gloo"))
    try:
        assert engine.processes()
        before = e.plain(list(engine.generate(e.asked())))
        role = e.role("llama", 1)
        engine.load_weights(Weights(1, role))
        assert e.plain(list(engine.generate(e.asked()))) == fresh["llama"] != before
        gap = e.score_gap(engine, role.model)
        print(f"\nuntied, gloo: gap after a push {gap:.1e}")
        assert gap < BOUND

        engine.inlet.transport.chunk = 1 << 13
        with pytest.raises(WorkerDied, match="disk is gone"):
            engine.load_weights(Weights(2, e.Handle(e.role("llama", 2), e.stops(9))))
        with pytest.raises(WorkerDied, match="half-way"):
            list(engine.generate(e.asked()))
        engine.load_weights(Weights(3, role))
        assert e.plain(list(engine.generate(e.asked()))) == fresh["llama"]

        victims = engine.processes()
        os.kill(victims[0], signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(WorkerDied, match="died"):
            list(engine.generate(e.asked()))
        with pytest.raises(WorkerDied, match="died"):
            engine.load_weights(Weights(4, role))
        with pytest.raises(WorkerDied, match="died"):
            engine.logprobs([torch.tensor([2, 3])])
        print(f"death noticed in {time.monotonic() - start:.1f} s")
        assert time.monotonic() - start < 10
        engine.close()
        assert not engine.processes()
        assert not any(map(e.runs, victims))

        engine = VLLMGenerator(folders["llama", 0], e.END, e.text, **e.options(transfer="shared"))
        engine.load_weights(Weights(5, role))
        assert e.plain(list(engine.generate(e.asked()))) == fresh["llama"]
        victims = engine.processes()
        os.kill(victims[-1], signal.SIGKILL)
        with pytest.raises(WorkerDied, match="died"):
            engine.load_weights(Weights(6, role))
    finally:
        engine.close()
    assert not engine.processes()
    assert not any(map(e.runs, victims))


OWNER = """
import sys
from engines import helpers as e
from whet.generate.vllm.engine import VLLMGenerator

if __name__ == "__main__":
    engine = VLLMGenerator(sys.argv[1], e.END, e.text, **e.options())
    print("processes", *engine.processes(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.long
def test_an_engine_whose_owner_was_killed_ends(folders: dict, tmp_path: Path) -> None:
    (tmp_path / "owner.py").write_text(OWNER)
    command = [sys.executable, str(tmp_path / "owner.py"), str(folders["qwen3", 0])]
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as owner:
        assert owner.stdout is not None
        said = next(line for line in owner.stdout if line.startswith("processes"))
        pids = [int(word) for word in said.split()[1:]]
        assert pids
        assert all(map(e.runs, pids))
        owner.kill()
    until = time.monotonic() + 20
    while any(map(e.runs, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(e.runs, pids))


def test_code_of_a_model_runs_in_an_engine_that_trusts_it_and_in_no_other(tmp_path: Path) -> None:
    folder, mark = e.folder(tmp_path / "own", "qwen3", 0), tmp_path / "it-ran"
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\nfrom transformers import Qwen3Config\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
    )
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="vLLM cannot start"):
        VLLMGenerator(folder, e.END, e.text, **e.options(separate=False))
    assert not mark.exists()
    engine = VLLMGenerator(folder, e.END, e.text, **e.options(separate=False, trust_remote_code=True))
    try:
        assert mark.exists()
        assert len(list(engine.generate(e.asked()))) == len(e.asked())
    finally:
        engine.close()


def test_what_cannot_work_is_said_at_once(folders: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("whet.extras.installed", lambda name: False)
        with pytest.raises(RecipeError, match=r'generator.name: vllm needs .* not installed; pip install "vllm>='):
            VLLMGenerator(tmp_path, e.END, e.text, **e.options())
    with pytest.raises(ModelError, match="vLLM cannot start"):
        VLLMGenerator(tmp_path, e.END, e.text, **e.options(separate=False))
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(RecipeError, match=r"generator\.separate"):
            VLLMGenerator(folders["qwen3", 0], e.END, e.text, **e.options(separate=False))
