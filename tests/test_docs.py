"""README.md, docs/ and docstrings of configs and launchers: every command parses, every config
builds, all Python compiles.

tests/test_docs_links.py holds links, citations and versions.
"""

import ast
import contextlib
import dataclasses
import io
import re
import shlex
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip3o_jax.cli import build_parser
from blip3o_jax.errors import InputError
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.read_config import read_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted([*(ROOT / "configs").glob("*.py"), *(ROOT / "launch").glob("*.py")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LANGUAGES = ("bash", "python", "javascript", "text")
OPERATORS = {"&&", "||", ";", "|", "&"}
# What the pages may call beside our own commands, and the jobs that take --config.key=value.
PROGRAMS = ("git", "ruff", "cd", "export", "pip", "curl")
CONFIG_JOBS = ("train", "grpo", "data", "plan")
# Beginnings of code spans that are commands.
OURS = (
    *("blip3o-jax ", "bash launch/", "python launch/", "python tests/"),
    *("sbatch launch/", "kubectl "),
)


class BadCommand(Exception):
    """A command in a page that cannot work."""


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Yields (language, text) of every fenced block."""
    for match in FENCE.finditer(page):
        yield match.group(1), match.group(2)


def config_blocks(page: str) -> list[str]:
    """The Python blocks that are configs."""
    return [text for kind, text in blocks(page) if kind == "python" and "def get_config" in text]


def inline_commands(page: str) -> list[list[str]]:
    """Code spans in the text that are commands of ours, as words."""
    spans = SPAN.findall(FENCE.sub("", page))
    return [shlex.split(span) for span in spans if span.startswith(OURS)]


def commands(shell: str) -> list[list[str]]:
    """The commands of a shell block as words, without comments and environment variables."""
    result = []
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in OPERATORS:
                words.append(word)
                continue
            # A command ends here: drop the variables before it.
            while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
                words.pop(0)
            if words:
                result.append(words)
            words = []
    return result


def docstring_commands(docstring: str) -> list[list[str]]:
    """The commands of its paragraphs that begin with one of ours."""
    paragraphs = map(textwrap.dedent, docstring.split("\n\n"))
    return [words for text in paragraphs if text.startswith(OURS) for words in commands(text)]


def check_file(name: str) -> Path:
    path = ROOT / name
    if not path.is_file():
        raise BadCommand(f"{name} does not exist")
    return path


def check_script(name: str, words: list[str]) -> None:
    """The script exists, and its text mentions each of the flags."""
    script = check_file(name)
    source = script.read_text()
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and not re.search(rf"{re.escape(flag)}(?![\w-])", source):
            raise BadCommand(f"{script.name} has no {flag}")


def check_config(name: str, overrides: list[str], folder: Path) -> None:
    """The config builds: a shipped one, or mine.py, which docs/data.md shows."""
    if name == "mine.py":
        (text,) = config_blocks((ROOT / "docs/data.md").read_text())
        path = folder / name
        path.write_text(text)
        name = str(path)
    try:
        read_config(name, overrides)
    except InputError as error:
        raise BadCommand(str(error)) from error


def check_job(words: list[str], folder: Path) -> None:
    """The command line takes what follows blip3o-jax, as cli.main would, and its config builds."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            args, rest = build_parser().parse_known_args(words)
        except SystemExit as stop:
            if stop.code == 0:  # --help
                return
            raise BadCommand(errors.getvalue()) from stop
    overrides = [word for word in rest if word.startswith("--config.") and args.job in CONFIG_JOBS]
    if unknown := [word for word in rest if word not in overrides]:
        raise BadCommand(f"unknown argument {unknown[0]}")
    if getattr(args, "config", None):
        check_config(args.config, overrides, folder)


def check_inline_job(words: list[str]) -> None:
    """The same for a command in the text, which may leave out what is required."""
    parser = build_parser()
    while words and parser._subparsers:
        (action,) = parser._subparsers._group_actions
        if words[0].isupper():  # JOB, in general
            return
        if words[0] not in action.choices:
            raise BadCommand(f"no job {words[0]!r}")
        parser, words = action.choices[words[0]], words[1:]
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in parser._option_string_actions:
            raise BadCommand(f"unknown argument {flag}")


def check_command(words: list[str], folder: Path, inline: bool = False) -> None:
    """Raises BadCommand when a command names a file, job, option or config that does not exist."""
    program, *rest = words
    if program == "blip3o-jax" and inline:
        check_inline_job(rest)
    elif program == "blip3o-jax":
        check_job(rest, folder)
    elif words[:2] == ["source", ".venv/bin/activate"]:
        return
    elif program == "sbatch":
        # Its own options, the script, and a job of ours.
        script = next((i for i, word in enumerate(rest) if not word.startswith("--")), 0)
        check_file(rest[script])
        check_job(rest[script + 1 :], folder)
    elif program in ("bash", "source") or (program == "python" and rest[0] != "-m"):
        # Behind -- a launcher is given a job of ours.
        end = rest.index("--") if "--" in rest else len(rest)
        check_script(rest[0], rest[1:end])
        if rest[end + 1 :]:
            check_job(rest[end + 1 :], folder)
    elif program == "kubectl":
        check_file(rest[rest.index("-f") + 1])
    elif words[:3] == ["python", "-m", "pytest"]:
        for word in words[3:]:
            if word.startswith("tests/") and not (ROOT / word.partition("::")[0]).exists():
                raise BadCommand(f"{word} does not exist")
    elif words[:3] != ["python", "-m", "pip"] and program not in PROGRAMS:
        raise BadCommand(f"{program} is not a command that the pages may use")


def unknown_keys(text: str) -> list[str]:
    """Keys in the pages' tables of config keys that a run's config does not have."""
    unknown = []
    for table in re.findall(r"^\| (?:config )?key \|.*\n(?:\|.*\n)+", text, re.MULTILINE):
        keys = [key for line in table.splitlines()[2:] for key in SPAN.findall(line.split("|")[1])]
        for key in keys:
            cls: typing.Any = TrainConfig
            for name in key.split("."):
                if not dataclasses.is_dataclass(cls) or name not in typing.get_type_hints(cls):
                    unknown.append(key)
                    break
                cls = typing.get_type_hints(cls)[name]
                cls = next(iter(typing.get_args(cls)), cls)  # of an optional section
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_works(page, tmp_path):
    text = page.read_text()
    for language, block in blocks(text):
        assert language in LANGUAGES, f"a block of {page.name} has no language that is checked"
        if language == "bash":
            for words in commands(block):
                check_command(words, tmp_path)
    for words in inline_commands(text):
        check_command(words, tmp_path, inline=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_command_of_a_docstring_works(path, tmp_path):
    found = docstring_commands(ast.get_docstring(ast.parse(path.read_text())))
    assert found or path.stem == "common"
    for words in found:
        check_command(words, tmp_path)


def test_a_command_that_goes_on_needs_a_backslash(tmp_path):
    text = "Converts.\n\n    blip3o-jax convert to-jax a{}\n        --ar b --dit c\n\nNo."
    (words,) = docstring_commands(text.format(" \\"))
    check_command(words, tmp_path)
    _, rest = docstring_commands(text.format(""))
    with pytest.raises(BadCommand, match="--ar is not a command"):
        check_command(rest, tmp_path)


def test_commands_are_read_from_the_pages():
    texts = [page.read_text() for page in PAGES]
    shells = [block for text in texts for kind, block in blocks(text) if kind == "bash"]
    words = [command for shell in shells for command in commands(shell)]
    jobs = {command[1] for command in words if command[0] == "blip3o-jax"}
    expected = {"generate", "evaluate", "train", "grpo", "convert", "data", "plan", "bench"}
    assert jobs >= expected
    assert len(words) > 50
    assert sum(len(inline_commands(text)) for text in texts) > 5


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        (
            "A=1 B=2 blip3o-jax bench --repeats 3  # long",
            [["blip3o-jax", "bench", "--repeats", "3"]],
        ),
        (
            "source a.env; ruff x && bash b.sh",
            [["source", "a.env"], ["ruff", "x"], ["bash", "b.sh"]],
        ),
        ("blip3o-jax generate 'a b' \\\n -x y", [["blip3o-jax", "generate", "a b", "-x", "y"]]),
    ],
)
def test_shell_is_read(shell, expected):
    assert commands(shell) == expected


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("blip3o-jax paint 'a cat'", "invalid choice"),
        ("blip3o-jax generate 'a cat' --stesp 3", "unknown argument --stesp"),
        ("blip3o-jax generate 'a cat' --seed one", "invalid int"),
        ("blip3o-jax generate 'a cat' --config.seed=1", "unknown argument --config.seed"),
        ("blip3o-jax train --config emoji_joint", "required: --workdir"),
        ("blip3o-jax train --config emoji_jiont --workdir x", "did you mean 'emoji_joint'"),
        ("blip3o-jax train --config emoji_joint:v5e:4x4 --workdir x", "same on all topologies"),
        ("blip3o-jax train --config mine.py --workdir x --config.data.cahce=y", "'cache'"),
        ("bash launch/start.sh", "does not exist"),
        ("bash launch/test.sh --every", "has no --every"),
        ("python tests/train/equal_meshes.py --step 3", "has no --step"),
        ("bash launch/tpu_vm.sh --name N -- train --config emoji_joint", "required: --workdir"),
        ("kubectl apply -f launch/gke.yml", "does not exist"),
        ("sbatch --array=0-7 launch/slurm.sh generate cat", "does not exist"),
        ("sbatch --array=0-7 launch/slurm.sbatch generate cat --otu x", "unknown argument --otu"),
        ("sbatch launch/slurm.sbatch pretrain_3b /runs/a", "invalid choice"),
        ("python -m pytest tests/test_nothing.py", "does not exist"),
        ("make test", "not a command"),
    ],
)
def test_a_bad_command_is_seen(command, reason, tmp_path):
    (words,) = commands(command)
    with pytest.raises(BadCommand, match=re.escape(reason)):
        check_command(words, tmp_path)


@pytest.mark.parametrize(
    "command", ["blip3o-jax paint", "blip3o-jax convert to-tf", "blip3o-jax plan --no-such"]
)
def test_a_bad_inline_command_is_seen(command, tmp_path):
    (words,) = inline_commands(f"Use `{command}` here.")
    with pytest.raises(BadCommand):
        check_command(words, tmp_path, inline=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_compiles_and_configs_build(page, tmp_path):
    for language, text in blocks(page.read_text()):
        if language == "python":
            ast.parse(text)
    for number, text in enumerate(config_blocks(page.read_text())):
        path = tmp_path / f"config_{number}.py"
        path.write_text(text)
        read_config(str(path), [])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_config_keys_exist(page):
    assert unknown_keys(page.read_text()) == []


def test_an_unknown_config_key_is_seen():
    rows = [
        "| config key | |",
        "|---|---|",
        "| `guard.spike`, `guard.spkie` | x |",
        "| `rmat` | y |",
    ]
    table = "\n".join([*rows, ""])
    assert unknown_keys(table) == ["guard.spkie", "rmat"]
