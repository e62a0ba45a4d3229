"""The fields of the recipe of every command: frozen records, light to import, each field with its meaning, unit and range."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from whet.methods.catalogue import PREFERENCE
from whet.methods.options import (
    Count,
    Elements,
    LoRA,
    NotNegative,
    NotNegativeInt,
    Optim,
    Positive,
    Processes,
    Sampling,
    Seconds,
    Seed,
    Share,
    Steps,
)  # fmt: skip

MOST_THREADS = 4096
"""Largest number of CPU threads. See also `sample.threads`, which knows the CPUs of the machine."""


@dataclass(frozen=True)
class Frozen:
    """The model, and how it is loaded."""

    path: str = ""
    """Hugging Face folder or hub name"""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """dtype of the loaded weights; "auto" is float32, or bfloat16 with adapters on a GPU (training computes in learner.precision)"""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; "auto" uses a GPU if there is one"""
    trust_remote_code: bool = False
    """run code that comes with the model"""
    quantize: Literal["none", "4bit"] = "none"
    """"4bit" loads the base in 4 bits for LoRA (QLoRA); needs a GPU"""
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """attention kernels; "auto" is the choice of transformers (sdpa, or eager if the model has none); vLLM has its own"""
    chat_template: str | None = None
    """"plain" (### Human / ### Assistant), "none" (prompt and completion joined), a Jinja file; default: the tokenizer's own"""
    pad_token: str | None = None
    """token to pad with; default: the tokenizer's, or its end token"""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """arguments of the chat template for every row, such as {enable_thinking: false}; a row can have its own"""


@dataclass(frozen=True)
class Model(Frozen):
    """The model, and how it is loaded and trained."""

    lora: LoRA | None = None
    """train LoRA adapters instead of all weights"""
    export: Literal["merged", "adapter"] = "merged"
    """what is saved after training with LoRA: the merged weights, or the adapter"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    router_aux_loss_coef: NotNegative | None = None
    """weight of the load-balancing loss of a mixture of experts; default: the model's if its configuration has
    output_router_logits, else 0"""
    router_z_loss_coef: NotNegative | None = None
    """weight of the z-loss of the router of a mixture of experts; default: the model's if its configuration has one, else 0"""


@dataclass(frozen=True)
class DataSource:
    """One data source and its sampling weight."""

    path: str
    """a file, a folder, a pattern, or the name of a dataset"""
    weight: Positive = 1.0
    """sampling weight, relative to the other sources"""
    name: str = ""
    """configuration of a dataset"""
    split: str = ""
    """split of a dataset; default: train"""
    columns: dict[str, str] = field(default_factory=dict)
    """renamed columns of this source; default: those of the section"""

    @property
    def source(self) -> str:
        """The source as one text: "path", "path:split" or "path:name:split"."""
        return self.path + (f":{self.name}:{self.split}" if self.name else f":{self.split}" if self.split else "")


@dataclass(frozen=True)
class EarlyStop:
    """When a run ends early."""

    patience: Elements | None = None
    """evaluations in a row without improvement after which the run ends; default: it does not end early"""
    metric: str | None = None
    """the logged number that should improve; default: the one of keep_best"""
    min_delta: NotNegative = 0.0
    """smallest change of the number that is an improvement"""


@dataclass(frozen=True)
class Evaluation:
    """Evaluation on held-out rows: before the first step, every n steps, and at the end. It changes no result of the run."""

    data: str = ""
    """held-out rows, in the format of the training rows"""
    every: NotNegativeInt = 0
    """steps between evaluations; 0: only at the start and at the end"""
    num_rows: Elements | None = None
    """only the first rows of the file; default: all"""
    keep_best: str | None = None
    """name of a logged number, such as "eval/loss"; the model of the step where it is best is kept in the folder best"""
    early_stop: EarlyStop = EarlyStop()
    greater_is_better: bool | None = None
    """whether the numbers of keep_best and early_stop are better when they are higher; default: known for whet's own numbers"""


@dataclass(frozen=True)
class Data:
    """The training rows, and how long ones are handled."""

    train: str | list[DataSource] = ""
    """a file, a folder, a pattern or a dataset ("name:split"), or {path, name, split}; a list of {path, weight} is mixed by weight"""
    columns: dict[str, str] = field(default_factory=dict)
    """renamed columns, whet's name -> the column of the data, as {prompt: question, completion: answer}"""
    num_rows: Count | None = None
    """read the first rows of each source alone; default: all"""
    streaming: bool = False
    """do not download a dataset whole; needs num_rows"""
    max_tokens: Annotated[int, msgspec.Meta(ge=2)] | None = None
    """maximum length of a sequence, in tokens; default: the number of positions of the model"""
    too_long: Literal["error", "drop", "cut"] = "error"
    """how longer rows are handled"""
    turns: Literal["all", "last"] = "all"
    """assistant turns of a conversation that are trained"""
    separator: str = "\n"
    """separator of the steps of `completions` rows (reward --algorithm.name process)"""
    shuffle: bool = True
    """shuffle the rows in each epoch"""
    cache: Annotated[str, msgspec.Meta(min_length=1)] = "auto"
    """folder for tokenized rows, read again by runs with the same rows and tokenizer; auto: ~/.cache/whet/data; none: no cache"""


@dataclass(frozen=True)
class Rows:
    """Rows whose texts are not trained, such as prompts."""

    train: str | list[DataSource] = ""
    """a file, a folder, a pattern or a dataset ("name:split"), or {path, name, split}"""
    columns: dict[str, str] = field(default_factory=dict)
    """renamed columns, whet's name -> the column of the data, as {prompt: question, completion: answer}"""
    num_rows: Count | None = None
    """read the first rows of each source alone; default: all"""
    streaming: bool = False
    """do not download a dataset whole; needs num_rows"""
    max_tokens: Annotated[int, msgspec.Meta(ge=2)] | None = None
    """maximum length of a prompt, in tokens; default: the positions of the model minus the longest answer"""
    too_long: Literal["error", "drop"] = "error"
    """how longer rows are handled"""


@dataclass(frozen=True)
class Loop:
    """Micro-batches and checkpoints."""

    max_tokens_per_micro_batch: Count | None = None
    """largest number of tokens of a forward pass; changes memory and speed, but no result; default: a size for the model's width,
    the kind of device and the number of threads (docs/speed.md)"""
    padding_free: bool = True
    """read rows one after the other without padding, if the model's attention allows it; false: pad them"""
    shared_prefix: bool = True
    """with padding_free, compute a prompt once for all rows of a micro-batch that have it; false: once per row"""
    save_every: NotNegativeInt = 0
    """updates (online: steps) between checkpoints; one is also saved at the end, on a signal, and if a step fails"""
    save_minutes: Annotated[float, msgspec.Meta(ge=0, le=1e7)] = 10.0
    """save also when so many minutes, and 20 times the duration of a save, have passed since the last one; 0: never"""
    save_last: bool = True
    """save a checkpoint at the end, from which the run can be extended; it is about four times the size of the model"""
    keep: Elements = 2
    """number of checkpoints that are kept"""
    on_divergence: Literal["warn", "stop"] = "warn"
    """if loss, KL, entropy or lengths show that the run diverges: print a line, or also stop the run"""


@dataclass(frozen=True)
class Train(Loop):
    """Length of an offline run, and batch size."""

    num_epochs: Positive = 1.0
    """passes over the data"""
    num_steps: Steps | None = None
    """updates in total; overrides num_epochs"""
    batch_size: Elements = 32
    """elements (conversations, pairs, rankings) per update; the last batch of an epoch is smaller"""
    drop_last: bool = False
    """leave out the last batch of an epoch if it is smaller"""
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """residual dropout; its masks do not depend on the micro-batches"""


@dataclass(frozen=True)
class Head:
    """The scalar head of a reward model."""

    readout: Literal["last", "mean", "sum"] | None = None
    """position of the score: the last token, or the mean or sum over the tokens of the answer; default: as saved, last if new"""
    standardize: bool = False
    """after training, scale and shift the scores to mean 0 and deviation 1 over the training answers"""


@dataclass(frozen=True)
class SyncReference:
    """A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024; iterative GRPO, Shao et al. 2024)."""

    every: NotNegativeInt = 0
    """updates (online: steps) between updates of the reference; 0 never updates it"""
    mix: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """reference <- (1 - mix) reference + mix policy; TR-DPO: 0.6"""


@dataclass(frozen=True)
class Learning:
    """The learner: how weights, gradients and moments are stored over its workers."""

    backend: str = "auto"
    """local (one process), ddp, fsdp, zero1, zero2, zero3 (DeepSpeed), or "mine.py:Learner"; auto: local alone, fsdp on several"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of the backend; also written without `options`, as learner.precision"""


@dataclass(frozen=True)
class Generation:
    """The generator of the answers."""

    name: str = "local"
    """the generator: local (transformers), vllm (engines that whet starts), server (running vLLM servers), or "mine.py:Generator" """
    max_staleness: NotNegativeInt = 0
    """largest age of the weights behind a trained answer, in steps; 0 waits for all answers, above 0 answers are generated ahead"""
    segment_tokens: Count = 64
    """with max_staleness: tokens after which an unfinished answer continues with the newest weights"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of the generator; also written without `options`, as generator.count"""


@dataclass(frozen=True)
class Answering:
    """The generator of answers outside training."""

    name: str = "local"
    """local (transformers), vllm, openai (a server with the OpenAI API), or "mine.py:Generator" """
    options: dict[str, Any] = field(default_factory=dict)
    """options of the generator; also written without `options`, as generator.url"""


@dataclass(frozen=True)
class Ranking:
    """The ranker of answers."""

    name: str | None = None
    """scores, judge, or "mine.py:Ranker"; default: judge if one is given, else scores"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of the ranker; also written without `options`"""


@dataclass(frozen=True)
class Cluster:
    """Processes on a Ray cluster. Needs the package ray (the extra `ray`)."""

    address: str | None = None
    """"auto" connects to a running Ray cluster, or starts one here; or host:port; default: no cluster"""
    learners: Processes = 1
    """workers of the learner"""
    engines: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    """processes with a generator of their own; 0: the learner's workers generate"""
    rewards: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    """processes that compute rewards; 0: the learner's workers run reward models, and this process runs functions"""
    colocate: bool = False
    """engines share the learner's GPUs instead of having their own"""
    cpus: Positive = 1.0
    """CPUs and threads of each worker"""
    min_learners: Processes = 1
    """after a failure: smallest number of learners to continue with, if lost ones cannot be placed again"""
    restarts: NotNegativeInt = 20
    """number of restarts of workers before the run ends with an error"""
    placement_timeout: Seconds = 60.0
    """seconds to wait for resources before fewer learners are tried"""
    timeout: Seconds = 1800.0
    """seconds after which a call to a worker counts as failed"""


@dataclass(frozen=True)
class OfflineRecipe:
    """Recipe of pretrain and sft, and the common fields of reward and the preference methods."""

    model: Model = Model()
    data: Data = Data()
    eval: Evaluation = Evaluation()
    optim: Optim = Optim()
    train: Train = Train()
    learner: Learning = Learning()
    cluster: Cluster = Cluster()
    seed: Seed = 0
    """seed of all random numbers"""
    out: str = ""
    """run folder"""
    threads: Annotated[int, msgspec.Meta(ge=0, le=MOST_THREADS)] = 0
    """CPU threads; 0 keeps the default of torch"""
    trackers: list[Any] = field(default_factory=list)
    """console, tensorboard, wandb, trackio, mlflow, ... (the extra `trackers` of whet), "mine.py:Tracker", or {name: ..., options}"""


@dataclass(frozen=True)
class RewardModelRecipe(OfflineRecipe):
    """Recipe of reward."""

    algorithm: dict[str, Any] = field(default_factory=dict)
    """`name` (k_way, pairwise, log_exp, absolute, process) and its slots"""
    head: Head = Head()


@dataclass(frozen=True)
class PreferenceRecipe(OfflineRecipe):
    """Recipe of the preference methods: dpo, orpo, kto, ..."""

    algorithm: dict[str, Any] = field(default_factory=dict)
    """the method's slots"""
    reference: str | None = None
    """the reference model; default: the model itself"""
    precompute: bool = False
    """compute the log-probs of the reference once, before training"""
    sync_reference: SyncReference = SyncReference()


@dataclass(frozen=True)
class JudgeSpec:
    """A judge of answers in an evaluation."""

    source: str
    """a reward-model folder, "file.py:function", "file.py:Class" with a method score, a URL, openai, or a ready-made one"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of a function, of a URL, of openai, of a class or of a ready-made one, as for a reward"""
    name: str | None = None
    """its name in the logs"""


@dataclass(frozen=True)
class PromptEvaluation(Evaluation):
    """Evaluation on held-out prompts: before the first step, every n steps, and at the end. It changes no result of the run."""

    data: str = ""
    """`prompt` rows that are not trained on"""
    num_generations: Elements = 1
    """answers per prompt"""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    """sampling temperature of these answers; default: that of the run"""
    judge: list[JudgeSpec] = field(default_factory=list)
    """judges that score these answers and are never trained on, named like rewards: functions, reward models, ready-made ones"""


@dataclass(frozen=True)
class RewardSpec:
    """A reward of whole answers: a model, a function, a server."""

    source: str
    """a reward-model folder, "file.py:function", "file.py:Class" with a method score, a URL, openai, or a ready-made one"""
    weight: float = 1.0
    """its weight in the score"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of a function (timeout), of a URL (timeout, retries, ...), of openai (url, model, ...), of a class or of a ready-made
    one; also written beside `source`"""


@dataclass(frozen=True)
class RewardSource(RewardSpec):
    """One reward: a model folder, or a function."""

    name: str | None = None
    """its name in the logs"""
    dense: bool = False
    """a reward model gives its score at every token"""
    step: str | None = None
    """with dense: only at tokens that contain this text (such as "\\n"), which end a step, and at the end of the answer"""


@dataclass(frozen=True)
class Critic:
    """The critic of methods that have one."""

    path: str | None = None
    """model that it starts from; default: the first reward model, else the policy's model with a new head"""
    optim: Optim | None = None
    """its optimizer; default: the optimizer of the policy"""
    warmup_steps: NotNegativeInt = 0
    """first steps, in which only the critic is trained"""


@dataclass(frozen=True)
class Ptx:
    """The pre-training stream of PPO-ptx."""

    data: str | None = None
    """`text` (or completion) rows"""
    columns: dict[str, str] = field(default_factory=dict)
    """renamed columns, whet's name -> the column of the data"""
    batch_size: Elements = 32
    """rows per update"""


@dataclass(frozen=True)
class Rollout:
    """Rollouts: their size, and the updates on them."""

    num_steps: Steps = 100
    """steps in total; one step is one rollout with its updates"""
    prompts_per_step: Elements = 64
    """prompts per rollout"""
    mini_batch_size: Elements | None = None
    """answers (in online preference methods: pairs) per update; default: all of a rollout"""
    num_epochs: Positive | None = None
    """passes over the prompts; overrides num_steps"""
    ppo_epochs: Elements = 1
    """passes over each rollout"""
    max_num_seqs: Elements = 256
    """answers that are generated at the same time"""
    target_kl: Positive | None = None
    """stop the updates of a rollout when KL(old || new) of a mini-batch exceeds this, in nats per token (needs several updates)"""
    ema: Share | None = None
    """decay of an exponential moving average of the policy, which is exported too"""
    sync_reference: SyncReference = SyncReference()
    defer_old_logp: bool = True
    """with one update per rollout, take old_logp from the update itself, if nothing before it reads it; false: always measure it"""
    record_every: NotNegativeInt = 1
    """steps between the rollouts that are written to the run folder; 0: none. `whet why` and `whet verify` read them"""


@dataclass(frozen=True)
class OnlineRecipe:
    """Recipe of the online methods: ppo, grpo, rloo, online_dpo, ..."""

    model: Model = Model()
    reference: str | None = None
    """reference model; default: the model itself"""
    critic: Critic = Critic()
    reward: list[RewardSource] = field(default_factory=list)
    """the rewards of the answers; several are summed by weight. A reward-model folder, "file.py:function", a URL, openai, or a
    ready-made one: exact_match, numeric_match, math_match, regex, json_schema, length, repetition, language, sentiment, unit_tests"""
    data: Rows = Rows()
    """`prompt` rows; their other fields reach reward functions"""
    eval: PromptEvaluation = PromptEvaluation()
    ptx: Ptx = Ptx()
    algorithm: dict[str, Any] = field(default_factory=dict)
    """the method's slots"""
    sampling: Sampling = Sampling()
    rollout: Rollout = Rollout()
    optim: Optim = Optim()
    train: Loop = Loop()
    learner: Learning = Learning()
    generator: Generation = Generation()
    cluster: Cluster = Cluster()
    trunk: Literal["separate", "shared"] = "separate"
    """"shared": one base model in memory, policy, critic and reward as adapters on it, the reference without (needs lora)"""
    seed: Seed = 0
    """seed of all random numbers"""
    out: str = ""
    """run folder"""
    threads: Annotated[int, msgspec.Meta(ge=0, le=MOST_THREADS)] = 0
    """CPU threads; 0 keeps the default of torch"""
    trackers: list[Any] = field(default_factory=list)
    """console, tensorboard, wandb, trackio, mlflow, ... (the extra `trackers` of whet), "mine.py:Tracker", or {name: ..., options}"""


@dataclass(frozen=True)
class SampleRecipe:
    """Recipe of sample: K answers per prompt."""

    model: Frozen = Frozen()
    data: Rows = Rows()
    """`prompt` rows"""
    generator: Answering = Answering()
    num_generations: Elements = 4
    """answers per prompt"""
    reward: list[RewardSpec] = field(default_factory=list)
    """the rewards of the answers; several are summed by weight. A reward-model folder, "file.py:function", a URL, openai, or a
    ready-made one: exact_match, numeric_match, math_match, regex, json_schema, length, repetition, language, sentiment, unit_tests"""
    keep: Literal["all", "best"] = "all"
    """"best" writes the answer with the highest score alone, as prompt and completion: best of n as SFT data"""
    max_tokens_per_micro_batch: Count | None = None
    """most tokens of one forward pass of a reward model; default: as in training"""
    sampling: Sampling = Sampling()
    max_num_seqs: Elements = 256
    """answers that are generated at the same time"""
    seed: Seed = 0
    """seed of all random numbers"""
    out: str = ""
    """JSONL file: the rows with `responses`"""
    threads: Annotated[int, msgspec.Meta(ge=0, le=MOST_THREADS)] = 0
    """CPU threads; 0 keeps the default of torch"""


@dataclass(frozen=True)
class RankRecipe:
    """Recipe of rank: `responses` rows become ranking rows."""

    data: Rows = Rows()
    """rows with `prompt` and `responses`, and `scores` when there is no judge"""
    judge: str | None = None
    """"file.py:function": f(prompts, completions, **columns) -> scores; or a URL, openai, "file.py:Class" as for rewards, or a
    ready-made one: exact_match, numeric_match, math_match, regex, json_schema, length, repetition, language, sentiment, unit_tests"""
    judge_options: dict[str, Any] = field(default_factory=dict)
    """options of a function, of a URL, of openai, of a class or of a ready-made one, as for a reward"""
    judge_form: Literal["score", "rank"] = "score"
    """"rank": the function is f(prompt, responses, **columns) -> ranks"""
    ranker: Ranking = Ranking()
    out: str = ""
    """JSONL file: the rows with `ranks`"""


@dataclass(frozen=True)
class EvalRecipe:
    """Recipe of eval: win rate under judges, reward-model accuracy, or held-out loss."""

    model: Frozen = Frozen()
    against: str | None = None
    """the other model of a win rate"""
    judge: list[JudgeSpec] = field(default_factory=list)
    """what scores the answers of a win rate: a function, a reward-model folder, {source: openai, options: ...}, or a ready-made
    reward: exact_match, numeric_match, math_match, regex, json_schema, length, repetition, language, sentiment, unit_tests; or several"""
    data: Rows = Rows()
    """prompts (win rate), rankings or pairs (accuracy of a reward model), text or conversations (loss)"""
    generator: Answering = Answering()
    sampling: Sampling = Sampling()
    max_num_seqs: Elements = 256
    """answers that are generated at the same time"""
    answers: str | None = None
    """JSONL file for both models' answers with their scores and KL"""
    max_tokens_per_micro_batch: Count | None = None
    """most tokens of one forward pass; default: as in training"""
    seed: Seed = 0
    """seed of all random numbers"""
    out: str | None = None
    """JSON file for the numbers"""
    threads: Annotated[int, msgspec.Meta(ge=0, le=MOST_THREADS)] = 0
    """CPU threads; 0 keeps the default of torch"""


@dataclass(frozen=True)
class ServeRecipe:
    """Recipe of serve: a vLLM server that takes weights. Needs the package vllm (the extra `vllm`)."""

    model: Frozen = Frozen()
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] | None = None
    """port of loopback on which it listens, with a key; 0 is any free one; default: no port, but a Unix socket in a private folder"""
    api_key_env: str = ""
    """environment variable that contains its key; default: VLLM_API_KEY, if it is set; otherwise a port has a random key"""
    max_model_len: Annotated[int, msgspec.Meta(ge=2)] | None = None
    """longest prompt and answer together, in tokens; default: what the model's positions allow"""
    max_num_seqs: Elements = 256
    """answers that are generated at the same time"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """the server's precision; "auto" is that of a training run: bfloat16 on a GPU; on a CPU, or if it is set, model.dtype"""
    transfer: Literal["auto", "shared", "gloo", "nccl", "ipc"] = "auto"
    """how weights travel to it; "auto" is shared memory"""
    tensor_parallel: Processes = 1
    """GPUs that it is split over"""
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    """share of a GPU's memory that it takes"""
    kv_cache_mib: Count = 512
    """size of its KV cache on CPU, in MiB"""
    sleep: bool = False
    """it can give its GPU's memory back between rollouts"""


@dataclass(frozen=True)
class PlanOptions:
    """What `whet plan` takes beside the recipe's fields."""

    gpus: Processes
    """number of GPUs"""
    gpu_memory: Positive = 80.0
    """memory of one GPU, in GiB"""
    learners: Processes | None = None
    """GPUs of the learner; default: the fastest number that fits"""
    prompt_tokens: Count = 512
    """tokens of a prompt"""
    mean_answer: Positive | None = None
    """tokens of an answer on average; default: half of the longest"""
    per_node: Processes = 8
    """GPUs of one machine"""
    inside: Positive = 300e9
    """bytes per second between the GPUs of one machine"""
    between: Positive = 25e9
    """bytes per second between machines"""


@dataclass(frozen=True)
class VerifyOptions:
    """What `whet verify-resume` takes beside the recipe's fields."""

    kills: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    """number of kills of the second run"""
    kill_seed: Seed = 0
    """seed of the moments of the kills"""
    steps: Steps | None = None
    """steps of each run (offline: updates); default: all steps of the recipe"""


def kind_of(verb: str) -> type:
    """The record of a verb's recipe."""
    others = {
        "sample": SampleRecipe, "rank": RankRecipe, "eval": EvalRecipe, "serve": ServeRecipe,
        "reward": RewardModelRecipe, "pretrain": OfflineRecipe,
        "sft": OfflineRecipe,
    }  # fmt: skip
    return others.get(verb, PreferenceRecipe if verb in PREFERENCE else OnlineRecipe)


TrainingRecipe = OfflineRecipe | OnlineRecipe
"""The recipes of the methods that train."""

REWARDS = (RewardSpec, RewardSource, JudgeSpec)
"""Sections of one reward or judge."""

OPEN = (Learning, Generation, Answering, Ranking, *REWARDS)
"""Sections of an adapter: each field that they do not have is an option of the adapter."""

MAIN_FIELD: Mapping[type, str] = {
    Frozen: "path",
    Model: "path",
    Data: "train",
    Rows: "train",
    Evaluation: "data",
    PromptEvaluation: "data",
    EarlyStop: "patience",
    RewardSpec: "source",
    RewardSource: "source",
    JudgeSpec: "source",
    DataSource: "path",
    Critic: "path",
    Ptx: "data",
    Learning: "backend",
    Generation: "name",
    Answering: "name",
    Ranking: "name",
    Cluster: "address",
}
"""What a bare value given for a whole section means: `--model DIR` is `--model.path DIR`."""
