"""The page of a real server in a real browser: its images are those of the model."""

import shlex

import numpy as np
import pytest
from browsing import chromium
from PIL import Image

from blip3o_jax.cli import main
from blip3o_jax.request import Request
from blip3o_jax.sample.settings import EditSettings, Settings


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser, served):
    context = browser.new_context()
    context.set_default_timeout(60_000)
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(served.url)
    page.locator("#state.ready").wait_for()
    yield page
    context.close()
    assert problems == []


def ask(page, prompt: str, count: int, **fields: object) -> None:
    """Starts it, and waits for so many cards on the sheet."""
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.get_by_role("link", name="Download").nth(count - 1).wait_for()
    page.locator("progress").wait_for(state="detached")


def saved(card, path) -> np.ndarray:
    """The pixels of what Download saves."""
    with card.page.expect_download() as download:
        card.get_by_role("link", name="Download").click()
    download.value.save_as(path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_the_page_gives_the_models_own_images(page, plain, tmp_path):
    ask(page, "two red\nhearts", 3, seed=7, n=3, steps=3, scale=2.5)
    how = {"seed": 7, "settings": Settings(num_inference_steps=3, guidance_scale=2.5)}
    requests = [Request("two red\nhearts", index=index, **how) for index in range(3)]
    for sample in plain.run(requests):
        card = page.locator("article", has_text=f"image {sample.request.index + 1} of 3")
        np.testing.assert_array_equal(saved(card, tmp_path / "image.png"), sample.image)


def test_a_mask_painted_on_the_page_keeps_the_rest_there_and_by_the_command(
    page, plain, folder, tmp_path, monkeypatch
):
    source = np.asarray(Image.effect_noise((30, 20), 60).convert("RGB"))
    Image.fromarray(source).save(tmp_path / "source.png")
    page.get_by_role("radio", name="Edit").check(force=True)
    page.set_input_files("#file", tmp_path / "source.png")
    page.check("#masked")
    page.focus("#mask")
    page.keyboard.press("Space")
    ask(page, "make it\nblue", 1, seed=5, steps=3)
    image = saved(page.locator("article"), tmp_path / "edited.png")
    settings = EditSettings(num_inference_steps=3)
    (sample,) = plain.run([Request("make it\nblue", (source,), seed=5, settings=settings)])
    is_kept = (image == source).all(-1)
    np.testing.assert_array_equal(image[~is_kept], sample.image[~is_kept])
    # A dab of 4 pixels in the middle has 12 of them, and hardly one is as it was.
    assert 8 <= (~is_kept).sum() <= 16
    assert not is_kept[9:11, 14:16].any()
    # Beside the result stand its mask and the command that makes it once more.
    page.get_by_text("Command").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Save mask").click()
    download.value.save_as(tmp_path / download.value.suggested_filename)
    words = shlex.split(page.locator("pre").text_content().replace("\\\n", ""))
    (tmp_path / "tiny").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("blip3o_jax.jobs.work.load_for", lambda _: plain)
    assert main(words[1:]) == 0
    made = np.asarray(Image.open("make-it-blue-5.png"))
    np.testing.assert_array_equal(made, image)
