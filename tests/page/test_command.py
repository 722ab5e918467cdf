"""The command that the page shows beside an image: a shell and the command line read from it what
the server was asked."""

import os
import subprocess

import pytest

from blip3o_jax import cli

PROMPTS = (
    "two red hearts",
    "hearts",
    'it\'s "here"',
    "costs $HOME, `id` $(id) ${x} and 100%",
    "back\\slash at the end\\",
    "two\nlines\n\nand 'a' third",
    "stop! hearts!!",
    "-5 degrees",
    "--out=x.png",
    "--",
    "~/tilde *.png [a-z]? # no; comment & more | <less>",
    "赤いハート 💗 ÄÖ",
    "=equal",
    "a\ttab",
)


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """A function that gives the words that our program gets from a line in a shell."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "blip3o-jax").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (folder / "blip3o-jax").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"

    def words(command: str, *program: str) -> list[str]:
        done = subprocess.run(
            program, input=f"{command}\n", env={"PATH": path}, capture_output=True, text=True
        )
        return done.stdout.split("\0")[:-1]

    return words


def command_of(page, **request) -> str:
    request = {"mode": "generate", "seed": 7, "steps": 30, "scale": 2, "n": 1} | request
    return page.evaluate("(request) => commandOf(request)", request)


# An interactive bash also looks for ! in what is typed.
@pytest.mark.parametrize("program", [["bash"], ["sh"], ["bash", "--norc", "-i"]], ids=" ".join)
def test_a_shell_reads_the_prompt_as_it_was(page, shell, program):
    for prompt in PROMPTS:
        command = command_of(page, prompt=prompt, seed=4294967295, steps=12, scale=2.5)
        if "\t" in prompt and "-i" in program:
            continue  # typed, a tab would ask for completion
        args = cli.parse(shell(command, *program))
        assert args.job == "generate"
        assert args.prompt == [prompt]
        assert (args.seed, args.num_inference_steps, args.guidance_scale) == (4294967295, 12, 2.5)
        assert (args.num_images, args.checkpoint) == (1, "emoji_64")
        assert args.out.endswith("-4294967295.png")


@pytest.mark.parametrize(
    "name", ["hearts.png", 'my cat\'s "best" $5.jpg', "-v.png", "a-tree-7.jpg"]
)
def test_an_edit_names_its_source_and_another_result(page, shell, name):
    request = {"mode": "edit", "source": {"name": name}, "scale": 1}
    for prompt in PROMPTS:
        args = cli.parse(shell(command_of(page, prompt=prompt, **request), "bash"))
        source, instruction = args.words
        assert source == ("./-v.png" if name == "-v.png" else name)
        assert instruction == prompt
        assert args.guidance_scale == 1
    args = cli.parse(shell(command_of(page, prompt="a tree", **request), "bash"))
    assert args.out == ("edited-a-tree-7.png" if name == "a-tree-7.jpg" else "a-tree-7.png")


@pytest.mark.parametrize(
    ("model", "checkpoint"),
    [
        ("emoji_64", "emoji_64"),
        ("my @model", "my @model"),
        ("my model@0123456789ab", "my model"),
        ("mine/500", "mine@500"),
    ],
)
def test_the_checkpoint_is_the_servers(visit, stub, shell, model, checkpoint):
    stub.model = model
    page = visit()
    page.locator("#model", has_text=model.removesuffix("@0123456789ab")).wait_for()
    args = cli.parse(shell(command_of(page, prompt="a tree"), "bash"))
    assert args.checkpoint == checkpoint


def test_several_images_are_one_command_that_says_which_file_is_which(page, shell):
    page.fill("#prompt", "Two RED hearts!")
    page.fill("#n", "3")
    page.fill("#seed", "7")
    page.press("#prompt", "Enter")
    page.get_by_role("link", name="Download").nth(2).wait_for()
    for index in range(3):
        card = page.locator("article").nth(index)
        card.get_by_text("Command", exact=True).click()
        args = cli.parse(shell(card.locator("pre").text_content(), "bash"))
        assert (args.num_images, args.out) == (3, "two-red-hearts-7")
        note = f"It makes 3 images; this one is 00000-{index}-two-red-hearts.png."
        assert card.get_by_text(note).is_visible()


def test_file_names_are_those_that_the_job_writes(page):
    from blip3o_jax.jobs.images import file_name

    for prompt in (*PROMPTS, "word " * 40, "x" * 59 + " - y"):
        assert file_name(prompt, 0, 1) == f"00000-1-{page.evaluate('slug', prompt)}.png"


def test_copy_puts_the_command_on_the_clipboard(visit, stub):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.fill("#prompt", "a $5 tree")
    page.press("#prompt", "Enter")
    page.get_by_text("Command", exact=True).click()
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.locator("pre").text_content()
    assert copied.startswith("blip3o-jax generate 'a $5 tree' \\\n  --seed ")
