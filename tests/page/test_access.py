"""The page without a mouse, with a screen reader's eyes, on a phone and in the dark."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
PHONES = {"width": 390, "height": 844}, {"width": 320, "height": 640}


@pytest.fixture
def picture(tmp_path):
    Image.effect_noise((80, 60), 60).convert("RGB").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def focused(page) -> str:
    """The role and name of what has the focus, as a screen reader says them."""
    return page.locator(":focus").aria_snapshot().splitlines()[0]


def tab_to(page, name: str, key="Tab") -> None:
    for _ in range(40):
        page.keyboard.press(key)
        if page.locator(":focus").count() and name in focused(page):
            # Where the focus is must be seen.
            frame = "node.closest('.drop, label:has(> .unseen), .easel, .compare') ?? node"
            outline = f"(node) => getComputedStyle({frame}).outlineStyle"
            assert page.locator(":focus").evaluate(outline) == "solid", name
            return
    raise AssertionError(f"Tab does not lead to {name}.")


def violations(page) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python").__file__
    page.evaluate(Path(axe).with_name("axe.min.js").read_text())
    run = "(values) => axe.run(document, { runOnly: { type: 'tag', values } })"
    found = page.evaluate(run, STANDARDS)["violations"]
    return [f"{v['id']}: {node['html']} {node['any']}" for v in found for node in v["nodes"]]


def test_pictures_are_made_compared_and_saved_with_the_keyboard_alone(page, stub):
    tab_to(page, 'textbox "Prompt"')
    page.keyboard.type("a tree")
    tab_to(page, 'spinbutton "Seed"')
    page.keyboard.type("3")
    tab_to(page, 'button "Generate"')
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Download").wait_for()
    with page.expect_download() as download:
        tab_to(page, 'link "Download"')
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "a-tree-3.png"
    tab_to(page, "Command")
    page.keyboard.press("Enter")
    assert page.locator("pre").is_visible()
    tab_to(page, 'button "Copy"')
    tab_to(page, 'button "Again"', "Shift+Tab")
    page.keyboard.press("Space")
    page.get_by_role("link", name="Download").nth(1).wait_for()
    assert len(stub.requests) == 2


def test_a_picture_is_masked_and_edited_with_the_keyboard_alone(page, stub, picture):
    tab_to(page, "Generate")
    page.keyboard.press("ArrowRight")
    with page.expect_file_chooser() as chooser:
        tab_to(page, "Choose a picture")
        page.keyboard.press("Enter")
    chooser.value.set_files(picture)
    page.locator("#chosen").wait_for()
    tab_to(page, "Change a part only")
    page.keyboard.press("Space")
    tab_to(page, "Mask", "Shift+Tab")
    status = page.get_by_role("status")
    for key in ("ArrowLeft", "ArrowLeft", "Space"):
        page.keyboard.press(key)
    assert status.text_content() == "35 % right, 50 % down, painted"
    page.keyboard.press("ArrowUp")
    assert status.text_content() == "35 % right, 40 % down"
    tab_to(page, 'button "Undo"')
    tab_to(page, 'textbox "Instruction"')
    page.keyboard.type("make it blue")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and small")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Download").wait_for()
    (request,) = stub.requests
    assert request["prompt"] == "make it blue\nand small"
    free = np.asarray(Image.open(io.BytesIO(request["mask"])))[..., 3] == 0
    rows, columns = np.nonzero(free)
    # A dab of 12 pixels round column 28 of 80 and row 30 of 60.
    assert 22 <= columns.min() < columns.mean() + 0.5 == pytest.approx(28, abs=0.3)
    assert 24 <= rows.min() < rows.mean() + 0.5 == pytest.approx(30, abs=0.3)
    tab_to(page, 'slider "Before and after"')
    page.keyboard.press("End")
    assert page.locator(":focus").get_attribute("aria-valuetext") == "100 % before"


def test_a_screen_reader_hears_what_happens_and_only_that(page, stub):
    heard = "window.heard = []; new MutationObserver(() => heard.push(live.textContent))"
    page.evaluate(f"{heard}.observe(live, {{ childList: true }})")
    page.fill("#prompt", "a tree")
    page.press("#prompt", "Enter")
    page.get_by_role("link", name="Download").wait_for()
    page.get_by_text("Done in").wait_for()
    *told, _ = page.evaluate("heard")
    assert told == ["Started: a tree", "Place 2 in the queue", "Place 1 in the queue"]
    stub.failures = [(400, "No.")]
    page.press("#prompt", "Enter")
    page.get_by_text("Failed: No.").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 860}, PHONES[0]], ids=str)
def test_axe_finds_nothing_in_any_state(visit, stub, picture, scheme, viewport):
    page = visit(color_scheme=scheme, viewport=viewport)
    page.locator("#state", has_text="Ready").wait_for()
    assert violations(page) == []
    page.fill("#prompt", "a tree")
    page.fill("#n", "2")
    page.press("#prompt", "Enter")
    page.get_by_role("radio", name="Edit").check(force=True)
    assert violations(page) == []
    page.set_input_files("#file", picture)
    page.check("#masked")
    page.fill("#prompt", "turn it")
    page.press("#prompt", "Enter")
    page.get_by_role("link", name="Download").nth(3).wait_for()
    for summary in page.get_by_text("Command", exact=True).all():
        summary.click()
    stub.failures = [(401, "Give the API key of this server.")]
    page.press("#prompt", "Enter")
    page.get_by_role("button", name="Try again").wait_for()
    assert page.locator("article").count() == 5
    assert violations(page) == []


def test_axe_sees_what_is_wrong(page):
    page.evaluate("document.querySelector('label[for=seed]').remove()")
    page.evaluate("document.body.style.color = '#bbb'")
    found = {line.partition(":")[0] for line in violations(page)}
    assert found >= {"color-contrast"}


@pytest.mark.parametrize("viewport", PHONES, ids=str)
def test_a_phone_shows_all_of_it_and_a_finger_paints(visit, stub, picture, viewport):
    page = visit(viewport=viewport, has_touch=True, is_mobile=True)
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) == 0
    page.fill("#prompt", "a_very_long_word_without_a_space" * 4)
    page.fill("#seed", "4294967295")
    page.press("#prompt", "Enter")
    page.get_by_role("link", name="Download").wait_for()
    # The new picture comes into view below the form.
    seen = "document.querySelector('article').getBoundingClientRect().top + 200 < innerHeight"
    assert page.evaluate(seen)
    page.locator("summary", has_text="Command").click()
    assert page.evaluate(overflow) == 0
    texts = page.locator("article").locator("h3, p, pre, a, button")
    assert texts.evaluate_all("(nodes) => nodes.every((n) => n.scrollWidth <= n.clientWidth)")
    page.get_by_role("radio", name="Edit").check(force=True)
    page.set_input_files("#file", picture)
    page.check("#masked")
    box = page.locator("#mask").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    assert page.evaluate(overflow) == 0
    page.fill("#prompt", "turn it")
    page.press("#prompt", "Enter")
    page.get_by_role("link", name="Download").nth(1).wait_for()
    free = np.asarray(Image.open(io.BytesIO(stub.requests[1]["mask"])))[..., 3] == 0
    assert np.nonzero(free)[1].mean() == pytest.approx(20, abs=1)
