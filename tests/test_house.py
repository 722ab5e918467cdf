"""The house rules of setup.cfg: who may import whom, what `import blip3o_jax` costs, and how long a
file may be."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "blip3o_jax"
MAX_LINES = 435


def contracts() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def imports(source: str, package: str) -> list[tuple[str, bool, int]]:
    """(imported dotted name, whether inside a function, line) of a module in `package`; relative
    imports resolved."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = (
                ".".join([*parents[: len(parents) - node.level + 1], node.module or ""])
                if node.level
                else node.module
            )
            found.extend(
                (f"{base.rstrip('.')}.{alias.name}", inside, node.lineno) for alias in node.names
            )
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def offences(source: str, package: str, room: str, rules: configparser.ConfigParser) -> list[str]:
    """What a module of `room` imports against the contracts."""
    third = rules["third_party_contracts"]
    kind, *rooms = rules["import_contracts"].get(room, "never").split()
    found = []
    for name, inside, line in imports(source, package):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "blip3o_jax" and target != room and (target in rooms) == (kind == "never"):
            found.append(f"line {line}: {room} imports {target}")
        if top in third["never"].split() and room not in third.get(top, "").split():
            found.append(f"line {line}: {top} is never imported by the package")
        if (
            top in third["in_functions"].split()
            and not inside
            and room not in third.get(top, "").split()
        ):
            found.append(f"line {line}: {top} belongs inside a function")
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_module_keeps_its_contract(path):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert offences(path.read_text(), package, room_of(path), contracts()) == []


@pytest.mark.parametrize(
    ("room", "package", "source", "expected"),
    [
        (
            "models",
            "blip3o_jax.models",
            "from blip3o_jax.train import steps",
            "models imports train",
        ),
        (
            "models",
            "blip3o_jax.models",
            "def f():\n    from ..data import x",
            "models imports data",
        ),
        (
            "models",
            "blip3o_jax.models",
            "from . import layers\nfrom .. import config, sample",
            "models imports sample",
        ),
        (
            "models",
            "blip3o_jax.models",
            "from blip3o_jax.models.layers import Linear\nfrom blip3o_jax.config import x",
            None,
        ),
        ("scenes", "blip3o_jax.scenes", "import blip3o_jax.models.qwen3", "scenes imports models"),
        ("scenes", "blip3o_jax.scenes", "import blip3o_jax.text, json", None),
        ("rl", "blip3o_jax.rl", "from blip3o_jax import data", "rl imports data"),
        (
            "sample",
            "blip3o_jax.sample",
            "from blip3o_jax import models, convert",
            "sample imports convert",
        ),
        ("cli", "blip3o_jax", "def f():\n    import torch.nn", "torch is never imported"),
        ("cli", "blip3o_jax", "from tensorflow import io", "tensorflow is never imported"),
        ("reference", "blip3o_jax.reference", "import torch", None),
        ("reference", "blip3o_jax.reference", "import tensorflow", "tensorflow is never imported"),
        (
            "cli",
            "blip3o_jax",
            "import tensorflow_datasets as tfds",
            "tensorflow_datasets belongs inside",
        ),
        ("cli", "blip3o_jax", "if True:\n    import orbax.checkpoint", "orbax belongs inside"),
        ("cli", "blip3o_jax", "def f():\n    import orbax.checkpoint, grain", None),
        ("data", "blip3o_jax.data", "import grain", None),
        ("train", "blip3o_jax.train", "import grain", "grain belongs inside"),
    ],
)
def test_checker_sees_an_offence(room, package, source, expected):
    found = offences(source, package, room, contracts())
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1
        assert expected in found[0]


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules); import blip3o_jax; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new - sys.stdlib_module_names - {'blip3o_jax'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def test_files_stay_short():
    lengths = {
        path: len(path.read_text().splitlines())
        for folder in ("blip3o_jax", "tests", "configs")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES} == {}
