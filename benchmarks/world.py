"""A small, deterministic world to train in: a tokenizer, a causal language model, and rows for every method. Nothing is downloaded.

    python -m benchmarks.world nano --out .cache/bench/nano

What is written:
    model/            a Hugging Face folder of the language model, trained a little, with its tokenizer and chat template
    rm/               a classifier with one label: the same base with a new head (reward model and critic)
    sft.jsonl         rows of prompt and completion (text without an end token)
    pref.jsonl        rows of prompt, chosen and rejected
    prompts.jsonl     rows of prompt
    world.json        sizes, seed, statistics of the lengths, hashes of the files

The text is a toy language: words made of syllables, with Zipf frequencies and topics. A prompt names a topic, and a good
completion uses its words, which `reward` scores. Lengths are log-normal.
"""

import argparse
import hashlib
import json
import math
import os
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "qwen05": {
        "vocab": 8192, "ids": 151936, "hidden": 896, "layers": 24, "heads": 14, "kv": 2,
        "inter": 4864, "words": 16000, "steps": 0, "lr": 0.001, "bs": 8,
    },
    "qwen15": {
        "vocab": 8192, "ids": 151936, "hidden": 1536, "layers": 28, "heads": 12, "kv": 2,
        "inter": 8960, "words": 16000, "steps": 0, "lr": 0.001, "bs": 8,
    },
    "tiny": {
        "vocab": 1024, "hidden": 32, "layers": 2, "heads": 4, "kv": 2, "inter": 64,
        "words": 1400, "steps": 10, "lr": 0.003, "bs": 8,
    },
    "nano": {
        "vocab": 2048, "hidden": 128, "layers": 4, "heads": 4, "kv": 2, "inter": 512,
        "words": 4000, "steps": 240, "lr": 0.003, "bs": 16,
    },
    "micro": {
        "vocab": 8192, "hidden": 512, "layers": 8, "heads": 8, "kv": 4, "inter": 1536,
        "words": 16000, "steps": 60, "lr": 0.001, "bs": 8,
    },
}  # fmt: skip
"""Ids of tokenizer and model (`ids`, if it has more), shape, words of the language, and steps of pre-training. The first two
are the shapes of Qwen2.5 with random weights."""
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
N_TOPICS = 32


class Language:
    """Pseudo-words with Zipf frequencies and topics; everything derives from `seed`."""

    def __init__(self, n_words, seed):
        rng = random.Random(f"lang-{n_words}-{seed}")
        on = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "sh", "tr", "st", "pl", "gr"]
        nu = ["a", "e", "i", "o", "u", "ai", "ou"]
        co = ["", "", "", "n", "r", "s", "l", "t", "k"]
        words, seen = [], set()
        while len(words) < n_words:
            w = "".join(rng.choice(on) + rng.choice(nu) + rng.choice(co) for _ in range(rng.choice((1, 2, 2, 2, 3))))
            if w not in seen:
                seen.add(w)
                words.append(w)
        self.words = words
        self.cum = []
        s = 0.0
        for i in range(n_words):
            s += 1.0 / (i + 5) ** 1.05
            self.cum.append(s)
        # topics: disjoint sets of 40 fairly frequent words
        pool = list(range(20, 20 + N_TOPICS * 40))
        rng.shuffle(pool)
        self.topics = [pool[t * 40 : (t + 1) * 40] for t in range(N_TOPICS)]
        self.topic_names = [words[t[0]] for t in self.topics]
        self.topic_sets = [{words[i] for i in t} for t in self.topics]

    def sentence(self, rng, n, topic=None, purity=0.0):
        """Return n words, a share `purity` of them of the topic."""
        out = rng.choices(range(len(self.words)), cum_weights=self.cum, k=n)
        if topic is not None:
            t = self.topics[topic]
            out = [t[int(len(t) * rng.random() ** 1.6)] if rng.random() < purity else w for w in out]
        return [self.words[i] for i in out]


def reward(prompt, completion, lang):
    """Python reward: share of on-topic words, in [0, 1]. The topic is the 2nd word of the prompt."""
    p = prompt.split()
    name = p[1] if len(p) > 1 else ""
    try:
        topic = lang.topic_sets[lang.topic_names.index(name)]
    except ValueError:
        return 0.0
    w = completion.split()
    return sum(x in topic for x in w) / len(w) if w else 0.0


def lognormal_len(rng, median, sigma, lo, hi):
    """Return a log-normal length between lo and hi."""
    return int(min(hi, max(lo, round(median * math.exp(sigma * rng.gauss(0, 1))))))


def make_text(lang, tok, rng, n_tokens, topic, purity, prefix=""):
    """Text of about n_tokens tokens (never more, cut at a word boundary)."""
    words = lang.sentence(rng, max(2, n_tokens), topic, purity)
    text = prefix + " ".join(words)
    enc = tok.encode(text)
    if len(enc.ids) > n_tokens:
        end = enc.offsets[n_tokens - 1][1]
        cut = text.rfind(" ", 0, end + 1)
        text = text[: cut if cut > len(prefix) else end]
    return text.strip()


def build_tokenizer(lang, vocab, seed):
    """Train a byte-level BPE tokenizer on texts of the language."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(f"tok-{seed}")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = 400 if vocab < 2048 else 4000
    corpus = [" ".join(lang.sentence(rng, 60, rng.randrange(N_TOPICS), 0.4)) for _ in range(texts)]
    tok.train_from_iterator(corpus, trainer)
    return tok


def hf_tokenizer(tok):
    """Return it as a tokenizer of transformers, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    t = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=1024,
    )
    t.chat_template = CHAT_TEMPLATE
    return t


def build_config(size, arch, tok):
    """Return the configuration of the model."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    s = SIZES[size]
    kw = {
        "vocab_size": s.get("ids", s["vocab"]),
        "hidden_size": s["hidden"],
        "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv"],
        "intermediate_size": s["inter"],
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        "use_cache": True,
    }
    cls = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[arch]
    if arch == "qwen3":
        kw["head_dim"] = s["hidden"] // s["heads"]
    return cls(**kw)


def build_data(lang, tok, seed, n_sft, n_pref, n_prompts):
    """Return the rows of sft, pref and prompts."""

    def prompt(rng):
        topic = rng.randrange(N_TOPICS)
        n = lognormal_len(rng, 32, 0.6, 8, 96)
        return topic, make_text(lang, tok, rng, n, topic, 0.5, prefix=f"about {lang.topic_names[topic]} ")

    rng = random.Random(f"sft-{seed}")
    sft = []
    for _ in range(n_sft):
        topic, p = prompt(rng)
        sft.append(
            {
                "prompt": p,
                "completion": " " + make_text(lang, tok, rng, lognormal_len(rng, 72, 0.6, 8, 160), topic, 0.5),
            }
        )
    rng = random.Random(f"pref-{seed}")
    pref = []
    for _ in range(n_pref):
        topic, p = prompt(rng)
        a = " " + make_text(lang, tok, rng, lognormal_len(rng, 72, 0.6, 8, 160), topic, 0.65)
        b = " " + make_text(lang, tok, rng, lognormal_len(rng, 72, 0.6, 8, 160), topic, 0.25)
        pref.append({"prompt": p, "chosen": a, "rejected": b})
    rng = random.Random(f"prompts-{seed}")
    prompts = [{"prompt": prompt(rng)[1]} for _ in range(n_prompts)]
    return sft, pref, prompts


def pretrain(model, tok, rows, steps, lr, bs, seed, log=print):
    """A few steps of plain next-token training (prompt + completion + EOS) so that EOS, lengths and topics are learnt."""
    import torch

    g = torch.Generator().manual_seed(seed)
    ids = [tok(r["prompt"])["input_ids"] + tok(r["completion"])["input_ids"] + [tok.eos_token_id] for r in rows]
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1, (s + 1) / 20) * max(0.1, 1 - s / max(1, steps)))
    model.train()
    loss, t0 = torch.zeros(()), time.time()
    for step in range(steps):
        pick = torch.randint(len(ids), (bs,), generator=g).tolist()
        L = max(len(ids[i]) for i in pick)
        x = torch.full((bs, L), tok.pad_token_id)
        y = torch.full((bs, L), -100)
        for j, i in enumerate(pick):
            x[j, : len(ids[i])] = torch.tensor(ids[i])
            y[j, : len(ids[i])] = torch.tensor(ids[i])
        loss = model(input_ids=x, attention_mask=(x != tok.pad_token_id).long(), labels=y).loss
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if step % 20 == 0 or step == steps - 1:
            log(f"pretrain {step:4d} loss {loss.item():.3f} {time.time() - t0:.0f}s")
    return float(loss.item())


def stats(xs):
    """Return the statistics of lengths."""
    xs = sorted(xs)
    n = len(xs)
    return {
        "min": xs[0],
        "p10": xs[n // 10],
        "p50": xs[n // 2],
        "p90": xs[9 * n // 10],
        "max": xs[-1],
        "mean": round(sum(xs) / n, 1),
    }


def build(size, out, seed=0, arch="qwen2", n_sft=2048, n_pref=1024, n_prompts=512, steps=None, log=print):
    """Build a world below `out`. Return what world.json has."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    s = SIZES[size]
    os.makedirs(out, exist_ok=True)
    lang = Language(s["words"], seed)
    raw = build_tokenizer(lang, s["vocab"], seed)
    tok = hf_tokenizer(raw)
    sft, pref, prompts = build_data(lang, raw, seed, n_sft, n_pref, n_prompts)
    for name, rows in (("sft", sft), ("pref", pref), ("prompts", prompts)):
        with open(f"{out}/{name}.jsonl", "w") as f:
            for r in rows:
                f.write(json.dumps(r) + "\n")
    torch.manual_seed(seed)
    cfg = build_config(size, arch, tok)
    model = AutoModelForCausalLM.from_config(cfg, dtype=torch.float32, attn_implementation="sdpa")
    n_params = sum(p.numel() for p in model.parameters())
    last = pretrain(model, tok, sft, s["steps"] if steps is None else steps, s["lr"], s["bs"], seed, log)
    model.generation_config.pad_token_id = tok.pad_token_id
    model.generation_config.eos_token_id = tok.eos_token_id
    model.save_pretrained(f"{out}/model")
    tok.save_pretrained(f"{out}/model")
    torch.manual_seed(seed + 1)
    rm = AutoModelForSequenceClassification.from_config(
        type(cfg)(**{**cfg.to_dict(), "num_labels": 1}), dtype=torch.float32, attn_implementation="sdpa"
    )
    rm.model.load_state_dict(model.model.state_dict())
    rm.save_pretrained(f"{out}/rm")
    tok.save_pretrained(f"{out}/rm")

    def ln(t):
        return len(raw.encode(t).ids)

    info = {
        "size": size,
        "arch": arch,
        "seed": seed,
        "params": n_params,
        "vocab": s["vocab"],
        "pretrain_last_loss": round(last, 3),
        "lengths": {
            "prompt": stats([ln(r["prompt"]) for r in sft]),
            "completion": stats([ln(r["completion"]) + 1 for r in sft]),
            "total": stats([ln(r["prompt"]) + ln(r["completion"]) + 1 for r in sft]),
            "chosen": stats([ln(r["chosen"]) + 1 for r in pref]),
            "rejected": stats([ln(r["rejected"]) + 1 for r in pref]),
            "prompt_only": stats([ln(r["prompt"]) for r in prompts]),
        },
        "rows": {"sft": len(sft), "pref": len(pref), "prompts": len(prompts)},
        "sha256": {},
    }
    for root, _, files in os.walk(out):
        for fn in sorted(files):
            p = os.path.join(root, fn)
            if fn != "world.json":
                info["sha256"][os.path.relpath(p, out)] = hashlib.sha256(Path(p).read_bytes()).hexdigest()[:16]
    (Path(out) / "world.json").write_text(json.dumps(info, indent=1))
    return info


_FOLDERS: list[Path] = []


def topic_reward(folder: Path) -> Any:
    """Return the reward function of a world; it has a name in this module, so that a recipe can name it."""
    _FOLDERS[:] = [folder]
    return on_topic


def on_topic(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return `reward` of each answer, for the world of `topic_reward`."""
    language = language_of(_FOLDERS[0])
    return [reward(prompt, answer, language) for prompt, answer in zip(prompts, completions, strict=True)]


@cache
def language_of(folder: Path) -> Language:
    """Return the language of a world."""
    about = json.loads((folder / "world.json").read_text())
    return Language(SIZES[about["size"]]["words"], about["seed"])


def ready(folder: Path, size: str) -> Path:
    """Return the folder of a world; build it if it is not there."""
    if not (folder / "world.json").is_file():
        print(f"building the world {folder} (minutes for nano and micro)", flush=True)
        build(size, folder, **({"n_sft": 64, "n_pref": 64, "n_prompts": 64} if size == "tiny" else {}))
    return folder


def main() -> None:
    """Build one world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    began = time.time()
    ready(given.out, given.size)
    print(f"{given.out}: {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
