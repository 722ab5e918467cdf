"""The page in a real browser: what it asks the server for, and what it shows of the answers."""

import base64
import io
import re
import threading

import numpy as np
import page_stub
import pytest
from PIL import Image

from blip3o_jax.errors import MAX_SEED
from blip3o_jax.sample.settings import EditSettings, Settings
from blip3o_jax.serve.bodies import MOST_IMAGES

expect = pytest.importorskip("playwright.sync_api").expect
SOURCE = Image.effect_noise((96, 64), 60).convert("RGB")


@pytest.fixture
def picture(tmp_path):
    SOURCE.save(tmp_path / "photo one.png")
    return tmp_path / "photo one.png"


def start(page, prompt, **fields):
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.press("#prompt", "Enter")


def shown(page, number=0, which="") -> np.ndarray:
    """The pixels of a picture on the sheet."""
    image = page.locator("article").nth(number).locator(f"figure img{which}")
    code = """async (image) => {
      await image.decode();
      const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      const { data, width, height } = context.getImageData(0, 0, canvas.width, canvas.height);
      return { pixels: [...data], shape: [height, width, 4] };
    }"""
    given = image.evaluate(code)
    return np.array(given["pixels"], np.uint8).reshape(given["shape"])[..., :3]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def facts(page, number=0) -> str:
    return page.locator("article").nth(number).locator("p").first.text_content()


def results(page, count):
    page.get_by_role("link", name="Download").nth(count - 1).wait_for()
    page.locator("progress").wait_for(state="detached")
    assert page.locator("article").count() == count


def mask_of(request) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(request["mask"])))


def choose(page, picture):
    page.get_by_role("radio", name="Edit").check(force=True)
    page.set_input_files("#file", picture)
    page.locator("#chosen").wait_for()


def test_a_prompt_becomes_pictures_in_the_servers_own_bytes(page, stub, tmp_path):
    start(page, " two red\nhearts ", seed=7, n=2, steps=12, scale=3.5)
    results(page, 2)
    fields = {"prompt": "two red\nhearts", "n": 2, "seed": 7, "num_inference_steps": 12}
    fields |= {"guidance_scale": 3.5, "output_format": "png", "stream": True, "partial_images": 2}
    assert stub.requests == [fields]
    for index in range(2):
        expected = page_stub.drawn("two red\nhearts", 7, index)
        assert (shown(page, index) == pixels(expected)).all()
        text = f"Seed 7 · 12 steps · scale 3.5 · image {index + 1} of 2 · "
        assert facts(page, index).startswith(text)
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").nth(index).click()
        assert download.value.suggested_filename == f"two-red-hearts-7-{index + 1}.png"
        download.value.save_as(tmp_path / "saved.png")
        assert (tmp_path / "saved.png").read_bytes() == expected


def test_again_takes_another_seed_and_nothing_else(page, stub):
    start(page, "a tree")
    results(page, 1)
    page.get_by_role("button", name="Again").click()
    results(page, 2)
    first, second = stub.requests
    assert first["seed"] != second["seed"]
    assert first | {"seed": 0} == second | {"seed": 0}
    newest = facts(page, 0)
    assert newest.startswith(f"Seed {second['seed']} ·")


def test_the_page_shows_the_place_in_the_queue_the_step_and_what_is_there_so_far(page, stub):
    stub.turns = threading.Semaphore(0)
    start(page, "a tree", seed=1)
    article = page.locator("article")
    bar = article.get_by_role("progressbar")
    for words, share in (
        ("Place 2 in the queue", None),
        ("Place 2 in the queue", None),
        ("Place 1 in the queue", None),
        ("Place 1 in the queue", None),
        ("Step 1 of 4", 1 / 4),
        ("Step 2 of 4", 2 / 4),
    ):
        stub.turns.release()
        article.get_by_text(words).wait_for()
        assert (
            bar.evaluate("(bar) => bar.hasAttribute('value') ? bar.value / bar.max : null") == share
        )
    stub.turns.release()
    article.get_by_alt_text("Unfinished picture").wait_for()
    assert (shown(page) == pixels(page_stub.drawn("a tree", 1, 0))).all()
    stub.turns.release()
    results(page, 1)
    assert "Done in" in page.get_by_role("status").text_content()


@pytest.mark.parametrize("refused", [{"partial_images"}, {"stream"}, {"stream", "partial_images"}])
def test_what_a_server_does_not_offer_is_not_asked_again(page, stub, refused):
    stub.refused = refused
    for number in range(2):
        start(page, f"tree {number}", n=3)
        results(page, 3 * number + 3)
    asked = [request.keys() & {"stream", "partial_images"} for request in stub.requests]
    assert asked == [set() if "stream" in refused else {"stream"}] * 2
    assert page.get_by_text("this field is not served").count() == 0


def test_an_error_is_the_servers_sentence_as_text(page, stub):
    sentence = "The queue is full: <b>64</b> requests wait."
    stub.failures = [(429, sentence)]
    start(page, "a <i>tree</i>", seed=5)
    page.locator("article").get_by_text(f"{sentence} Try again in 5 s.").wait_for()
    assert page.locator("article b, article i, article figure").count() == 0
    page.get_by_role("button", name="Try again").click()
    results(page, 1)
    assert [request["seed"] for request in stub.requests] == [5]


def test_a_stream_that_ends_early_is_an_error(page, stub):
    stub.cut = True
    start(page, "a tree", n=2)
    page.locator("article").get_by_text("The server sent 1 of 2 images.").wait_for()
    assert page.get_by_role("link", name="Download").count() == 1
    page.get_by_role("button", name="Dismiss").click()
    results(page, 1)


def test_the_key_is_asked_for_sent_and_not_stored(page, stub):
    stub.key = "a-secret"
    start(page, "a tree", seed=1)
    page.get_by_role("button", name="Try again").wait_for()
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("a-secret\t")
    page.get_by_role("button", name="Try again").click()
    results(page, 1)
    stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
    assert stored == [0, 0, ""]
    page.reload()
    assert page.input_value("#key") == ""


def test_cancel_leaves_the_servers_queue(page, stub):
    stub.turns = threading.Semaphore(7)
    start(page, "a tree", n=10)
    page.get_by_alt_text("Unfinished picture").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.locator("article").wait_for(state="detached")
    assert stub.gone.wait(60)
    assert page.evaluate("document.activeElement.id") == "results"


def test_a_server_that_compiles_or_is_gone_is_named(page, stub):
    stub.ready = False
    page.reload()
    page.locator("#state", has_text="Compiling").wait_for()
    stub.ready = True
    page.locator("#state", has_text="Ready").wait_for()
    page.route("**/v1/images/*", lambda route: route.abort())
    start(page, "a tree")
    page.locator("article").get_by_text("The server does not answer.").wait_for()


def test_an_edit_sends_the_file_itself_and_compares(page, stub, picture):
    choose(page, picture)
    start(page, "turn it", seed=2)
    results(page, 1)
    (request,) = stub.requests
    assert request["image"] == picture.read_bytes()
    sampling = {"num_inference_steps": 30, "guidance_scale": 1, "seed": 2, "n": 1}
    assert request == request | sampling | {"prompt": "turn it"}
    assert "mask" not in request
    assert (shown(page, which=":not(.after)") == np.asarray(SOURCE)).all()
    assert (shown(page, which=".after") == 255 - np.asarray(SOURCE)).all()
    slider = page.get_by_role("slider", name="Before and after")
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 9)
    for key, inset in (("", 50), ("End", 100), ("Home", 0), ("ArrowRight", 1)):
        if key:
            page.keyboard.press(key)
        clip = page.locator(".after").evaluate("(image) => getComputedStyle(image).clipPath")
        assert clip == f"inset(0px 0px 0px {inset}%)"
        assert slider.get_attribute("aria-valuetext") == f"{inset} % before"


def test_the_brush_paints_erases_and_is_undone_in_the_pictures_own_pixels(page, stub, picture):
    choose(page, picture)
    page.check("#masked")
    page.fill("#size", "25")  # of 64 rows: 16 pixels
    box = page.locator("#mask").bounding_box()
    scale = box["width"] / 96

    def drag(*points):
        for number, (x, y) in enumerate(points):
            page.mouse.move(box["x"] + x * scale, box["y"] + y * scale)
            if number == 0:
                page.mouse.down()
        page.mouse.up()

    drag((20, 32), (70, 32))
    drag((48, 60))
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("radio", name="Erase").check(force=True)
    drag((48, 32))
    start(page, "turn it", seed=9)
    results(page, 1)
    mask = mask_of(stub.requests[0])
    assert mask.shape == (64, 96, 4)
    y, x = np.mgrid[:64, :96] + 0.5
    stroke = np.hypot(np.clip(np.abs(x - 45) - 25, 0, None), y - 32)
    hole = np.hypot(x - 48, y - 32)
    free = (stroke < 7) & (hole > 9)
    kept = (stroke > 9) | (hole < 7)
    assert (mask[free] == 0).all()
    assert (mask[kept] == (0, 0, 0, 255)).all()
    assert free.sum() > 400
    page.get_by_role("button", name="Clear").click()
    start(page, "turn it")
    results(page, 2)
    assert "mask" not in stub.requests[1]
    # What was sent is saved under the name that the command has for it.
    assert page.locator("pre", has_text="--within").count() == 1
    assert "--within turn-it-9-mask.png" in page.locator("pre").last.text_content()
    page.get_by_text("Command").last.click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Save mask").click()
    assert download.value.suggested_filename == "turn-it-9-mask.png"
    assert download.value.path().read_bytes() == stub.requests[0]["mask"]


def test_a_result_is_edited_further(page, stub):
    start(page, "a tree", seed=4)
    results(page, 1)
    page.get_by_role("button", name="Edit").last.click()
    page.locator("#chosen").wait_for()
    assert page.evaluate("document.activeElement.id") == "prompt"
    start(page, "make it blue", seed=5)
    results(page, 2)
    assert stub.requests[1]["image"] == page_stub.drawn("a tree", 4, 0)
    assert "blip3o-jax edit a-tree-4.png" in page.locator("pre").first.text_content()
    page.get_by_role("radio", name="Generate").check(force=True)
    assert page.input_value("#prompt") == "a tree"


def test_pictures_are_dropped_and_pasted(page, stub, picture):
    data = base64.b64encode(picture.read_bytes()).decode()
    code = """([data, name]) => {
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
      const options = { bubbles: true, cancelable: true };
      document.body.dispatchEvent(name === "drop"
        ? new DragEvent(name, { ...options, dataTransfer: transfer })
        : new ClipboardEvent(name, { ...options, clipboardData: transfer }));
    }"""
    for event in ("drop", "paste"):
        page.reload()
        page.evaluate(code, [data, event])
        page.locator("#chosen").wait_for()
        start(page, event)
        results(page, 1)
        assert stub.requests.pop()["image"] == picture.read_bytes()


def test_what_cannot_be_sent_is_said_at_its_field(page, stub, tmp_path):
    start(page, "  ")
    assert page.evaluate("document.activeElement.validationMessage") == "Say it in words."
    start(page, "a tree", steps=1001)
    assert page.evaluate("document.activeElement.id") == "steps"
    page.fill("#steps", "30")
    page.get_by_role("radio", name="Edit").check(force=True)
    start(page, "turn it")
    assert page.get_by_role("alert").text_content() == "Choose a picture first."
    (tmp_path / "notes.png").write_text("no picture")
    page.set_input_files("#file", tmp_path / "notes.png")
    page.get_by_text("This browser cannot show notes.png.").wait_for()
    assert stub.requests == []


def test_fields_have_the_command_lines_defaults_and_limits(page):
    for mode, settings in (("Generate", Settings()), ("Edit", EditSettings())):
        page.get_by_role("radio", name=mode, exact=True).check(force=True)
        assert float(page.input_value("#steps")) == settings.num_inference_steps
        assert float(page.input_value("#scale")) == settings.guidance_scale
    limits = {"seed": (0, MAX_SEED), "n": (1, MOST_IMAGES)}
    fields = Settings.__dataclass_fields__
    for name, field in (("steps", "num_inference_steps"), ("scale", "guidance_scale")):
        limits[name] = fields[field].metadata["limits"]
    for name, (least, most) in limits.items():
        field = page.locator(f"#{name}")
        assert (field.get_attribute("min"), field.get_attribute("max")) == (str(least), str(most))


FEW = {"num_inference_steps": 4, "guidance_scale": 2.0}
FACTS = {"few_steps": 4, "defaults": {"generate": FEW, "edit": FEW | {"guidance_scale": 1.0}}}


def test_fields_take_over_the_models_own_defaults(visit, stub):
    stub.facts = FACTS
    page = visit()
    for mode, scale in (("Edit", "1"), ("Generate", "2")):
        page.get_by_role("radio", name=mode, exact=True).check(force=True)
        expect(page.locator("#steps")).to_have_value("4")
        assert page.input_value("#scale") == scale
    assert page.locator("#scale").get_attribute("min") == "1"
    start(page, "a tree", seed=1)
    results(page, 1)
    assert stub.requests[0] == stub.requests[0] | FEW
    assert "image_guidance_scale" not in stub.requests[0]
    # What somebody wrote stays when a model is read again, and so does what he was at.
    page.fill("#steps", "7")
    page.fill("#prompt", "two")
    page.evaluate("(defaults) => setDefaults(defaults)", {"generate": {**FEW, "guidance_scale": 5}})
    fields = [page.input_value(f"#{name}") for name in ("prompt", "steps", "scale")]
    assert fields == ["two", "7", "5"]


def test_a_model_of_few_steps_is_guided_by_one_scale(visit, stub, picture):
    stub.facts = FACTS
    page = visit()
    expect(page.locator("#steps")).to_have_value("4")
    choose(page, picture)
    start(page, "turn it", scale=3)
    results(page, 1)
    (request,) = stub.requests
    assert request["guidance_scale"] == request["image_guidance_scale"] == 3
    command = page.locator("article pre").text_content()
    assert "--guidance-scale 3 \\\n  --image-guidance-scale 3 \\\n" in command


def test_the_file_needs_no_other_and_no_markup_from_a_server():
    text = page_stub.PAGE.read_text()
    addresses = set(re.findall(r"\w+://[^\s\"']+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of SVG, not a place
    assert not re.search(r"\s(?:on\w+|style)=", text.partition("<script>")[0])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
