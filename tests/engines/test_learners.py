"""Learners on several processes keep the contract of the one-process learner, number by number."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h

from engines import jobs
from engines.comparing import Failed, gap, metrics, rollouts
from engines.jobs import CASES, OFFLINE, ONLINE, SHORT, TORCH, ZERO, cases, cases_and_runs, runs, saved_by
from engines.together import together
from whet.distributed import Workers
from whet.learner.local import LocalLearner

TOLERANCE = 1e-5
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed")


def marked(*given: str, case: str = "", short: bool = True) -> Any:
    """A test's engines (and more), with the marks of these and of the case."""
    marks = [needs_deepspeed] if any(one in ZERO for one in given) else []
    shown = short and (not case or case in SHORT[given[0]])
    return pytest.param(*given, marks=marks if shown else [*marks, pytest.mark.long])


def those_of(case: str, engines: Sequence[str] = (*TORCH, *ZERO)) -> list[Any]:
    """The engines that run a case."""
    return [marked(engine, case=case) for engine in engines if case in CASES[engine]]


SHARDED = ("fsdp", "zero2", "zero3")


OWN = {"training_half", "half_beside_its_reference", "exact_kl_column", "muon", "other_weights", "refusing", "trunk"}
"""Cases whose numbers are not those of one process in float32, or that refuse."""
FIRST = {"ddp": ["local", "ddp", "fsdp"], "fsdp": ["local", "ddp", "fsdp"]}
SECOND = {
    "zero1": ["fsdp", "zero1", "zero3"],
    "zero2": ["local", "ddp", "fsdp", "zero1", "zero2"],
    "zero3": ["fsdp", "zero2", "zero3"],
}
SHORTER = {"zero1": ["zero1"], "zero2": ["local", "zero2"], "zero3": ["fsdp", "zero3"]}
"""What of it a short run does."""
THREE = {"ddp": ["zero3", "fsdp"], "fsdp": ["zero2", "ddp"], "zero2": ["fsdp"], "zero3": ["ddp"]}
"""Which engine goes on from whose checkpoint: on two processes, and on three."""


class Ran:
    """What came out of the launches, each started when it is first asked for; in short runs of fewer cases."""

    def __init__(self, folder: Path, long: bool) -> None:
        self.folder, self.long = folder, long
        self._made: dict[str, Any] = {}

    @property
    def cases(self) -> Path:
        return self.folder / "cases"

    def of(self, engine: str) -> dict[str, Any]:
        if engine == "local":
            return self.alone()
        return (self.torch if engine in TORCH else self.zero)()[engine]

    def _once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives; where it failed once it fails again at once."""
        if name not in self._made:
            try:
                self._made[name] = make()
            except Exception as error:
                self._made[name] = error
        made = self._made[name]
        if isinstance(made, Exception):
            raise AssertionError(str(made)) from None
        return made

    def alone(self) -> dict[str, Any]:
        return self._once("alone", lambda: cases(Workers(), ["local"], self.cases)["local"])

    def torch(self) -> dict[str, Any]:
        return self._once("torch", lambda: self._launch(2, TORCH, FIRST))

    def zero(self) -> dict[str, Any]:
        return self._once("zero", lambda: self._launch(2, ZERO, SECOND if self.long else SHORTER))

    def three(self) -> dict[str, Any]:
        return self._once("three", self._launch_three)

    def few(self) -> dict[str, Any]:
        """Short runs with fewer rows than three workers, in one process."""
        return self._once("few", lambda: runs(Workers(), ["local"], self.folder / "few", True)["local"])

    def _launch(self, size: int, engines: tuple[str, ...], sources: dict[str, list[str]]) -> dict[str, Any]:
        self.alone()
        if "zero1" in engines:
            self.torch()
        name = f"{size}-{'-'.join(engines)}"
        first, *others = together(
            size, self.folder / name, cases, engines, self.cases, sources, None if self.long else SHORT
        )
        for engine in first:
            for case in first[engine].keys() - {"seconds"}:
                for other in others:
                    assert gap(other[engine][case], first[engine][case])[0] == 0, f"workers differ: {engine}/{case}"
        return first

    def _launch_three(self) -> dict[str, Any]:
        self.torch()
        sources = {engine: [source for source in THREE[engine] if source in TORCH] for engine in TORCH}
        if DEEPSPEED:
            self.zero()
            sources = THREE
        return together(3, self.folder / "three", cases_and_runs, self.cases, sources, self.folder / "few")[0]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Ran:
    return Ran(tmp_path_factory.mktemp("learners"), pytestconfig.getoption("--long"))


@pytest.fixture
def of(ran: Ran) -> Callable[[str, str], Any]:
    def found(engine: str, case: str) -> Any:
        out = ran.of(engine)[case]
        assert not isinstance(out, Failed), str(out)[-3000:]
        return out

    return found


def close(got: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    worst, where = gap(got, expected)
    assert worst <= tolerance, f"{where}: {worst:.3g}"


def same(got: Any, expected: Any) -> None:
    assert gap(got, expected)[0] == 0, gap(got, expected)


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "case"),
    [marked(engine, case, case=case) for engine in (*TORCH, *ZERO) for case in CASES[engine] if case not in OWN],
)
def test_the_numbers_are_those_of_one_process(of: Any, engine: str, case: str) -> None:
    got, expected = of(engine, case), of("local", case)
    other = {"files", "message"} if case in ("saving", "endless_gradient") else expected.keys() - got.keys()
    close(*({name: value for name, value in one.items() if name not in other} for one in (got, expected)))


@pytest.mark.parametrize("engine", those_of("evaluating"))
def test_evaluating_moves_nothing_and_drops_nothing_out(of: Any, engine: str) -> None:
    got = of(engine, "evaluating")
    h.equal_weights(got["before"], got["after"])
    same(got["told"], got["again"])
    assert got["version"] == 0
    assert not got["told"]["norm"]


@pytest.mark.parametrize("engine", those_of("rows_in_order"))
def test_what_was_read_comes_back_in_the_order_of_the_rows_to_the_bit(of: Any, engine: str) -> None:
    got = of(engine, "rows_in_order")
    for name in ("given", "turned"):
        assert torch.equal(got[name]["measured"], got[name]["read"])
    assert torch.equal(got["updated"], got["given"]["measured"])
    assert not got["gradient"]


@pytest.mark.parametrize("engine", those_of("clipping"))
@pytest.mark.parametrize(("clipped", "free"), [("policy", "critic"), ("critic", "policy")])
def test_each_roles_gradient_is_clipped_to_its_own_limit(of: Any, engine: str, clipped: str, free: str) -> None:
    """AdamW's first step is g / (|g| + 1) here: it is as long as a small gradient, and never longer."""
    got = of(engine, "clipping")[clipped]
    assert got["told"]["norm"][clipped] > 1
    assert got["moved"][clipped] == pytest.approx(0.01, rel=0.01)
    assert 0.3 < got["moved"][free] < got["told"]["norm"][free]
    assert got["moved"]["reference"] == 0


@pytest.mark.parametrize("engine", those_of("scheduling"))
def test_the_learning_rate_follows_its_schedule(of: Any, engine: str) -> None:
    assert of(engine, "scheduling")["lr"] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.006])


@pytest.mark.parametrize("engine", those_of("one_role_of_two"))
def test_a_role_that_is_not_in_the_work_stays_as_it_is(of: Any, engine: str) -> None:
    got = of(engine, "one_role_of_two")
    for role in ("critic", "reference"):
        h.equal_weights({role: got["before"][role]}, {role: got["after"][role]})
    assert gap(got["before"]["policy"], got["after"]["policy"])[0] > 1e-3


@pytest.mark.parametrize("engine", those_of("not_a_number"))
def test_a_loss_that_is_no_number_on_one_worker_stops_all_before_any_weight_moves(of: Any, engine: str) -> None:
    got = of(engine, "not_a_number")
    assert got["message"] == "update 1: the loss of policy/train/reinforce is nan; this update changed no weight"
    assert got["version"] == 1
    h.equal_weights(got["before"], got["after"])


@pytest.mark.parametrize("engine", those_of("endless_gradient"))
def test_a_gradient_that_is_no_number_moves_no_role_at_all(of: Any, engine: str) -> None:
    got = of(engine, "endless_gradient")
    assert got["message"].startswith("update 1: the gradient norm of critic is ")
    assert got["version"] == 1
    h.equal_weights(got["before"], got["after"])


@pytest.mark.parametrize("engine", those_of("blending"))
def test_a_blend_mixes_by_hand_and_is_saved(of: Any, engine: str) -> None:
    got = of(engine, "blending")
    for key, value in got["mixed"]["ema"].items():
        expected = 0.75 * got["before"]["ema"][key] + 0.25 * got["before"]["policy"][key]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    h.equal_weights({"x": got["copied"]["reference"]}, {"x": got["before"]["policy"]})
    h.equal_weights(got["weights"], got["loaded"])
    same(*got["on"])


@pytest.mark.parametrize("engine", those_of("rescaling"))
def test_rescaled_scores_are_scaled_and_shifted(of: Any, engine: str) -> None:
    got = of(engine, "rescaling")
    torch.testing.assert_close(got["after"], 0.5 * (got["before"] - 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", those_of("publishing"))
def test_what_is_published_is_the_policy_whole(of: Any, engine: str) -> None:
    got = of(engine, "publishing")
    assert got["version"] == 1
    h.equal_weights({"x": got["pushed"]}, {"x": got["whole"]})


@pytest.mark.parametrize("engine", those_of("exact_kl_column"))
def test_the_exact_kl_is_right_or_refused_in_words(of: Any, engine: str) -> None:
    got = of(engine, "exact_kl_column")
    if "refused" in got:
        assert "exact" in got["refused"]
    else:
        close(got, of("local", "exact_kl_column"))


@pytest.mark.parametrize("engine", those_of("muon", SHARDED))
def test_muon_is_refused_by_name_where_matrices_are_cut(of: Any, engine: str) -> None:
    assert of(engine, "muon")["refused"].startswith("optim.kind: muon needs whole matrices")


def test_muon_on_replicas_gives_the_numbers_of_one_process(of: Any) -> None:
    """Muon orthogonalises in bfloat16, where one rounding is 4e-3."""
    got, expected = of("ddp", "muon"), of("local", "muon")
    close(got["steps"][0], expected["steps"][0])
    close(got, expected, 4e-3)


@pytest.mark.parametrize("engine", those_of("trunk"))
def test_two_trained_roles_on_one_trunk_are_refused_by_name(of: Any, engine: str) -> None:
    assert of(engine, "trunk")["refused"].startswith("trunk: DeepSpeed trains one role per model")


@pytest.mark.parametrize("engine", those_of("other_weights"))
def test_workers_that_loaded_other_weights_are_refused(of: Any, engine: str) -> None:
    assert "different weights for the policy" in of(engine, "other_weights")["refused"]


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", those_of("training_half", ("ddp", *SHARDED)))
def test_computing_in_bfloat16_gives_nearly_the_losses_of_float32(of: Any, engine: str) -> None:
    (_, got, *_), (_, expected, *_) = (of(one, "training_half")["steps"] for one in (engine, "local"))
    for loss in ("policy/train/nll", "critic/rollout/value_loss"):
        assert got["losses"][loss] == pytest.approx(expected["losses"][loss], rel=2e-2)
    assert got["losses"]["policy/train/nll"] != pytest.approx(expected["losses"]["policy/train/nll"], rel=1e-5)
    for role in ("policy", "critic"):
        assert got["norm"][role] == pytest.approx(expected["norm"][role], rel=5e-2)


@pytest.mark.parametrize("engine", those_of("training_half", ("ddp", *SHARDED)))
def test_half_precision_is_saved_and_loaded_to_the_bit(of: Any, engine: str) -> None:
    got = of(engine, "training_half")
    h.equal_weights(got["weights"], got["loaded"])
    same(*got["on"])
    trained = [p for role in ("policy", "critic") for p in got["weights"][role].values()]
    assert {p.dtype for p in trained} == {torch.float32}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in trained)  # the masters, not what is computed with


@pytest.mark.parametrize("engine", those_of("half_beside_its_reference"))
def test_equal_policy_and_reference_agree_to_the_bit_in_half_precision_too(of: Any, engine: str) -> None:
    got = of(engine, "half_beside_its_reference")
    assert torch.equal(got["old"], got["ref"])


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", those_of("saving"))
def test_a_checkpoint_is_safetensors_and_json_in_one_part_per_worker(of: Any, engine: str) -> None:
    parts = [
        f"{name}-0000{n}-of-00002.safetensors" for name in ("critic", "critic.optimizer", "policy") for n in (1, 2)
    ]
    parts += [f"policy.optimizer-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert of(engine, "saving")["files"] == sorted([*parts, "learner.json"])


@pytest.mark.parametrize("engine", those_of("saving"))
def test_going_on_from_a_checkpoint_on_as_many_workers_gives_the_same_bits(of: Any, engine: str) -> None:
    got, whole = of(engine, "from")[engine], of(engine, "saving")
    assert not isinstance(got, Failed), got
    same(got, {key: whole[key] for key in got})


@pytest.mark.parametrize(
    ("engine", "source"),
    [
        marked(engine, source, short=source in (FIRST | SHORTER)[engine])
        for engine, sources in (FIRST | SECOND).items()
        for source in sources
        if source != engine
    ],
)
def test_another_engines_checkpoint_continues_as_the_uninterrupted_run(of: Any, engine: str, source: str) -> None:
    got, whole = of(engine, "from")[source], of("local", "saving")
    assert not isinstance(got, Failed), got
    close(got, {key: whole[key] for key in got})


@pytest.mark.parametrize("source", those_of("saving"))
def test_one_process_continues_what_two_began(ran: Ran, of: Any, source: str) -> None:
    of(source, "saving")
    whole = of("local", "saving")
    got = jobs.resuming(jobs.Make("local", Workers()), saved_by(ran.cases, source))
    close(got, {key: whole[key] for key in got})


@pytest.mark.parametrize(
    ("engine", "source"),
    [marked(engine, source, short=False) for engine, sources in THREE.items() for source in sources],
)
def test_three_workers_continue_what_two_began(ran: Ran, of: Any, engine: str, source: str) -> None:
    got, whole = ran.three()["cases"][engine]["from"][source], of("local", "saving")
    assert not isinstance(got, Failed), got
    close(got, {key: whole[key] for key in got})


@pytest.mark.parametrize("engine", those_of("refusing"))
def test_checkpoints_of_another_run_are_refused_and_leave_the_weights_alone(of: Any, engine: str) -> None:
    got = of(engine, "refusing")
    assert "the parameters of the policy differ from those of this run" in got["model"]
    assert "the parameters of the policy differ from those of this run" in got["shapes"]
    assert "the frozen weights of the reference differ from those" in got["reference"]
    assert "its optimizers are" in got["muon"]
    assert "Muon" in got["muon"]
    h.equal_weights(got["before"], got["after"])


@pytest.mark.parametrize("engine", those_of("refusing"))
def test_a_missing_part_is_refused_and_leaves_the_weights_alone(of: Any, engine: str) -> None:
    got = of(engine, "refusing")
    assert "the files of policy are not all there" in got["missing"]
    h.equal_weights(got["before"], got["after"])


# --- more workers than rows -------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("engine", TORCH)
@pytest.mark.parametrize("method", [*OFFLINE, *ONLINE])
def test_three_workers_with_fewer_rows_than_workers_run_as_one_process(ran: Ran, engine: str, method: str) -> None:
    for told in (ran.three()["runs"][engine][method], ran.few()[method]):
        assert not isinstance(told, Failed), told
    got, expected = (ran.folder / "few" / one / method for one in (engine, "local"))
    assert metrics(expected)
    worst, where = gap(metrics(got), metrics(expected))
    assert worst <= TOLERANCE, f"{where}: {worst:.3g}"
    assert [one["completion_ids"] for one in rollouts(got)] == [one["completion_ids"] for one in rollouts(expected)]


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        *((engine, kind) for engine in TORCH for kind in ("qwen3", "llama", "gpt2", "gemma2")),
        *(marked(engine, kind) for engine in ZERO[1:] for kind in ("qwen3", "llama")),
    ],
)
def test_an_exported_folder_is_read_by_transformers_to_the_bit(ran: Ran, of: Any, engine: str, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    saved = of(engine, "exporting")
    folder = ran.cases / engine / "exporting" / "export"
    readers = {"policy": (AutoModelForCausalLM, kind), "critic": (AutoModelForSequenceClassification, f"{kind}-critic")}
    for role, (reader, name) in readers.items():
        model = reader.from_pretrained(folder / name)
        got = {key: p.detach() for key, p in model.named_parameters()}
        h.equal_weights({role: got}, {role: saved[kind][role]})


@pytest.mark.parametrize("engine", those_of("exporting"))
def test_an_exported_adapter_is_read_by_peft_and_merged_by_transformers(ran: Ran, of: Any, engine: str) -> None:
    import tiny
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from whet.models.roles import Role

    saved, folder = of(engine, "exporting")["adapter"], ran.cases / engine / "exporting" / "export"
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    beside = PeftModel.from_pretrained(tiny.causal_lm(), str(folder / "adapter"))
    own = {key.replace(".default.", ".policy."): p.detach() for key, p in beside.named_parameters() if "lora_" in key}
    own = {key.removeprefix("base_model.model."): value for key, value in own.items()}
    h.equal_weights({"policy": own}, {"policy": saved["policy"]})
    for model in (merged, beside.merge_and_unload()):
        learner = LocalLearner({"policy": Role("policy", model, False)}, {}, total=1)
        got = learner.columns("policy", jobs.batch(), frozenset({"logp"}))["logp"]
        torch.testing.assert_close(got, saved["logp"]["logp"], rtol=1e-5, atol=1e-5)
