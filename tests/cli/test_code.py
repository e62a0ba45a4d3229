"""Code in models and files: it runs with model.trust_remote_code alone, and nothing that is read is unpickled."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import servers
import tiny
import torch
from transformers import AutoModelForSequenceClassification

import whet
from whet.data.files import sha256, write_json
from whet.errors import CheckpointError, ModelError, RecipeError
from whet.generate.base import GeneratorContext
from whet.models import load
from whet.models.code import refuse_code
from whet.runs import recipe as fields

from .helpers import one_message
from .helpers import whet as command

MARK = "it-ran"
"""A file that each hostile file would make in the working folder."""
OWN = f"""
from pathlib import Path
Path({MARK!r}).touch()
from transformers import AutoModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification, Qwen3Model
class OwnConfig(Qwen3Config):
    model_type = "own"
class OwnLM(Qwen3ForCausalLM):
    config_class = OwnConfig
class OwnScorer(Qwen3ForSequenceClassification):
    config_class = OwnConfig
class OwnModel(Qwen3Model):
    config_class = OwnConfig
AutoModel.register(OwnConfig, OwnModel)
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {
    "AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLM", "AutoModelForSequenceClassification": "own.OwnScorer",
}  # fmt: skip


class Bomb:
    """Unpickled, it makes the file MARK."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(MARK),)


def changed(path: Path, **fields_of: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields_of))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models with code or pickles in them, and data; it is the working folder meanwhile."""
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    os.chdir(home)
    plain = tiny.folder(Path("m"))
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_pretrained(plain, num_labels=1).save_pretrained("rm")
    tiny.tokenizer().save_pretrained("rm")
    for name, base in (
        ("own", "m"),
        ("own_rm", "rm"),
        ("known", "m"),
        ("kernel", "m"),
        ("nested", "m"),
        ("own_words", "m"),
    ):
        shutil.copytree(base, name)
        Path(name, "own.py").write_text(OWN)
    for name in ("own", "own_rm"):
        changed(Path(name, "config.json"), model_type="own", auto_map=CLASSES)
    changed(Path("known/config.json"), auto_map=CLASSES)  # transformers has a class of its own for this type
    changed(Path("kernel/config.json"), attn_implementation="someone/attention")
    changed(Path("nested/config.json"), text_config={"_attn_implementation": {"": "someone/attention@main:run"}})
    changed(Path("own_words/tokenizer_config.json"), auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})
    for name, base in (("bomb", "m"), ("bomb_rm", "rm")):
        shutil.copytree(base, name)
        Path(name, "model.safetensors").unlink()
        torch.save({"model.embed_tokens.weight": Bomb()}, Path(name, "pytorch_model.bin"))
    tiny.write_jsonl(Path("rows.jsonl"), [{"prompt": "a", "completion": "b c"}, {"prompt": "b", "completion": "no"}])
    tiny.write_jsonl(Path("pairs.jsonl"), [{"prompt": "a", "chosen": "yes", "rejected": "no"}] * 2)
    Path("fair.py").write_text(
        "def fair(prompts, completions, **columns):\n    return [float(len(one)) for one in completions]\n"
    )
    yield home
    os.chdir(before)


@pytest.fixture(autouse=True)
def no_mark(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts without the mark; copies of modules go to a folder of the tests."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(home / "modules"))
    for name in [one for one in sys.modules if one.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)  # they run again
    Path(MARK).unlink(missing_ok=True)
    yield
    Path(MARK).unlink(missing_ok=True)


def ran() -> bool:
    return Path(MARK).exists()


SHORT = ("--max-new-tokens", "3")
STEP = ("--num-generations", "2", "--rollout.prompts-per-step", "2", "--rollout.num-steps", "1", *SHORT)
FAIR = ("--reward", "fair.py:fair")
PLACES: dict[str, Callable[[str, str], tuple[str, ...]]] = {
    "sft": lambda model, rm: ("sft", "--model", model, "--data", "rows.jsonl"),
    "dpo, the reference": lambda model, rm: ("dpo", "--model", "m", "--reference", model, "--data", "pairs.jsonl"),
    "reward": lambda model, rm: ("reward", "--model", rm, "--data", "pairs.jsonl"),
    "grpo, the policy": lambda model, rm: ("grpo", "--model", model, "--data", "rows.jsonl", *FAIR, *STEP),
    "grpo, the reference": lambda model, rm: (
        "grpo", "--model", "m", "--reference", model, "--kl-in-loss.coef", "0.1", "--data", "rows.jsonl", *FAIR, *STEP),
    "grpo, a reward": lambda model, rm: ("grpo", "--model", "m", "--data", "rows.jsonl", "--reward", rm, *STEP),
    "ppo, the critic": lambda model, rm: (
        "ppo", "--model", "m", "--critic.path", rm, "--data", "rows.jsonl", *FAIR, "--rollout.mini-batch-size", "2", *STEP[2:]),
    "sample": lambda model, rm: ("sample", "--model", model, "--data", "rows.jsonl", *SHORT),
    "sample, a reward": lambda model, rm: ("sample", "--model", "m", "--data", "rows.jsonl", "--reward", rm, *SHORT),
    "eval": lambda model, rm: ("eval", "--model", model, "--data", "rows.jsonl"),
    "eval of a reward model": lambda model, rm: ("eval", "--model", rm, "--data", "pairs.jsonl"),
    "eval against": lambda model, rm: (
        "eval", "--model", "m", "--against", model, "--data", "rows.jsonl", "--judge", "fair.py:fair", *SHORT),
    "eval, a judge": lambda model, rm: (
        "eval", "--model", "m", "--against", "m", "--data", "rows.jsonl", "--judge", rm, *SHORT),
}  # fmt: skip
"""Every place of a recipe that names a model, with a causal LM or a reward model in it."""


def given(place: str, model: str, rm: str, out: Path) -> tuple[str, ...]:
    words = PLACES[place](model, rm)
    if words[0] == "eval":
        return words
    return (*words, "--out", str(out / ("out.jsonl" if words[0] == "sample" else "out")))


@pytest.mark.parametrize("place", PLACES)
def test_a_model_with_code_is_refused_by_name_field_and_fix(place: str, capsys: Any, tmp_path: Path) -> None:
    said = command(capsys, *given(place, "own", "own_rm", tmp_path))
    assert said.status == 2
    name = "own_rm" if "own_rm" in given(place, "own", "own_rm", tmp_path) else "own"
    one_message(said.error, [f"{name}: auto_map in its config.json", "own.OwnConfig", "model.trust_remote_code: true"])
    assert not ran()


@pytest.mark.parametrize("place", PLACES)
def test_a_model_with_code_runs_if_the_recipe_says_so(place: str, capsys: Any, tmp_path: Path) -> None:
    yes = ("--model.trust-remote-code", "true")
    said = command(capsys, *given(place, "own", "own_rm", tmp_path), *yes)
    assert said.status == 0, said.error
    assert ran()


@pytest.mark.parametrize(
    ("model", "field", "file"),
    [
        ("known", "auto_map", "config.json"),
        ("kernel", "attn_implementation", "config.json"),
        ("nested", "_attn_implementation", "config.json"),
        ("own_words", "auto_map", "tokenizer_config.json"),
    ],
)
def test_every_form_of_code_is_refused(model: str, field: str, file: str, capsys: Any, tmp_path: Path) -> None:
    said = command(capsys, *given("sft", model, model, tmp_path))
    assert said.status == 2
    one_message(said.error, [f"{model}: {field} in its {file} names code", "model.trust_remote_code: true"])
    assert not ran()


def test_a_plain_attention_implementation_is_no_code(home: Path, tmp_path: Path) -> None:
    shutil.copytree("m", tmp_path / "eager")
    changed(tmp_path / "eager" / "config.json", attn_implementation="eager", auto_map={}, torch_dtype="float32")
    refuse_code(str(tmp_path / "eager"), False)
    load.load_causal_lm(load.ModelSource(str(tmp_path / "eager")))


def test_the_code_of_a_hub_name_is_read_from_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.cached_file", lambda path, name, **_: str(Path("own", name)))
    with pytest.raises(ModelError, match=r"someone/model: auto_map in its config\.json"):
        load.positions(load.ModelSource("someone/model"))
    assert not ran()


def test_an_adapter_of_a_base_with_code_and_one_for_megatron_are_refused(home: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained("m")
    get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    changed(file, base_model_name_or_path="own")
    with pytest.raises(ModelError, match=r"own: auto_map in its config\.json"):
        load.load_causal_lm(load.ModelSource(str(tmp_path / "adapter")))
    changed(file, base_model_name_or_path="m", megatron_config={"a": 1}, megatron_core="own")
    with pytest.raises(ModelError, match="megatron_config in its adapter_config"):
        load.load_causal_lm(load.ModelSource(str(tmp_path / "adapter")))
    assert not ran()


def test_engines_and_servers_get_the_option_and_nothing_else_sets_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whet.generate.vllm import adapter, engine, launch
    from whet.generate.vllm.start import engine_arguments
    from whet.runs import generators, models, serve

    assert not fields.Frozen().trust_remote_code
    assert not load.ModelSource("m").trust_remote_code
    assert engine_arguments("m", Path(), max_model_len=8)["trust_remote_code"] is False
    for said in (False, True):
        seen: list[Any] = []
        monkeypatch.setattr(engine, "VLLMGenerator", lambda *_, seen=seen, **options: seen.append(options))
        recipe = fields.SampleRecipe(model=fields.Frozen(path="m", trust_remote_code=said))
        _, chat = models.tokenizer_and_chat(recipe.model)
        context = generators.context_of(recipe, chat)
        assert isinstance(context, GeneratorContext)
        adapter.make(adapter.Options(), context)
        assert seen[0]["trust_remote_code"] is said
        arguments = engine_arguments("m", Path(), max_model_len=8, trust_remote_code=said)
        assert arguments["trust_remote_code"] is said
        assert ("--trust-remote-code" in launch.flags(arguments)) is said
        monkeypatch.setattr(serve, "require_vllm", lambda: None)
        monkeypatch.setattr(launch, "Server", lambda *_, seen=seen, **options: seen.append(options) or _stop())
        with pytest.raises(InterruptedError):
            serve.run_serve(fields.ServeRecipe(model=fields.Frozen(path="m", trust_remote_code=said)))
        assert seen[1]["trust_remote_code"] is said
    with pytest.raises(ModelError, match=r"own: auto_map in its config\.json"):
        serve.run_serve(fields.ServeRecipe(model=fields.Frozen(path="own"), max_model_len=8))
    assert not ran()


def _stop() -> Any:
    raise InterruptedError


def test_a_server_unpickles_nothing_even_if_its_environment_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whet.generate.vllm import launch

    started: dict[str, Any] = {}
    monkeypatch.setattr(launch, "require_vllm", lambda: None)
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, **options: started.update(options) or _stop())
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    with pytest.raises(InterruptedError):
        launch.Server("m", max_model_len=8)
    assert started["env"]["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"


@pytest.mark.parametrize("place", PLACES)
def test_a_pickled_model_that_holds_more_than_tensors_is_not_read(place: str, capsys: Any, tmp_path: Path) -> None:
    said = command(capsys, *given(place, "bomb", "bomb_rm", tmp_path), "--model.trust-remote-code", "true")
    assert said.status == 2
    one_message(
        said.error[said.error.rindex("whet: ") :], ["bomb", "pickled file that holds more than tensors", "safetensors"]
    )
    assert all(line.startswith("whet: ") for line in said.error.splitlines())
    assert not ran()


def test_a_pickled_model_of_tensors_is_read(home: Path, tmp_path: Path) -> None:
    shutil.copytree("m", tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    model = load.load_causal_lm(load.ModelSource("m"))
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    again = load.load_causal_lm(load.ModelSource(str(tmp_path / "bin")))
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    return whet.train(
        "grpo", model="m", data="rows.jsonl", out="run", reward="fair.py:fair", num_generations=2, max_new_tokens=3,
        **{"rollout.prompts_per_step": 2, "rollout.num_steps": 2, "train.save_every": 1, "train.keep": 2},
    )  # fmt: skip


def replaced(file: Path) -> None:
    file.unlink()
    file.write_bytes(pickle.dumps(Bomb()))


FILES = (
    "learner/policy.safetensors",
    "learner/policy.optimizer.safetensors",
    "learner/learner.json",
    "loop.json",
    "manifest.json",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_in_a_checkpoint_is_not_read(run: Path, name: str, zipped: bool, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "own"))
    shutil.rmtree(own / "model")
    shutil.rmtree(own / "checkpoints" / "step-00000001")
    folder = own / "checkpoints" / "step-00000002"
    assert (folder / name).is_file()
    replaced(folder / name)
    if zipped:
        torch.save({"a": Bomb()}, folder / name)
    if name != "manifest.json":  # whoever forges a file also forges its hash
        sums = json.loads((folder / "manifest.json").read_text())
        write_json(folder / "manifest.json", sums | {name: sha256(folder / name)})
    recipe = {"model": "m", "data": "rows.jsonl", "reward": "fair.py:fair", "num_generations": 2, "max_new_tokens": 3}
    sizes = {"rollout.prompts_per_step": 2, "rollout.num_steps": 3, "train.save_every": 1, "train.keep": 2}
    with pytest.raises((CheckpointError, RecipeError), match=str(own)) as caught:
        whet.train("grpo", resume=True, out=str(own), **recipe, **sizes)
    assert "\n" not in str(caught.value)
    assert not ran()


def of_extension(path: Path) -> None:
    """A Parquet file with a column of the extension type that pyarrow once unpickled."""
    about = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Bomb(), 0)}
    schema = pyarrow.schema([pyarrow.field("prompt", pyarrow.string(), metadata=about)])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}, schema=schema), path)


@pytest.mark.parametrize("verb", ["replay", "why", "diff"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_as_a_rollout_is_not_read(run: Path, verb: str, zipped: bool, capsys: Any, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "own"))
    file = own / "rollouts" / "step-00000002.parquet"
    replaced(file)
    if zipped:
        torch.save({"a": Bomb()}, file)
    words = (str(run), str(own)) if verb == "diff" else (str(own), "--step", "2")
    said = command(capsys, verb, *words)
    assert said.status == 2
    one_message(said.error, [f"{file}: not a readable Parquet file"])
    assert not ran()


def test_the_dtype_of_a_rollout_is_a_dtype(run: Path, capsys: Any, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "own"))
    file = own / "rollouts" / "step-00000002.parquet"
    table = pyarrow.parquet.read_table(file)
    about = table.schema.metadata | {b"whet.dtypes": json.dumps({"rewards": "load"}).encode()}
    pyarrow.parquet.write_table(table.replace_schema_metadata(about), file)
    said = command(capsys, "replay", str(own), "--step", "2")
    assert said.status == 2
    one_message(said.error, [str(file), "its metadata whet.dtypes are not as whet writes them"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "rows.pkl", "rows.npy", "rows.pt", "rows"])
def test_a_pickle_as_data_is_not_read(home: Path, name: str, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    said = command(capsys, "sft", "--model", "m", "--data", tmp_path / name, "--out", tmp_path / "out")
    assert said.status == 2
    one_message(said.error, [str(tmp_path / name)])
    assert not ran()


def test_an_extension_type_of_a_parquet_file_is_read_as_its_storage(home: Path, tmp_path: Path) -> None:
    of_extension(tmp_path / "rows.parquet")
    out = whet.sample(model="m", data=str(tmp_path / "rows.parquet"), max_new_tokens=2, out=str(tmp_path / "out.jsonl"))
    assert json.loads(out.read_text().splitlines()[0])["prompt"] == "a"
    assert not ran()


def test_a_folder_with_a_dataset_script_is_not_run(home: Path, capsys: Any, tmp_path: Path) -> None:
    shutil.rmtree("scripted", ignore_errors=True)
    Path("scripted").mkdir()
    Path("scripted/scripted.py").write_text(f"open({MARK!r}, 'w').close()\n")
    said = command(capsys, "sft", "--model", "m", "--data", "scripted", "--out", tmp_path / "out")
    assert said.status == 2
    one_message(said.error, ["scripted: "])
    assert not ran()


def test_a_recipe_is_data(home: Path, capsys: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: sft\nmodel: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{MARK}]]\n"
    )
    said = command(capsys, "train", recipe)
    assert said.status == 2
    one_message(said.error, [str(recipe)])
    assert (
        command(
            capsys, "sft", "--model", f"!!python/object/apply:os.system ['touch {MARK}']", "--out", tmp_path / "x"
        ).status
        == 2
    )
    assert not ran()


def test_the_answer_of_a_reward_server_is_json_and_nothing_else(home: Path, capsys: Any, tmp_path: Path) -> None:
    for number, body in enumerate((pickle.dumps(Bomb()), pickle.dumps(Bomb(), 0))):
        with servers.serving() as serve:
            reward = json.dumps(
                [{"source": serve(lambda _, __, body=body: (200, body)).url, "options": {"retries": 0}}]
            )
            words = ("--reward", reward, "--out", tmp_path / f"{number}.jsonl", *SHORT)
            said = command(capsys, "sample", "--model", "m", "--data", "rows.jsonl", *words)
            assert said.status == 1
            assert said.error.splitlines()[-1].startswith("whet: reward http://127.0.0.1:")
            assert "is not JSON" in said.error
    assert not ran()


def test_a_bomb_goes_off_where_it_is_unpickled(home: Path) -> None:
    """The other tests could not fail if it did not."""
    pickle.loads(pickle.dumps(Bomb()))
    assert ran()
    Path(MARK).unlink()
    torch.save({"a": Bomb()}, "bomb.pt")
    torch.load("bomb.pt", weights_only=False)
    assert ran()
    Path(MARK).unlink()
    subprocess.run([sys.executable, "own/own.py"], check=True, timeout=120)
    assert ran()
