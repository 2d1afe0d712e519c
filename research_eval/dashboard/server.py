"""The server of the pages: answers for JSON, static files, and the rules that keep other machines and pages out.

It reads only. By default it listens on 127.0.0.1, and answers to the names of this machine alone.
"""

from __future__ import annotations

import gzip
import hmac
import json
import logging
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from research_eval.dashboard import atlas, queries
from research_eval.dashboard.probe import Busy, Probe, Probes
from research_eval.dashboard.study import Studies
from research_eval.errors import ConfigError
from research_eval.files import ID_LETTERS
from research_eval.store.store import Store

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Route
except ImportError as missing:
    raise ConfigError("goe dashboard: needs two packages: pip install 'graph-of-experts[dashboard]'") from missing

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
COOKIE, TOKEN_HEADER = "goe_token", "x-goe-page"
MAX_BODY = 10_000
FEWEST_ZIPPED = 1_000
PAGES = ("/", "/runs", "/compare", "/run/{name}", "/study/{name}", "/atlas/{name}")


@dataclass
class Options:
    """What the command wants of the server."""

    db: str | None = None
    host: str = "127.0.0.1"
    port: int = 8123
    allow_probes: bool = False
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK

    @property
    def has_probes(self) -> bool:
        """Whether evaluations may be asked for."""
        return self.is_local or self.allow_probes

    @property
    def names(self) -> frozenset[str]:
        """The names under which the server may be called."""
        return frozenset({*LOOPBACK, self.host, socket.gethostname()} - {"0.0.0.0", "::"})  # noqa: S104 - taken out


Answer = Callable[[Request], Any]


class Pages:
    """The answers of the server, from results that stay open: to open them takes as long as to read a list."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.page_token = secrets.token_urlsafe(24)  # a page of another site does not know it
        self._opened: Store | None = None
        self._opening = threading.Lock()
        self.histories = queries.Histories(self._store)
        self.probes, self.studies = Probes(options.db), Studies()
        self._store()  # a database that is not there is one message, before the server listens

    def _store(self) -> Store:
        """The results; opened again if another file lies at their place."""
        with self._opening:
            if self._opened is None or not self._opened.is_current:
                self._opened = Store(self.options.db, read_only=True)
            return self._opened

    def app(self) -> Starlette:
        """The application."""
        answers: dict[str, Answer] = {
            "/api/choices": self._choices,
            "/api/columns": self._columns,
            "/api/runs": self._runs,
            "/api/groups": self._groups,
            "/api/compare": self._compare,
            "/api/run/{name}": self._run,
            "/api/run/{name}/history": self._history,
            "/api/run/{name}/atlas": self._epochs,
            "/api/run/{name}/atlas/{epoch}": self._epoch,
            "/api/run/{name}/atlas/{epoch}/{sample}": self._sample,
            "/api/run/{name}/samples": self._samples,
            "/api/study/{study}": self._study,
            "/api/study/{study}/parameters": self._parameters,
        }
        routes = [Route(path, self._guarded(answer)) for path, answer in answers.items()]
        routes.append(Route("/api/run/{name}/probe", self._probe, methods=["POST"]))
        routes += [Route(path, self._page) for path in PAGES]
        routes.append(Route("/static/{file}", self._file))
        return Starlette(routes=routes)

    # ------------------------------------------------------------------------------------------------- who may ask

    def _refusal(self, request: Request) -> Response | None:
        """The answer to somebody who may not ask; None for all others.

        A foreign name in the address means that a page of the internet was led to this machine (DNS rebinding).
        """
        host = request.headers.get("host", "").rsplit(":", 1)[0].strip("[]")
        if host not in self.options.names:
            return PlainTextResponse("this server has another name", 421, HEADERS)
        if self.options.is_local:
            return None
        given = request.query_params.get("token") or request.cookies.get(COOKIE, "")
        if not hmac.compare_digest(given.encode(), self.options.token.encode()):
            return PlainTextResponse("open the address with the token that the command has printed", 403, HEADERS)
        if "token" in request.query_params:
            clean = RedirectResponse(request.url.path, 303, HEADERS)
            clean.set_cookie(COOKIE, self.options.token, httponly=True, samesite="strict")
            return clean
        return None

    def _guarded(self, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        """The answer as JSON, computed in a thread, with errors as messages."""

        async def respond(request: Request) -> Response:
            refusal = self._refusal(request)
            return await run_in_threadpool(self._json, request, answer) if refusal is None else refusal

        return respond

    def _json(self, request: Request, answer: Answer) -> Response:
        try:
            name = request.path_params.get("name")
            if name is not None and not (0 < len(name) <= 100 and set(name) <= ID_LETTERS):
                raise queries.NotThere(name)
            body, status = _written(answer(request)), 200
        except queries.NotThere:
            body, status = _written({"error": "there is no such run or study"}), 404
        except ConfigError as error:
            body, status = _written({"error": str(error)}), 400
        except Busy as error:  # no failure: the page asks whether to compute anyway
            body, status = _written({"error": str(error), "busy": True}), 200
        except Exception:
            log.exception("%s", request.url.path)
            body, status = _written({"error": "the server has failed; its log says why"}), 500
        headers = dict(HEADERS)
        if len(body) >= FEWEST_ZIPPED and "gzip" in request.headers.get("accept-encoding", ""):
            body, headers["Content-Encoding"] = gzip.compress(body, 5), "gzip"
        return Response(body, status, headers, media_type="application/json")

    # ---------------------------------------------------------------------------------------------------- answers

    def _choices(self, request: Request) -> Any:
        return {**queries.choices(self._store()), "probes": self.options.has_probes}

    def _columns(self, request: Request) -> Any:
        return queries.column_names(self._store())

    def _runs(self, request: Request) -> Any:
        return queries.runs_page(self._store(), queries.Wanted.of(request.query_params))

    def _groups(self, request: Request) -> Any:
        return queries.groups(self._store(), queries.Wanted.of(request.query_params))

    def _compare(self, request: Request) -> Any:
        ids = request.query_params.get("sel", "").split(",")
        if not all(one and set(one) <= ID_LETTERS for one in ids):
            raise queries.NotThere("sel")
        return queries.compared(self._store(), ids)

    def _run(self, request: Request) -> Any:
        return queries.run_facts(self._store(), request.path_params["name"])

    def _history(self, request: Request) -> Any:
        text = request.query_params.get("since", "-1")
        since = -1 if text == "-1" else queries.whole_number(request.query_params, "since", 0, 0, 10**11)
        return self.histories.behind(request.path_params["name"], since)

    def _study(self, request: Request) -> Any:
        asked = request.query_params
        return self.studies.view(self._store(), request.path_params["study"], asked.get("x", ""), asked.get("y", ""))

    def _parameters(self, request: Request) -> Any:
        return self.studies.parameters(self._store(), request.path_params["study"], request.query_params.get("y", ""))

    def _epochs(self, request: Request) -> Any:
        return {"epochs": atlas.epoch_list(atlas.trace_folder(request.path_params["name"]))}

    def _epoch(self, request: Request) -> Any:
        epoch = queries.whole_number(request.path_params, "epoch", 0, 0, 10**6)
        return atlas.epoch_columns(atlas.trace_folder(request.path_params["name"]), epoch)

    def _sample(self, request: Request) -> Any:
        epoch = queries.whole_number(request.path_params, "epoch", 0, 0, 10**6)
        sample = queries.whole_number(request.path_params, "sample", 0, 0, 10**9)
        return atlas.sample_row(atlas.trace_folder(request.path_params["name"]), epoch, sample)

    def _samples(self, request: Request) -> Any:
        return atlas.samples_of(atlas.trace_folder(request.path_params["name"]))

    async def _probe(self, request: Request) -> Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        if not hmac.compare_digest(request.headers.get(TOKEN_HEADER, "").encode(), self.page_token.encode()):
            return PlainTextResponse("only the page itself may ask for an evaluation", 403, HEADERS)
        if not self.options.has_probes:
            return PlainTextResponse("evaluations need --allow-probes", 403, HEADERS)
        body = await request.body()

        def answer(asked: Request) -> Any:
            try:
                content = json.loads(body[:MAX_BODY])
            except (ValueError, RecursionError) as error:
                raise ConfigError("the request is no JSON") from error
            probe = Probe.of(asked.path_params["name"], content)
            return self.probes.ask(probe, anyway=content.get("anyway") is True)

        return await run_in_threadpool(self._json, request, answer)

    # ------------------------------------------------------------------------------------------------------- files

    async def _page(self, request: Request) -> Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        page = (queries.static_folder() / "index.html").read_text().replace("{{page_token}}", self.page_token)
        return Response(page, 200, HEADERS, media_type="text/html")

    async def _file(self, request: Request) -> Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        known = {path.name: path for path in queries.static_folder().iterdir() if path.suffix in (".js", ".css")}
        path = known.get(request.path_params["file"])
        if path is None:
            return PlainTextResponse("there is no such file", 404, HEADERS)
        kind = "text/javascript" if path.suffix == ".js" else "text/css"
        return FileResponse(path, headers=HEADERS, media_type=kind)


def _written(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def serve(options: Options, ready: Callable[[str], None]) -> None:
    """Serve until the process is stopped. `ready` gets the address. Raises ConfigError for a port that is taken."""
    pages = Pages(options)
    bound = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((options.host, options.port))
        bound.listen()
    except OSError as error:
        bound.close()
        raise ConfigError(f"--port: {options.host}:{options.port} cannot be used: {error.strerror}") from error
    port = bound.getsockname()[1]
    address = f"http://{options.host if options.host not in LOOPBACK else '127.0.0.1'}:{port}/"
    ready(address if options.is_local else f"{address}?token={options.token}")
    config = uvicorn.Config(pages.app(), log_level="warning", access_log=False, server_header=False)
    try:
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        pages.probes.close()
        bound.close()
