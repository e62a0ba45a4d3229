"""The house holds its own rules: imports only go down, every file has its caption, light imports stay light, docs are true.

`python tests/test_house.py` writes the tree of captions into ARCHITECTURE.md.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "src" / "whet"
LAYERS = (
    ("terminal",), ("errors",), ("registry",), ("ops",), ("data",), ("methods",), ("distributed", "http", "processes"), ("models",),
    ("generate", "rewards", "feedback", "learner", "trackers"), ("cluster",), ("loops",), ("planning", "view"), ("runs",),
    ("demo", "conformance"), ("cli",),
)  # fmt: skip
"""From the bottom up. A module imports from its own package and from layers below its own, never from another package of its layer."""
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
HEAVY = {
    "transformers": {"models", "generate", "demo"}, "peft": {"models"}, "pyarrow": {"data", "loops"}, "datasets": {"data"},
    "matplotlib": {"view"}, "jinja2": {"data", "view"}, "yaml": {"cli", "runs"}, "rich": {"terminal", "loops", "demo"},
    "accelerate": {"trackers"}, "tokenizers": {"demo"}, "safetensors": {"models", "learner", "generate"},
    "vllm": {"generate"}, "deepspeed": {"learner"}, "ray": {"cluster"},
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
