"""Folders in, folders out: heads, readouts, and what is refused with which words."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from whet.data import Batch
from whet.errors import ModelError
from whet.models import load
from whet.models.readers import read
from whet.models.roles import Role, readout_of

from . import helpers as h


def source(path: Path, **given: Any) -> load.ModelSource:
    return load.ModelSource(str(path), device="cpu", **given)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_a_saved_score_is_that_of_the_published_class(tmp_path: Path, kind: str) -> None:
    """What is written is read by AutoModelForSequenceClassification, right-padded, to the same logits."""
    from transformers import AutoModelForSequenceClassification

    tiny.folder(tmp_path / "base", kind)
    model = load.load_scorer(source(tmp_path / "base"), tiny.tokenizer(), seed=3)
    role = Role("reward", model, True)
    batch = Batch.of([h.row(i, 2, 1 + i) for i in range(5)])
    expected = read(role, batch, frozenset({"score"}))["score"].detach()
    role.export(tmp_path / "out", tiny.tokenizer())
    published = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.nn.utils.rnn.pad_sequence([row.ids for row in batch.rows], batch_first=True, padding_value=0)
    with torch.no_grad():
        logits = published(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_fresh_head_is_the_same_at_the_same_seed(tmp_path: Path) -> None:
    tiny.folder(tmp_path)
    heads = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        heads.append(load.scalar_head(load.load_scorer(source(tmp_path), tiny.tokenizer(), seed=seed)).weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_fresh_head_has_variance_one_over_width_plus_one() -> None:
    head = torch.nn.Linear(20_000, 1)
    load.draw_head(head, 0)
    assert abs(float(head.weight.detach().var()) * 20_001 - 1) < 5 * (2 / 20_000) ** 0.5
    assert abs(float(head.weight.detach().mean())) < 5 / 20_000
    assert not head.bias.detach().any()


@pytest.mark.parametrize("readout", ["last", "mean", "sum"])
def test_readout_and_shift_are_saved_and_reloaded(tmp_path: Path, readout: Any) -> None:
    tiny.folder(tmp_path / "base")
    model = load.load_scorer(source(tmp_path / "base"), tiny.tokenizer())
    role = Role("reward", model, True, readout=readout, shift=-1.5)
    batch, names = Batch.of(h.rows()), frozenset({"score"})
    expected = read(role, batch, names)["score"].detach()
    role.export(tmp_path / "out", tiny.tokenizer())
    about = readout_of(str(tmp_path / "out"))
    assert about == {"readout": readout, "shift": -1.5}
    again = Role("reward", load.load_scorer(source(tmp_path / "out"), tiny.tokenizer()), False, **about)
    assert torch.equal(read(again, batch, names)["score"], expected)


def test_a_published_reward_model_is_read_at_its_last_token(tmp_path: Path) -> None:
    assert readout_of(str(tmp_path)) == {"readout": "last", "shift": 0.0}
    (tmp_path / "whet.json").write_text('{"readout": "first"}')
    with pytest.raises(ModelError, match="use last, mean or sum"):
        readout_of(str(tmp_path))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_a_model_goes_through_a_folder_unchanged(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    tiny.folder(tmp_path / "base", kind)
    role = Role("policy", load.load_causal_lm(source(tmp_path / "base"), tiny.tokenizer()), True)
    role.export(tmp_path / "out", tiny.tokenizer())
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, ours), theirs in zip(role.model.state_dict().items(), published.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not (tmp_path / "out" / "whet.json").exists()


def test_every_dropout_of_the_model_is_off(tmp_path: Path) -> None:
    tiny.folder(tmp_path, "gpt2")
    model = load.load_causal_lm(source(tmp_path)).train()
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path / "missing", "no such model folder"),
        (lambda path: path, "not a model folder"),
    ],
)
@pytest.mark.parametrize("function", [load.load_causal_lm, load.load_tokenizer, load.load_scorer, load.positions])
def test_what_is_no_model_folder_is_refused(tmp_path: Path, function: Any, make: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        function(source(make(tmp_path)))


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tiny.folder(tmp_path, vocabulary=20)
    with pytest.raises(ModelError, match=r"27 ids.*20 embeddings"):
        load.load_causal_lm(source(tmp_path), tiny.tokenizer())


def test_a_scorer_whose_vocabulary_does_not_fit_is_refused(tmp_path: Path) -> None:
    tiny.folder(tmp_path, vocabulary=20)
    with pytest.raises(ModelError, match=r"27 ids.*20 embeddings"):
        load.load_scorer(source(tmp_path), tiny.tokenizer())


def test_a_tokenizer_without_pad_token_pads_with_the_end_token_unless_another_is_named(tmp_path: Path) -> None:
    tiny.tokenizer(pad=False).save_pretrained(tmp_path)
    assert load.load_tokenizer(source(tmp_path)).pad_token == "<eos>"
    assert load.load_tokenizer(source(tmp_path), pad_token="<unk>").pad_token == "<unk>"
    with pytest.raises(ModelError, match="no such token"):
        load.load_tokenizer(source(tmp_path), pad_token="<nope>")


def test_a_classifier_with_two_labels_is_no_reward_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    config = tiny.config()
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has 2"):
        load.load_scorer(source(tmp_path))


def test_a_torn_model_file_is_refused(tmp_path: Path) -> None:
    tiny.folder(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load.load_causal_lm(source(tmp_path))


def test_a_folder_that_lacks_weights_of_its_own_model_is_refused(tmp_path: Path) -> None:
    """transformers would draw the missing ones at random and go on."""
    from safetensors.torch import load_file, save_file

    tiny.folder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.1.mlp" not in k},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError):
        load.load_causal_lm(source(tmp_path))


def test_a_four_bit_base_without_gpu_is_refused(tmp_path: Path) -> None:
    tiny.folder(tmp_path)
    with pytest.raises(ModelError, match="needs a GPU"):
        load.load_causal_lm(source(tmp_path, quantize="4bit"))


def test_positions_are_those_of_the_configuration(tmp_path: Path) -> None:
    for kind in ("qwen3", "llama", "gpt2"):
        tiny.folder(tmp_path / kind, kind)
        assert load.positions(source(tmp_path / kind)) == 128
    about = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert about["max_position_embeddings"] == 128


def test_a_reward_model_without_its_head_is_refused(tmp_path: Path) -> None:
    """transformers would draw the head at random, as it does for a new reward model."""
    from safetensors.torch import load_file, save_file

    h.scorer_model().save_pretrained(tmp_path)
    load.load_scorer(source(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "score" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"missing.*score\.weight"):
        load.load_scorer(source(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", b"{"), ("config.json", b"\xff\xfe"), ("model.safetensors", b"\0" * 99)],
    ids=str,
)
def test_a_corrupt_reward_model_is_refused_with_words(tmp_path: Path, name: str, content: bytes) -> None:
    h.scorer_model().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=str(tmp_path)):
        load.load_scorer(source(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"shift": "much"}', '{"shift": null}'])
def test_a_corrupt_readout_is_refused_with_words(tmp_path: Path, content: str) -> None:
    (tmp_path / "whet.json").write_text(content)
    with pytest.raises(ModelError, match=r"whet\.json(:1: not the JSON of an object|: it cannot be read)"):
        readout_of(str(tmp_path))


ENCODERS: dict[str, dict[str, Any]] = {
    "BertConfig": {},
    "RobertaConfig": {},
    "DistilBertConfig": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "DebertaV2Config": {"pooler_hidden_size": 32},
    "ModernBertConfig": {"cls_token_id": 0, "sep_token_id": 1},
    "XLMRobertaConfig": {},
    "ElectraConfig": {"embedding_size": 16},
    "AlbertConfig": {"embedding_size": 16},
    "MPNetConfig": {},
}
DECODERS: dict[str, dict[str, Any]] = {
    "GPTNeoXConfig": {},
    "OPTConfig": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "Gemma2Config": {"head_dim": 8, "sliding_window": 8},
    "MistralConfig": {},
}


def classifier(name: str, **options: Any) -> Any:
    import transformers

    own = ("model_type", "architectures", "id2label", "label2id", "rope_parameters")
    given = {key: value for key, value in tiny.config("llama").to_dict().items() if key not in own}
    given |= {"num_labels": 1, "initializer_range": 0.3} | options
    torch.manual_seed(0)
    config = getattr(transformers, name)(**given)
    return transformers.AutoModelForSequenceClassification.from_config(config).float().eval()


def own_scores(model: Any, batch: Batch) -> torch.Tensor:
    """The class's own label of every row, one at a time, without padding."""
    with torch.no_grad():
        return torch.cat([model(row.ids[None]).logits[:, 0] for row in batch.rows])


@pytest.mark.parametrize("name", ENCODERS | DECODERS)
def test_a_classifier_of_any_architecture_gives_its_own_label(tmp_path: Path, name: str) -> None:
    model = classifier(name, **(ENCODERS | DECODERS)[name])
    model.save_pretrained(tmp_path)
    role = Role("reward", load.load_scorer(source(tmp_path)), False, shift=0.5)
    assert role.whole_text == (name in ENCODERS)
    assert role.pads
    batch = Batch.of(h.rows())
    expected = own_scores(model, batch)
    assert expected.std() > 1e-3  # the texts differ
    torch.testing.assert_close(read(role, batch, frozenset({"score"}))["score"], expected + 0.5, rtol=1e-4, atol=1e-5)


def changed(change: str) -> Any:
    """A decoder classifier whose label is something else than a linear map of its last hidden state, or one with a bias."""
    from transformers import LlamaForSequenceClassification
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast as Output

    class Own(LlamaForSequenceClassification):
        def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
            states = self.model(input_ids, **given).last_hidden_state
            if change == "mean":
                return Output(logits=self.score(states.mean(1)))
            if change == "first":
                return Output(logits=self.score(states[:, 0]))
            if change == "second to last layer":
                return Output(logits=self.score(self.model.layers[0](self.model.embed_tokens(input_ids)).mean(1)))
            logits = self.score(states[:, -1])
            return Output(logits={"scaled": logits / 4, "capped": torch.tanh(logits)}.get(change, logits))

    config = tiny.config("llama")
    config.num_labels = 1
    torch.manual_seed(0)
    model = Own(config).eval()
    if change == "layers":
        model.score = torch.nn.Sequential(
            torch.nn.Linear(32, 8), torch.nn.Dropout(0.5), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ).eval()
    if change == "bias":
        model.score = torch.nn.Linear(32, 1)
    return model


@pytest.mark.parametrize("change", ["none", "bias", "mean", "first", "scaled", "capped", "layers"])
def test_a_head_is_read_on_the_last_token_only_if_the_class_does(change: str) -> None:
    model = changed(change)
    role = Role("reward", model, True)
    assert role.whole_text == (change not in ("none", "bias"))
    assert role.pads == (change == "first")  # the others look at later positions, padding or not
    batch, names = Batch.of(h.rows()), frozenset({"score"})
    scores = read(role, batch, names)["score"]
    torch.testing.assert_close(scores.detach(), own_scores(model, batch), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read(role, batch, names, packed=True)["score"], scores, rtol=1e-4, atol=1e-5)
    scores.sum().backward()  # a reward model of this class can be trained
    assert all(bool(parameter.grad.any()) for name, parameter in role.parameters().items() if "score" in name)


def test_weights_in_several_processes_need_one_forward_for_a_batch() -> None:
    """Each forward of a sharded model waits for all processes, and these have texts of other lengths."""
    forwards = []
    for model in (classifier("BertConfig"), changed("mean")):
        role = Role("reward", model, False)
        role.shell = lambda work, *given: work(*given)
        model.register_forward_hook(lambda *_: forwards.append(1))
        if role.pads:
            read(role, Batch.of(h.rows()), frozenset({"score"}))
            assert len(forwards) == 1
        else:
            with pytest.raises(ModelError, match="cannot be sharded"):
                read(role, Batch.of(h.rows()), frozenset({"score"}))


def test_a_classifier_without_padding_token_reads_one_text_at_a_time() -> None:
    model = changed("scaled")
    model.config.pad_token_id = None
    batch = Batch.of([h.row(seed, 2, 3) for seed in range(4)])
    got = read(Role("reward", model, False), batch, frozenset({"score"}))["score"]
    torch.testing.assert_close(got, own_scores(model, batch), rtol=1e-4, atol=1e-5)


def test_a_classifier_of_whole_texts_has_no_numbers_of_tokens() -> None:
    role = Role("critic", classifier("BertConfig"), False)
    for name in ("value", "final_value", "token_score"):
        with pytest.raises(ModelError, match=f"one score per text and cannot be asked for its {name}"):
            read(role, Batch.of(h.rows()), frozenset({name}))
    with pytest.raises(ModelError, match="no scores of tokens for the readout 'mean'"):
        Role("reward", classifier("BertConfig"), False, readout="mean")


def test_a_classifier_that_reads_more_than_text_is_refused() -> None:
    """BART finds its label at an end token and needs one in every text."""
    with pytest.raises(ModelError, match="cannot read a text of token ids alone"):
        Role(
            "reward",
            classifier("BartConfig", d_model=32, encoder_layers=1, decoder_layers=1, decoder_start_token_id=0),
            False,
        )


# --- NaN and infinite weights -----------------------------------------------------------------------------------------


def damage(file: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


def test_nan_in_the_weights_is_refused_for_every_kind_of_folder(tmp_path: Path) -> None:
    """A policy, a reward model, an adapter of each, and an adapter put on a trunk: the tensor is named."""
    from whet.methods.options import LoRA
    from whet.models import lora

    base = tiny.folder(tmp_path / "base")
    scorer = Role("reward", load.load_scorer(source(base), tiny.tokenizer(), seed=1), True)
    scorer.export(tmp_path / "scorer", tiny.tokenizer())
    for kind, scores in (("policy", False), ("reward", True)):
        model = (load.load_scorer if scores else load.load_causal_lm)(source(base), tiny.tokenizer())
        wrapped = lora.attach(model, LoRA(rank=2, alpha=4.0), (kind,), seed=1, scorer=scores)
        Role(kind, model, True, wrapped=wrapped, adapter=kind).export(tmp_path / f"{kind}-adapter", merge=False)
    for folder, file in (
        ("base", "model"),
        ("scorer", "model"),
        ("policy-adapter", "adapter_model"),
        ("reward-adapter", "adapter_model"),
    ):
        path = tmp_path / folder / f"{file}.safetensors"
        whole = path.read_bytes()
        name = "model.norm.weight" if file == "model" else "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
        damage(path, name)
        loads = load.load_scorer if folder in ("scorer", "reward-adapter") else load.load_causal_lm
        with pytest.raises(
            ModelError, match=rf"{name.removesuffix('.weight').rpartition('.')[2]}.* has 1 of \d+ values that are NaN"
        ):
            loads(source(tmp_path / folder), tiny.tokenizer())
        if folder == "reward-adapter":
            with pytest.raises(ModelError, match="has 1 of"):
                lora.add_from_folder(h.trunk()["policy"].wrapped, "reward0", str(tmp_path / folder))
        path.write_bytes(whole)
        loads(source(tmp_path / folder), tiny.tokenizer())


@pytest.mark.parametrize("merge", [True, False])
def test_an_export_with_nan_is_not_written(merge: bool, tmp_path: Path) -> None:
    roles = h.trunk()
    for role in (h.policy(), roles["policy"]):
        with torch.no_grad():
            next(iter(role.parameters().values())).view(-1)[0] = float("inf")
        with pytest.raises(ModelError, match=r"is not written: .* has 1 of"):
            role.export(tmp_path / "out", merge=merge)
        assert not list(tmp_path.rglob("*.safetensors"))


def test_a_tokenizer_whose_ids_have_gaps_must_fit_the_embedding(tmp_path: Path) -> None:
    """What counts is the largest id, not how many tokens there are."""

    class Gap:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 27}

        def __len__(self) -> int:
            return 2

    tiny.folder(tmp_path / "m")
    with pytest.raises(ModelError, match="the tokenizer has 28 ids but the model only 27"):
        load.load_causal_lm(source(tmp_path / "m"), Gap())
