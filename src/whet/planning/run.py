"""The run and the hardware that a plan is made for."""

from dataclasses import dataclass

from whet.errors import RecipeError
from whet.planning import traffic
from whet.planning.memory import GIB
from whet.planning.schedule import Length, lognormal
from whet.planning.shape import Shape
from whet.planning.traffic import Network


@dataclass(frozen=True)
class PlannedRun:
    """The values of a recipe that a plan needs."""

    policy: Shape
    """the model that is trained"""
    critic: Shape | None = None
    """backbone of the critic, if the method has one"""
    reference: Shape | None = None
    """backbone of the reference, if it is a separate model"""
    base_read: bool = False
    """the reference is the policy's base without adapters: it needs no memory, but a separate forward"""
    rewards: tuple[tuple[str, Shape], ...] = ()
    """(name, backbone) of each reward model"""
    average: bool = False
    """a moving average of the policy is kept (rollout.ema)"""
    online: bool = True
    """answers are generated; if False, rows are read from data"""
    prompts: int = 64
    """groups per step; offline: elements per update"""
    num_generations: int = 1
    """answers per group; offline: rows per element (2 for pairs)"""
    prompt_tokens: int = 512
    """mean number of tokens of a prompt"""
    answer_tokens: int = 1024
    """tokens of the longest answer"""
    mean_answer: float | None = None
    """mean number of tokens of an answer; default: half of the longest"""
    updates: int = 1
    """updates in one pass over the answers of a step"""
    epochs: int = 1
    """passes over the answers of a step"""
    max_tokens_per_micro_batch: int = 8192
    """the recipe's train.max_tokens_per_micro_batch; the plan reduces it if it does not fit"""
    checkpointing: bool = False
    """the recipe's model.gradient_checkpointing; the plan turns it on if nothing fits without it"""
    low_precision: bool = False
    """learner.precision: bfloat16 computation with float32 weights"""
    offload: bool = False
    """learner.offload"""
    engine_bytes: int = 2
    """generator.dtype: bytes per number in the engines, 2 or 4"""
    push_adapter: bool = False
    """generator.push: only the adapter is sent to the engines"""
    route: traffic.Route = "files"
    """how new weights are sent to the engines"""
    beside: bool = False
    """engines may not share the learner's GPUs, because they generate ahead"""
    tensor_parallel: int = 0
    """GPUs per engine; with 0 the plan chooses"""
    engine_memory: float = 0.9
    """generator.gpu_memory_utilization: fraction of a GPU's memory that an engine uses"""
    lora_rank: int = 0
    """rank of the adapters; 0 trains all weights"""
    lora_targets: str | tuple[str, ...] = "all-linear"
    """linear maps that have adapters"""
    one_trunk: bool = False
    """policy, critic and rewards are adapters on one base"""
    held_bytes: int = 4
    """bytes per frozen number: 4, or 2 (model.dtype bfloat16, or adapters on a GPU)"""
    optim: str = "adamw"
    """optim.kind"""
    columns: int = 8
    """number of float32 columns per answer token that are gathered from the learner's workers in a step"""

    def __post_init__(self) -> None:
        if not 0 < self.engine_memory <= 1:
            raise RecipeError(
                f"generator.gpu_memory_utilization: must be above 0 and at most 1; got {self.engine_memory}"
            )
        for name in (
            "prompts",
            "num_generations",
            "prompt_tokens",
            "answer_tokens",
            "updates",
            "epochs",
            "max_tokens_per_micro_batch",
        ):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}: at least 1; got {getattr(self, name)}")
        if not 1 <= self.mean <= self.answer_tokens:
            raise RecipeError(
                f"--mean-answer: between 1 and the longest answer, {self.answer_tokens} tokens (sampling.max_new_tokens); "
                f"got {self.mean:g}"
            )

    @property
    def mean(self) -> float:
        """Mean number of tokens of an answer."""
        return (self.answer_tokens + 1) / 2 if self.mean_answer is None else self.mean_answer

    @property
    def rows(self) -> int:
        """Answers per step."""
        return self.prompts * self.num_generations

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def tokens(self) -> float:
        """Tokens per step, with the prompt counted for every answer."""
        return self.rows * (self.prompt_tokens + self.mean)

    @property
    def adapters(self) -> int:
        """Number of LoRA weights of one trained role; 0 without LoRA."""
        return self.policy.adapter_parameters(self.lora_rank, self.lora_targets) if self.lora_rank else 0

    def lengths(self) -> Length:
        """Return the answer lengths that the simulation assumes: log-normal, sigma 0.6, truncated at the longest answer."""
        return lognormal(self.mean * 0.8353, 0.6, self.answer_tokens)  # mean = median x exp(0.6^2 / 2)


@dataclass(frozen=True)
class Hardware:
    """The GPUs and their assumed utilization. Default speeds are from the data sheet of an H100 SXM, without sparsity."""

    gpus: int
    """number of GPUs"""
    gpu_memory: float
    """memory of each GPU in GiB"""
    network: Network = Network()
    """network speeds"""
    low_precision_flops: float = 989e12
    """bfloat16 operations per second"""
    single_flops: float = 67e12
    """float32 operations per second"""
    bandwidth: float = 3.35e12
    """memory bandwidth in bytes per second"""
    training: float = 0.4
    """fraction of the operations per second reached in updates"""
    reading: float = 0.5
    """fraction reached in forwards without gradient"""
    decoding: float = 0.6
    """fraction of the memory bandwidth reached in decoding"""
    reserve: float = 0.08
    """fraction of the memory for the driver, communication buffers and fragmentation"""

    def __post_init__(self) -> None:
        for name, option in (("gpus", "--gpus"), ("gpu_memory", "--gpu-memory")):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{option}: above 0; got {getattr(self, name)}")

    @property
    def usable(self) -> float:
        """Bytes per GPU that a plan may use."""
        return self.gpu_memory * GIB * (1 - self.reserve)
