"""The house holds its own rules: imports only go down, every file has its caption, light imports stay light, docs are true.

`python tests/test_house.py` writes the tree of captions into ARCHITECTURE.md.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "src" / "whet"
LAYERS = (
    ("terminal",), ("errors",), ("registry", "private", "extras"), ("ops",), ("data",), ("methods",), ("distributed", "http", "processes"),
    ("models", "calling", "sandbox"),
    ("generate", "rewards", "feedback", "learner", "trackers"), ("cluster",), ("loops",), ("planning", "view"), ("runs",),
    ("demo", "conformance"), ("cli",),
)  # fmt: skip
"""From the bottom up. A module imports from its own package and from layers below its own, never from another package of its layer."""
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
HEAVY = {
    "transformers": {"models", "generate", "demo"}, "peft": {"models"}, "pyarrow": {"data", "loops"}, "datasets": {"data"},
    "jinja2": {"data", "view"}, "yaml": {"cli", "runs"}, "rich": {"terminal", "loops", "demo"},
    "accelerate": {"trackers"}, "tokenizers": {"demo"}, "safetensors": {"models", "learner", "generate"},
    "vllm": {"generate"}, "deepspeed": {"learner"}, "ray": {"cluster"},
    "math_verify": {"rewards"}, "jsonschema": {"rewards"}, "py3langid": {"rewards"}, "vaderSentiment": {"rewards"},
}  # fmt: skip
"""Which packages may import a library at all."""


def files() -> list[Path]:
    return sorted(HOUSE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names if node.module == "whet"]
    return names


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_only_go_down(path: Path) -> None:
    here = room(path)
    if here.startswith("__"):
        return  # the public names and `python -m whet` open the door from outside
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "whet" and len(parts) > 1 and parts[1] in LAYER and parts[1] != here:
            assert LAYER[parts[1]] < LAYER[here], f"{path}: {here} imports {name}"
        if parts[0] in HEAVY:
            assert here in HEAVY[parts[0]], f"{path}: {here} may not know {parts[0]}"


def called_names(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the whole name of what it calls, as the imports of the module resolve it: `p.load` of `import pickle as p`
    is pickle.load."""
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins |= {one.asname: one.name for one in node.names if one.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            origins |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            start, dot, rest = ast.unparse(node.func).partition(".")
            yield node, f"{origins.get(start, start)}{dot}{rest}"


PRINTS = re.compile(
    r"print|input|rich\.print\w*|(rich\.console\.)?Console|(rich\.\w+\.)?Text\.from_markup|sys\.__?std(out|err)__?\..*|sys\.std(out|err)\.(?!isatty|close|flush)\w+(\..*)?"
    r"|os\.write|warnings\.warn(_explicit)?|(getpass\.)?getpass|traceback\.print_\w+|faulthandler\.\w+"
    r"|log(ging|ger)\.(debug|info|warning|warn|error|exception|critical|log|getLogger|basicConfig)"
)
"""Calls that write to a terminal, or to a log that may be one."""
STREAM = re.compile(r"sys\.(__)?std(out|err)(__)?")


def printing(source: str) -> list[str]:
    """The calls of a module that write to a terminal by themselves, also by giving one of its streams to another function."""
    found = []
    for node, name in called_names(ast.parse(source)):
        given = [*node.args, *(one.value for one in node.keywords)]
        if PRINTS.fullmatch(name) or any(STREAM.fullmatch(ast.unparse(one)) for one in given):
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(HOUSE)))
def test_only_the_module_terminal_prints(path: Path) -> None:
    if path != HOUSE / "terminal.py":
        assert not printing(path.read_text()), f"{path}: print with whet.terminal"


@pytest.mark.parametrize(
    "source",
    [
        "print(1)", "input('a')", "import rich\nrich.print('a')", "from rich import print as p\np('a')", "sys.stdout.write('a')",
        "from rich.console import Console\nConsole()", "from rich.console import Console as C\nC(stderr=True)", "sys.stderr.write('a')",
        "import rich.console\nrich.console.Console()", "from sys import stderr\nstderr.write('a')", "sys.stderr.buffer.write(b'a')",
        "sys.__stderr__.write('a')", "import warnings as w\nw.warn('a')", "logging.getLogger('a')", "traceback.print_exc()",
        "os.write(2, b'a')", "json.dump({}, sys.stdout)", "f(file=sys.stderr)", "logger.warning('a')", "sys.stdout.writelines([])",
    ],
)  # fmt: skip
def test_the_rule_about_printing_finds(source: str) -> None:
    assert printing(source)


RUNS = re.compile(
    r"eval|exec|compile|__import__|builtins\.\w+|runpy\.\w+|code\.\w+|os\.(system|popen|exec\w*|spawn\w*)"
    r"|(c?pickle|_pickle|cloudpickle|dill|marshal|shelve|joblib|jsonpickle|pickletools)\.(load|loads|open|Unpickler|decode)"
    r"|(\w+\.)*(Unpickler|read_pickle)|(ray\.)?cloudpickle\.loads?"
    r"|yaml\.(load|load_all|full_load\w*|unsafe_load\w*|Loader|UnsafeLoader|FullLoader)"
    r"|importlib\.(import_module|util\.(spec_from\w+|module_from_spec))|(\w+\.)*exec_module|(\w+\.)*load_custom_generate|torch\.hub\.\w+|torch\.jit\.load|torch\.package\.\w+"
)
"""Calls that can run code of what they read."""
MAY_RUN = {
    "registry.py": ("importlib.", "found.loader.exec_module"),  # files and modules that a recipe names
    "conformance.py": ("importlib.import_module",),  # the module that its user names
    "__init__.py": ("importlib.import_module",),  # own modules, on first use
    "methods/__init__.py": ("importlib.import_module",),
    "data/__init__.py": ("importlib.import_module",),
    "errors.py": ("pickle.loads",),  # an error of this process, to see whether it can be sent
    "calling/child.py": (
        "pickle.loads",
    ),  # between the run and the process of a user's function, over a pipe of their own
    "calling/process.py": ("pickle.loads",),
    "sandbox/calls.py": ("exec", "compile"),  # programs and their tests, in a process of a sandbox
    "trackers/accelerate.py": ("importlib.import_module",),  # the packages of its table
}
"""Which calls of RUNS a module may make, by the start of their names, and why."""
UNSAFE = {"weights_only": False, "allow_pickle": True, "trust_remote_code": True, "shell": True}
"""Options with the value that may not stand in the sources: only a recipe says yes."""


def running(source: str, may: tuple[str, ...] = ()) -> list[str]:
    """The calls of a module that could run code of what they read, other than those that start with one of `may`."""
    tree, found = ast.parse(source), []
    for node, name in called_names(tree):
        given = {one.arg: getattr(one.value, "value", ...) for one in node.keywords}
        unsafe = [key for key, value in UNSAFE.items() if given.get(key, ...) is value]
        plain = name == "torch.load" and given.get("weights_only") is not True
        numbers = (
            re.fullmatch(r"(numpy|np)\.(load|lib\.format\.read_array)", name) and given.get("allow_pickle") is not False
        )
        if unsafe or plain or numbers or (RUNS.fullmatch(name) and not name.startswith(may or ("no call",))):
            found.append(f"line {node.lineno}: {name}")
    for node in ast.walk(tree):  # {"trust_remote_code": True} and options["trust_remote_code"] = True
        keys = node.keys if isinstance(node, ast.Dict) else []
        values = list(zip(keys, node.values, strict=True)) if isinstance(node, ast.Dict) else []
        if isinstance(node, ast.Assign):
            values = [(one.slice, node.value) for one in node.targets if isinstance(one, ast.Subscript)]
            values += [(ast.Constant(one.attr), node.value) for one in node.targets if isinstance(one, ast.Attribute)]
        for key, value in values:
            name, said = getattr(key, "value", None), getattr(value, "value", None)
            if (name in UNSAFE and said is UNSAFE[name]) or (
                name == "VLLM_ALLOW_INSECURE_SERIALIZATION" and said != "0"
            ):
                found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(HOUSE)))
def test_nothing_that_is_read_is_unpickled_or_run(path: Path) -> None:
    assert not running(path.read_text(), MAY_RUN.get(str(path.relative_to(HOUSE)), ())), f"{path}: see docs/security.md"


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "exec('1')", "import pickle as p\np.loads(b'')", "from pickle import load\nload(f)", "torch.load('a')",
        "from torch import load\nload('a')", "torch.load('a', weights_only=False)", "torch.load('a', weights_only=flag)",
        "numpy.load('a')", "import numpy as np\nnp.load('a', allow_pickle=True)", "yaml.load('a')", "yaml.unsafe_load('a')",
        "from yaml import full_load\nfull_load('a')", "pandas.read_pickle('a')", "pickle.Unpickler(f)", "marshal.loads(b'')",
        "AutoModel.from_pretrained('a', trust_remote_code=True)", "f({'trust_remote_code': True})", "dill.load(f)",
        "options['trust_remote_code'] = True", "config.trust_remote_code = True", "importlib.import_module(name)",
        "os.environ['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '1'", "subprocess.run('a', shell=True)", "os.system('a')",
        "import cloudpickle\ncloudpickle.loads(b'')", "joblib.load('a')", "torch.hub.load('a')", "model.load_custom_generate('a')",
    ],
)  # fmt: skip
def test_the_rule_about_code_finds(source: str) -> None:
    assert running(source)


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "re.compile('a')", "json.loads('1')", "torch.load('a', weights_only=True)", "yaml.safe_load('a')"],
)
def test_the_rule_about_code_leaves(source: str) -> None:
    assert not running(source)


def test_test_modules_do_not_import_each_other() -> None:
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        shared = [name for name in imported(path) if any(part.startswith("test_") for part in name.split("."))]
        assert not shared, f"{path} imports {shared}; move what is shared to helpers.py"


def test_ops_know_nothing_but_torch() -> None:
    for path in (HOUSE / "ops").glob("*.py"):
        foreign = {name.split(".")[0] for name in imported(path)} - {"torch", "whet", *sys.stdlib_module_names}
        assert not foreign, f"{path}: {foreign}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(HOUSE)))
def test_every_file_has_a_caption_and_every_public_name_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no caption"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def caption(path: Path) -> str:
    lines = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split("\n")
    return " ".join(lines).rstrip(".")


def tree() -> str:
    lines = ["src/whet/"]
    for path in [
        *(p for name in LAYER for p in ([HOUSE / f"{name}.py"] if (HOUSE / f"{name}.py").is_file() else ())),
        *(p for name in LAYER for p in sorted((HOUSE / name).rglob("*.py"))),
    ]:
        inside = path.relative_to(HOUSE)
        if path.name == "__init__.py":
            lines.append(f"{inside.parent}/".ljust(28) + caption(path))
        else:
            lines.append(("  " * (len(inside.parts) - 1) + path.name).ljust(28) + caption(path))
    return "\n".join(lines)


def test_the_tree_in_the_architecture_is_that_of_the_files() -> None:
    found = re.search(r"```\n(src/whet/\n.*?)\n```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    assert found, "ARCHITECTURE.md has no tree; run python tests/test_house.py"
    assert found.group(1) == tree(), "run python tests/test_house.py"


def test_importing_whet_loads_nothing_heavy() -> None:
    code = "import sys, whet; print(sorted({'torch', 'transformers', 'peft', 'numpy', 'pyarrow'} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_public_names_are_what_is_exported() -> None:
    import whet
    import whet.ops

    for module in (whet, whet.ops):
        assert sorted(module.__all__) == list(dict.fromkeys(sorted(module.__all__)))
        for name in module.__all__:
            assert getattr(module, name).__doc__


def test_the_method_of_the_contributing_guide_works_as_it_stands_there() -> None:
    import torch

    from whet.methods import catalogue, compose

    text = (ROOT / "CONTRIBUTING.md").read_text()
    source = re.search(r"```python\n(\"clipped_rloo\".*?)```", text, re.DOTALL)
    assert source
    entry = eval(f"{{{source.group(1)}}}", dict(vars(catalogue)))["clipped_rloo"]
    algorithm = compose.online_of({**entry.slots, "num_generations": 2})
    columns = {
        "token_reward": torch.tensor([[0.0, 1.0], [0.0, 4.0], [2.0, 0.0], [0.0, 0.0]]),
        "group": torch.tensor([0, 0, 1, 1]),
        "mask": torch.tensor([[True, True]] * 3 + [[True, False]]),
    }
    expected = torch.tensor([[-3.0, -3.0], [3.0, 3.0], [2.0, 2.0], [-2.0, 0.0]])
    assert torch.equal(algorithm.advantage(columns), expected)
    assert algorithm.terms[0].loss.columns["ratio"].op.__name__ == "sequence_ratio"


if __name__ == "__main__":
    page = (ROOT / "ARCHITECTURE.md").read_text()
    block = f"```\n{tree()}\n```"
    changed = re.sub(r"```\nsrc/whet/\n.*?\n```|^TREE$", lambda _: block, page, count=1, flags=re.DOTALL | re.MULTILINE)
    (ROOT / "ARCHITECTURE.md").write_text(changed)
