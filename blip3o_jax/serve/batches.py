"""/v1/files and /v1/batches: batch files run beside other calls, whenever nobody else waits."""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import time
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from blip3o_jax.errors import InputError
from blip3o_jax.files import json_object
from blip3o_jax.serve import answers, forms, lines
from blip3o_jax.serve.answers import Refusal
from blip3o_jax.serve.bodies import EDITS, GENERATIONS, FieldError, check_field, error_body
from blip3o_jax.serve.store import CHOICES, MOST_METADATA, OUTPUT, PURPOSES, RESULTS, Store

log = logging.getLogger(__name__)

RUNNING = ("validating", "in_progress", "finalizing", "cancelling")
DAY = 86400  # seconds of the one completion window
AHEAD = 2  # batches of the model whose lines are read before their turn
TICK = 0.5  # seconds between looks for a batch to run

# A line's fields -> the HTTP status and body of its answer, made by the server.
Answer = Callable[[str, str, dict], Awaitable[tuple[int, dict]]]


class Batches:
    """The routes, and a task that works through the batches of a store, the oldest first."""

    def __init__(self, store: Store, answer: Answer, ahead: int):
        self.store, self._answer, self._ahead = store, answer, ahead
        self.is_stopping = False
        self._counts: dict[str, dict] = {}  # of the batch at work
        self._waiting: collections.deque[str] = collections.deque()  # ids, the oldest first

    def routes(self) -> list[Route]:
        """Those of files and batches."""
        return [
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/files", self._list_files),
            Route("/v1/files/{id}", self._file),
            Route("/v1/files/{id}", self._delete_file, methods=["DELETE"]),
            Route("/v1/files/{id}/content", self._content),
            Route("/v1/batches", self._create, methods=["POST"]),
            Route("/v1/batches", self._list_batches),
            Route("/v1/batches/{id}", self._batch),
            Route("/v1/batches/{id}/cancel", self._cancel, methods=["POST"]),
        ]

    # Files.

    async def _upload(self, request: Request) -> Response:
        self._check_state()
        fields = await forms.read_upload(request, lines.MOST_BYTES + (1 << 20))
        purpose = fields.get("purpose")
        check_field(purpose in PURPOSES, "purpose", f"{' or '.join(PURPOSES)}, not {purpose!r}.")
        check_field("file" in fields, "file", "a file, which is missing.")
        for name in sorted(fields.keys() - {"purpose", "file", "filename"}):
            raise FieldError(name, "this field is not served.")
        add = self.store.add_file, fields["file"], fields["filename"], purpose
        return answers.as_json(await asyncio.to_thread(*add))

    async def _list_files(self, request: Request) -> Response:
        return _listed(request, self.store.list("files"), **CHOICES)

    async def _file(self, request: Request) -> Response:
        return answers.as_json(self.store.read("files", request.path_params["id"]))

    async def _delete_file(self, request: Request) -> Response:
        id_ = request.path_params["id"]
        self.store.delete_file(id_)
        return answers.as_json({"id": id_, "object": "file", "deleted": True})

    async def _content(self, request: Request) -> Response:
        path = self.store.file(request.path_params["id"])
        return FileResponse(path, media_type="application/octet-stream")

    # Batches.

    def _check_state(self) -> None:
        if self.is_stopping:
            raise Refusal(503, "The server stops.", "server_error")

    async def _create(self, request: Request) -> Response:
        self._check_state()
        fields = json_object("The body", await forms.read_bytes(request, 1 << 20))
        known = {"input_file_id", "endpoint", "completion_window", "metadata"}
        for name in sorted(fields.keys() - known):
            raise FieldError(name, "this field is not served.")
        # Each field by its own sentence, the file last, since it is on disk.
        endpoint, window = fields.get("endpoint"), fields.get("completion_window")
        known_endpoint = f"{GENERATIONS} or {EDITS}, not {endpoint!r}."
        check_field(endpoint in (GENERATIONS, EDITS), "endpoint", known_endpoint)
        check_field(window == "24h", "completion_window", f'"24h", not {window!r}.')
        metadata = fields.get("metadata") or {}
        is_plain = isinstance(metadata, dict) and len(metadata) <= MOST_METADATA
        is_plain = is_plain and all(isinstance(value, str) for value in metadata.values())
        check_field(is_plain, "metadata", f"up to {MOST_METADATA} texts by name.")
        file_id = fields.get("input_file_id")
        check_field(isinstance(file_id, str), "input_file_id", "the id of a file.")
        file = self.store.read("files", file_id)
        check_field(file["purpose"] == "batch", "input_file_id", "its purpose is not batch.")
        # The file's own lines are looked at when it is this batch's turn.
        now = int(time.time())
        batch = {"id": self.store.new_id("batches"), "object": "batch", "endpoint": endpoint}
        batch |= {"errors": None, "input_file_id": file_id, "completion_window": window}
        batch |= {"status": "validating", "output_file_id": None, "error_file_id": None}
        batch |= {"created_at": now, "expires_at": now + DAY, "metadata": metadata}
        batch |= {"request_counts": {"total": 0, "completed": 0, "failed": 0}}
        self.store.write("batches", batch)
        self._waiting.append(batch["id"])
        return answers.as_json(batch)

    async def _list_batches(self, request: Request) -> Response:
        return _listed(request, [self._shown(batch) for batch in self.store.list("batches")])

    async def _batch(self, request: Request) -> Response:
        return answers.as_json(self._shown(self.store.read("batches", request.path_params["id"])))

    async def _cancel(self, request: Request) -> Response:
        batch = self.store.read("batches", request.path_params["id"])
        if batch["status"] not in RUNNING:
            raise Refusal(409, f"The batch is {batch['status']} already.", param="id")
        self._set(batch, "cancelling")
        return answers.as_json(self._shown(batch))

    def _shown(self, batch: dict) -> dict:
        """With the counts of this moment."""
        counts = self._counts.get(batch["id"])
        return batch | ({"request_counts": dict(counts)} if counts else {})

    def _set(self, batch: dict, status: str, **more: object) -> None:
        batch |= {"status": status, f"{status}_at": int(time.time()), **more}
        self.store.write("batches", batch)

    def _fail(self, id_: str, message: str) -> None:
        errors = {"object": "list", "data": [{"code": "invalid_file", "message": message}]}
        self._set(self.store.read("batches", id_), "failed", errors=errors)

    # The work.

    async def run(self) -> None:
        """Works until the server stops; a batch that it leaves goes on at the next start."""
        # What an earlier process left comes before what is new.
        known = reversed(self.store.list("batches"))
        self._waiting.extend(batch["id"] for batch in known if batch.get("status") in RUNNING)
        while not self.is_stopping:
            if not self._waiting:
                await asyncio.sleep(TICK)
                continue
            id_ = self._waiting.popleft()
            try:
                await self._work(id_)
            except Exception:
                log.exception("The batch %s failed.", id_)
                while not self.is_stopping:
                    try:
                        self._fail(id_, "The server failed; see its log.")
                        break
                    except OSError as error:  # the batches behind it need the disk too
                        log.error("This is not recorded yet: %s.", error)
                        await asyncio.sleep(TICK)
                    except (InputError, Refusal):  # the record itself is damaged or gone
                        break

    async def _work(self, id_: str) -> None:
        # A file that is no batch fails as a whole.
        batch = self.store.read("batches", id_)
        try:
            path = self.store.file(batch["input_file_id"])
            name = self.store.read("files", batch["input_file_id"])["filename"]
            rows = await asyncio.to_thread(lines.read_batch, str(path), name)
        except (InputError, Refusal) as error:
            self._fail(id_, str(error))
            return
        # What an earlier process did is done.
        done = await asyncio.to_thread(self.store.done, id_)
        good = list(done.values()).count(200)
        counts = {"total": len(rows), "completed": good, "failed": len(done) - good}
        self._counts[id_] = counts
        # Somebody may have cancelled it meanwhile.
        batch = self.store.read("batches", id_)
        if batch["status"] == "validating":
            self._set(batch, "in_progress")
        ended = await self._answer_all(batch, [row for row in rows if row[1] not in done], counts)
        if self.is_stopping:
            return
        # The finished part is delivered in any case.
        batch = self.store.read("batches", id_)
        if ended == "completed":
            self._set(batch, "finalizing")
        files = {}
        for kind, field in zip(RESULTS, ("output_file_id", "error_file_id"), strict=True):
            path = self.store.results(id_, kind)
            if path.is_file():
                files[field] = self.store.add_file(path, f"{id_}_{kind}.jsonl", OUTPUT)["id"]
        self._set(batch, ended, request_counts=counts, **files)
        del self._counts[id_]

    async def _answer_all(self, batch: dict, rows: list[tuple], counts: dict) -> str:
        """Answers the lines, some at a time, and gives the status that the batch ends with."""
        places = asyncio.Semaphore(self._ahead)

        # Recorded at once, so that a process that is killed loses no more than is at work.
        async def one(where: str, id_: str, row: dict) -> None:
            try:
                status, body = await self._answer_line(batch, where, id_, row)
            finally:
                places.release()
            # What the end of the process refused is made at the next start.
            if self.is_stopping and status != 200:
                return
            line = json.dumps(lines.result_line(id_, status, body)) + "\n"
            kind, count = ("output", "completed") if status == 200 else ("errors", "failed")
            with self.store.results(batch["id"], kind).open("a", encoding="utf-8") as file:
                file.write(line)
            counts[count] += 1

        # Lines are read shortly before their turn: their pictures are in memory from then on.
        async with asyncio.TaskGroup() as group:
            for row in rows:
                await places.acquire()
                status = self.store.read("batches", batch["id"])["status"]
                if self.is_stopping or status == "cancelling":
                    return "cancelled"
                if time.time() > batch["expires_at"]:
                    return "expired"
                group.create_task(one(*row))
        return "completed"

    async def _answer_line(self, batch: dict, where: str, id_: str, row: dict) -> tuple[int, dict]:
        url = row.get("url")
        if url != batch["endpoint"]:
            sentence = f"{where}: url: {batch['endpoint']}, as the batch, not {url!r}."
            return 400, error_body(sentence, "url")
        return await self._answer(where, id_, row)


def _listed(request: Request, rows: list[dict], **choices: tuple[str, ...]) -> Response:
    """A page of `limit` rows behind the id `after`; others than these have `choices` of values."""
    query = request.query_params
    for name, value in query.items():
        check_field(name in ("limit", "after", *choices), name, "this field is not served.")
        known = choices.get(name, (value,))
        check_field(value in known, name, f"{' or '.join(known)}, not {value!r}.")
    rows = [row for row in rows if query.get("purpose") in (None, row.get("purpose"))]
    rows = rows[::-1] if query.get("order") == "asc" else rows
    limit = query.get("limit", "100")
    is_count = limit.isascii() and limit.isdecimal() and 1 <= int(limit[:6]) <= 10_000
    check_field(is_count, "limit", f"1 to 10000, not {limit!r}.")
    # OpenAI's cursor is the last id of the page before.
    ids = [row["id"] for row in rows]
    after = query.get("after")
    check_field(after is None or after in ids, "after", f"an id of this list, not {after!r}.")
    start = 0 if after is None else ids.index(after) + 1
    page = rows[start : start + int(limit)]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
    has_more = len(rows) > start + len(page)
    return answers.as_json({"object": "list", "data": page, "has_more": has_more, **ends})
