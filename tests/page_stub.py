"""A server for the tests of the page: it answers as the images API does, without a model, and as a
test asks for beforehand."""

import base64
import email.policy
import hashlib
import io
import json
import select
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageDraw

from blip3o_jax.serve.page import PAGE, policy


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "png")
    return data.getvalue()


def drawn(prompt: str, seed: int, index: int) -> bytes:
    """A picture that no other request has."""
    hue = int.from_bytes(hashlib.sha256(f"{prompt}{seed}/{index}".encode()).digest()[:2]) % 360
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse([12, 12, 52, 52], fill=f"hsl({hue}, 80%, 55%)")
    return png(image)


def edited(source: bytes, mask: bytes | None) -> bytes:
    """The source inverted where the mask is transparent."""
    image = Image.open(io.BytesIO(source)).convert("RGB")
    where = Image.new("L", image.size, 0)
    if mask is not None:
        where = Image.open(io.BytesIO(mask)).getchannel("A")
        assert where.size == image.size
    other = image.point(lambda level: 255 - level)
    return png(Image.composite(image, other, where))


class Stub(ThreadingHTTPServer):
    """Serves the page and the API; `requests` are those of images, with their fields."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict] = []
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def reset(self):
        self.requests.clear()
        self.model = "emoji_64"
        self.facts: dict = {}  # more that /v1/models says of it
        self.ready = True
        self.key = ""
        self.refused: set[str] = set()  # fields
        self.failures: list[tuple[int, str]] = []  # (status, message) of the next answers
        self.turns: threading.Semaphore | None = None  # an event of a stream waits for one
        self.cut = False  # the stream ends early
        self.gone = threading.Event()  # the client went away


class _Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes, kind="application/json", **headers: str):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status: int, message: str, param: str | None = None):
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
        headers = {"Retry_After": "5"} if status == 429 else {}
        self.answer(status, json.dumps({"error": error}).encode(), **headers)

    def is_allowed(self) -> bool:
        key = self.server.key
        return not key or self.headers["Authorization"] == f"Bearer {key}"

    def do_GET(self):
        if self.path == "/":
            page = PAGE.read_bytes()
            kind = "text/html; charset=utf-8"
            self.answer(200, page, kind, Content_Security_Policy=policy(page.decode()))
        elif self.path == "/ready":
            self.answer(200 if self.server.ready else 503, b"{}")
        elif self.path == "/v1/models" and self.is_allowed():
            model = {"id": self.server.model, **self.server.facts}
            self.answer(200, json.dumps({"data": [model]}).encode())
        else:
            self.fail(401 if self.path == "/v1/models" else 404, "Give the API key of this server.")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/images/edits":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
            parts = {p.get_param("name", header="content-disposition"): p for p in message.walk()}
            fields = {name: p.get_payload(decode=True) for name, p in parts.items() if name}
            for name in fields.keys() - {"image", "mask"}:
                text = fields[name].decode()
                fields[name] = text if name in ("prompt", "output_format") else json.loads(text)
        else:
            fields = json.loads(body)
        if not self.is_allowed():
            return self.fail(401, "Give the API key of this server.")
        if self.server.failures:
            return self.fail(*self.server.failures.pop(0))
        for name in sorted(self.server.refused & fields.keys()):
            return self.fail(400, f"{name}: this field is not served.", name)
        self.server.requests.append(fields)
        self.send_images(fields)

    def send_images(self, fields: dict):
        if "image" in fields:
            images = [edited(fields["image"], fields.get("mask"))] * fields["n"]
        else:
            prompt, seed = fields["prompt"], fields["seed"]
            images = [drawn(prompt, seed, index) for index in range(fields["n"])]
        data = [{"b64_json": base64.b64encode(image).decode()} for image in images]
        if not fields.get("stream"):
            return self.answer(200, json.dumps({"created": 1, "data": data}).encode())
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        kind = "image_edit" if "image" in fields else "image_generation"
        stream = [": queue 1", ": queue 1", ": queue 0", ": working", ": step 1/4 of image 0"]
        stream += [": step 2/4 of image 0"]
        events = [("partial_image", d) for d in data[: fields.get("partial_images", 0)]]
        events += [("completed", d | {"image_index": index}) for index, d in enumerate(data)]
        for name, event in events:
            event = {"type": f"{kind}.{name}", **event}
            stream.append(f"event: {event['type']}\r\ndata: {json.dumps(event)}")
        try:
            for text in stream[: -1 if self.server.cut else None]:
                self.wait_for_turn()
                # In two pieces, as a network may bring it.
                whole = f"{text}\r\n\r\n".encode()
                for piece in (whole[:-9], whole[-9:]):
                    self.wfile.write(piece)
                    self.wfile.flush()
        except OSError:  # the page is closed
            pass
        self.close_connection = True

    def wait_for_turn(self):
        turns = self.server.turns
        while turns is not None and not turns.acquire(timeout=0.05):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                self.server.gone.set()
                raise ConnectionError
