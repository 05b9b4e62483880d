"""
A model behind OpenAI's HTTP interface: completions, chat completions, models, and a page to chat on.

    service = Service(model, tokenizer, "chatml", name="mine")      an ASGI application; scripts/serve.py runs it

A request goes through three hands: here it is read and checked, as a whole and before anything is computed; the Batcher
decodes it together with others; and a form, `Completion` or `Chat`, spells the answer. Whatever is wrong with a request
is one Refusal with one line, in OpenAI's shape.

Fields that OpenAI knows and this server can not obey are refused, unless they ask for nothing (presence_penalty 0). So
are fields that look like a slip of the pen (max_token). Any other unknown field is ignored, as clients send all sorts
of things, and is named in the log.
"""

import asyncio
import hmac
import html
import itertools
import json
import math
import re
import secrets
import string
import sys
import time
from dataclasses import dataclass, field
from difflib import get_close_matches
from urllib.parse import urlsplit

from .batching import Batcher, Closed, Row
from .chat import render, stop_ids
from .extras import extra
from .tokenizer import require_unicode

exceptions = extra("starlette.exceptions", "serve")
requests = extra("starlette.requests", "serve")
responses = extra("starlette.responses", "serve")
routing = extra("starlette.routing", "serve")

MOST_CHOICES = 128  # texts in one answer
MOST_STOPS, LONGEST_STOP = 4, 500
BODY_SECONDS = 30  # in which the body of a request has to arrive
CLIENT_GONE = 499  # for the log alone


class Refusal(Exception):
    """A request that is not answered, and why: one line."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self):
        """OpenAI's shape of an error."""
        kind = {429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(kw_only=True)
class Limits:
    """What one client, or all together, may ask for."""

    rows: int = 8  # texts that are decoded together; others wait
    requests: int = 64  # in work and waiting; one more is refused
    body: int = 1_000_000  # bytes
    max_new_tokens: int = 0  # of one text; 0: as many as the context has room for


# ------------------------------------------------------------------ reading a request


def shown(value):
    """A value in an error message."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        text = "nested too deeply"
    return text if len(text) <= 60 else text[:59] + "…"


def parse_body(data):
    """The object that the bytes of a body spell. Refusal: they spell none."""

    def refuse(what):
        raise Refusal(400, f"the body is not usable JSON: {what}")

    try:
        body = json.loads(data.decode(), parse_constant=lambda name: refuse(f"{name} is no number of JSON"))
    except UnicodeDecodeError as error:
        refuse(f"byte 0x{data[error.start]:02x} at position {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        refuse(f"{error.msg[0].lower()}{error.msg[1:].removesuffix(' at')}, line {error.lineno}, column {error.colno}")
    except ValueError:
        refuse("a number has too many digits")
    except RecursionError:
        refuse("it is nested too deeply")
    if not isinstance(body, dict):
        refuse("it has to be an object, like {" + '"prompt": "Once upon"}')
    return body


class Fields:
    """The fields of a body, each checked as it is read; null is as good as absent."""

    def __init__(self, body):
        self.body = body

    def get(self, name, default=None):
        value = self.body.get(name)
        return default if value is None else value

    def needed(self, name):
        if self.body.get(name) is None:
            raise Refusal(400, f"{name} is missing", name)
        return self.body[name]

    def number(self, name, default, low, high, whole=True, above=False):
        """A number from low (above: which is not allowed itself) to high."""
        value = self.get(name)
        if value is None:
            return default
        kinds = int if whole else int | float
        fits = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
        if not fits or (above and value == low):
            kind, bounds = "a whole number" if whole else "a number", f"from {low} to {high}"
            bounds = f"above {low} and at most {high}" if above else bounds
            bounds = f"of at least {low}" if high == math.inf else bounds
            raise Refusal(400, f"{name} has to be {kind} {bounds}, and is {shown(value)}", name)
        return value

    def boolean(self, name):
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise Refusal(400, f"{name} has to be true or false, and is {shown(value)}", name)
        return value

    def stops(self):
        """The stop strings, in a tuple."""
        value = self.get("stop", [])
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(stop, str) and stop for stop in found):
            raise Refusal(
                400, f"stop has to be a text that is not empty, or a list of such, and is {shown(value)}", "stop"
            )
        if len(found) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in found):
            most = f"at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters"
            raise Refusal(
                400, f"stop can have {most}, and has {len(found)}, the longest of {max(map(len, found))}", "stop"
            )
        return tuple(found)


def text_of(value, param):
    """`value`. Refusal: it is no text, or can not be spelt in UTF-8."""
    try:
        return require_unicode(value)
    except ValueError as error:
        raise Refusal(400, f"{param}: {error}", param) from None


def is_id(value):
    return isinstance(value, int) and not isinstance(value, bool)


# What asks for nothing may be sent; any other value can not be obeyed. best_of, logprobs and n: see there.
NEUTRAL = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
SHARED = (
    *("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "stop", "seed"),
    *("stream", "stream_options", "logprobs"),
)
FIELDS = {
    "completion": {*SHARED, "prompt", "echo", "best_of"},
    "chat": {*SHARED, "messages", "max_completion_tokens", "top_logprobs"},
}


def check_names(body, kind):
    """The names of the fields that are ignored. Refusal: one that can not be ignored."""
    ignored = []
    for name, value in body.items():
        if name in FIELDS[kind]:
            continue
        if name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                raise Refusal(400, f"{name} is not supported, and is {shown(value)}: leave it out", name)
        elif near := get_close_matches(name, FIELDS[kind], 1, 0.8):
            raise Refusal(400, f"no field {shown(name)}; perhaps you meant {near[0]}", name[:60])
        else:
            ignored.append(name[:60])
    return ignored


@dataclass(kw_only=True)
class Asked:
    """A request that was read and found good."""

    rows: list
    form: object  # Completion or Chat
    prompt_tokens: int
    stream: bool
    include_usage: bool
    ignored: list


# ------------------------------------------------------------------ spelling an answer


def spelled(tokenizer, token):
    """A token as OpenAI writes it: its text, or its bytes where they are a part of a character."""
    data = bytes_of(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def bytes_of(tokenizer, token):
    """The bytes of a token; of an id that only the model knows, because its embedding is wider, its number."""
    try:
        return tokenizer.token_bytes(token)
    except ValueError:
        return f"<{token}>".encode()


def finish_reason(finish):
    return "stop" if finish == "stop_string" else finish


class Form:
    """How one kind of answer is spelt: `whole` and `chunk` are the objects, `choice` and `pieces` what is in them."""

    whole = chunk = prefix = None

    def __init__(self, tokenizer, model, logprobs):
        self.tokenizer, self.logprobs = tokenizer, logprobs
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def answer(self, kind, choices, **more):
        return {**self.head, "object": kind, "choices": choices, **more}


class Completion(Form):
    """/v1/completions"""

    whole = chunk = "text_completion"
    prefix = "cmpl"

    def choice(self, index, text, tokens, finish):
        scores = self._scores(tokens) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": scores, "finish_reason": finish_reason(finish)}

    def begin(self, index):
        return []

    def pieces(self, index, piece):
        return [self.choice(index, *piece[:3])]

    def _scores(self, tokens):
        """A name may stand for several ids: it gets the likeliest one's number."""
        tops = []
        for token in tokens:
            top = {}
            for i, logprob in [*token.top, (token.id, token.logprob)]:
                top.setdefault(spelled(self.tokenizer, i), logprob)
            tops.append(None if token.logprob is None else top)
        return {
            "tokens": [spelled(self.tokenizer, token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset for token in tokens],
        }


class Chat(Form):
    """/v1/chat/completions"""

    whole, chunk = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, index, text, tokens, finish):
        message = {"role": "assistant", "content": text, "refusal": None}
        reason = finish_reason(finish)
        return {"index": index, "message": message, "logprobs": self._scores(tokens), "finish_reason": reason}

    def begin(self, index):
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def pieces(self, index, piece):
        if piece.text or piece.tokens:
            yield self._delta(index, {"content": piece.text}, self._scores(piece.tokens))
        if piece.finish:
            yield self._delta(index, {}, finish=finish_reason(piece.finish))

    def _delta(self, index, delta, scores=None, finish=None):
        return {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish}

    def _scores(self, tokens):
        if not self.logprobs:
            return None
        control = set(self.tokenizer.special_tokens.values())
        content = [
            self._score(token.id, token.logprob) | {"top_logprobs": [self._score(*pair) for pair in token.top]}
            for token in tokens
            if token.id not in control
        ]
        return {"content": content, "refusal": None}

    def _score(self, token, logprob):
        data = list(bytes_of(self.tokenizer, token))
        return {"token": spelled(self.tokenizer, token), "logprob": logprob, "bytes": data}


# ------------------------------------------------------------------ the service


@dataclass
class Record:
    """What the log tells about one request: no word of what was said."""

    began: float = field(default_factory=time.perf_counter)
    status: int = 0
    asked: Asked | None = None

    def row(self, step, method, path):
        row = {"step": step, "method": method, "path": path, "status": self.status}
        row["seconds"] = round(time.perf_counter() - self.began, 4)
        rows = self.asked.rows if self.asked else []
        if rows:
            written = sum(len(row.ids) for row in rows)
            row |= {"choices": len(rows), "prompt_tokens": self.asked.prompt_tokens, "completion_tokens": written}
        if begun := [row for row in rows if row.began is not None]:
            first, last = min(row.began for row in begun), max(row.ended for row in begun)
            row["time_to_first_token"] = round(first - self.began, 4)
            if last > first:  # the first tokens are the prompt's work
                row["tokens_per_second"] = round((written - len(begun)) / (last - first), 1)
        if self.asked and self.asked.ignored:
            row["ignored"] = self.asked.ignored
        return row


class Service:
    """The ASGI application.

    template   for minillm.chat.render; None for a model that was never taught to chat
    name       what requests call the model
    stops      ids that end an answer, besides the template's
    seed       requests without one draw from (seed, how many such there were before)
    api_key    what requests have to bring; "" for none
    hosts      the names that a request may have come to, as browsers put them in Host; None: any
    log        called with a dict for each request
    tell       called with one line about each error of the server's own

    Start and end it with `with`: it has a thread.
    """

    def __init__(
        self,
        model,
        tokenizer,
        template,
        *,
        name,
        stops=(),
        limits=None,
        seed=0,
        api_key="",
        hosts=None,
        log=lambda row: None,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    ):
        self.tokenizer, self.template, self.name = tokenizer, template, name
        self.limits, self.seed, self.api_key, self.hosts = limits or Limits(), seed, api_key, hosts
        self.log, self.tell = log, tell
        self.context, self.vocab_size = model.config.max_position_embeddings, model.config.vocab_size
        self.stops = frozenset(stop_ids(template, tokenizer) if template else {tokenizer.eos_id}) | set(stops)
        self.most = self.limits.max_new_tokens or math.inf  # the context is a limit of its own
        self.created = int(time.time())
        self.batcher = Batcher(model, tokenizer, self.limits.rows, tell)
        self.in_work = self.count = 0
        self.seeds = itertools.count(1)
        self.router = routing.Router(
            [
                routing.Route("/", self.page),
                routing.Route("/health", self.health),
                routing.Route("/v1/models", self.models),
                routing.Route("/v1/models/{name:path}", self.one_model),
                routing.Route("/tokenizer_info", self.tokenizer_info),
                routing.Route("/tokenize", self.tokenize, methods=["POST"]),
                routing.Route("/detokenize", self.detokenize, methods=["POST"]),
                routing.Route("/v1/completions", self.completions, methods=["POST"]),
                routing.Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            ],
            redirect_slashes=False,
        )

    def __enter__(self):
        self.batcher.__enter__()
        return self

    def __exit__(self, *error):
        self.batcher.__exit__(*error)

    # -------------------------------------------------------------- every request

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        record, started = Record(), False
        scope = {**scope, "app": self, "record": record}

        async def answer(message):
            nonlocal started
            if message["type"] == "http.response.start":
                started, record.status = True, message["status"]
                always = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
                message = {**message, "headers": [*message["headers"], *always]}
            await send(message)

        try:
            try:
                self._check_sender(scope)
                await self.router(scope, receive, answer)
            except exceptions.HTTPException as error:  # of the router
                told = {
                    404: f"there is nothing at {shown(scope['path'])}",
                    405: f"{scope['method']} is not possible here",
                }
                raise Refusal(
                    error.status_code, told.get(error.status_code, error.detail), headers=error.headers
                ) from None
            except requests.ClientDisconnect:
                record.status = CLIENT_GONE
            except Refusal:
                raise
            except Exception as error:
                self.tell(f"error: {type(error).__name__}: {error}")
                raise Refusal(500, "the server made a mistake; its terminal says which") from None
        except Refusal as refusal:
            if started:
                await send({"type": "http.response.body", "body": b""})
            else:
                headers = {name.lower(): value for name, value in refusal.headers.items()}
                await to_json(refusal.body(), refusal.status, headers)(scope, receive, answer)
        finally:
            self.count += 1
            self.log(record.row(self.count, scope["method"], scope["path"][:100]))

    def _check_sender(self, scope):
        """Refusal: the request comes from a foreign page in a browser here, or without the key."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.hosts is not None and re.sub(r":[0-9]+$", "", host).lower() not in self.hosts:
            raise Refusal(
                403, f"this server is for {' and '.join(sorted(self.hosts))}, and the request for {shown(host)}"
            )
        if "origin" in headers and netloc_of(headers["origin"]) != host:
            raise Refusal(403, f"pages of {shown(headers['origin'])} may not ask this server")
        if self.api_key and scope["path"] not in ("/", "/health"):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
                told = "the header Authorization has to be: Bearer, and this server's API key"
                raise Refusal(401, told, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, request):
        """The object in the body of a request. Refusal: there is none, or too much of it."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"the header Content-Type has to be application/json, and is {shown(kind)}")
        if (coding := request.headers.get("content-encoding", "identity")) != "identity":
            raise Refusal(415, f"the header Content-Encoding is {shown(coding)}: send the body as it is")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.limits.body:
            self._refuse_length()
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    data += part
                    if len(data) > self.limits.body:
                        self._refuse_length()
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {BODY_SECONDS} seconds") from None
        return await asyncio.to_thread(parse_body, bytes(data))

    def _refuse_length(self):
        raise Refusal(413, f"the body is larger than {self.limits.body:,} bytes")

    # -------------------------------------------------------------- what is there

    async def health(self, request):
        return to_json({"status": "ok"})

    def _model(self):
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "minillm"}
        return model | {"max_model_len": self.context}

    async def models(self, request):
        return to_json({"object": "list", "data": [self._model()]})

    async def one_model(self, request):
        self._check_model(request.path_params["name"])
        return to_json(self._model())

    def _check_model(self, name):
        if not isinstance(name, str):
            raise Refusal(400, f"model has to be a text, and is {shown(name)}", "model")
        if name != self.name:
            told = f"there is no model {shown(name)} here, only {shown(self.name)}"
            raise Refusal(404, told, "model", "model_not_found")

    async def page(self, request):
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'"
        policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        chat = "yes" if self.template else ""
        text = PAGE.substitute(nonce=nonce, name=html.escape(self.name), chat=chat, key="yes" if self.api_key else "")
        headers = {"content-security-policy": policy, "referrer-policy": "no-referrer"}
        return responses.HTMLResponse(text.encode("utf-8", "replace"), headers=headers)

    # -------------------------------------------------------------- the tokenizer, for lm-evaluation-harness

    async def tokenizer_info(self, request):
        t = self.tokenizer
        # No template: rendered elsewhere, its control tokens would come back as text, which is not what they are here.
        return to_json({"bos_token": t.bos, "eos_token": t.eos, "pad_token": t.pad, "chat_template": None})

    async def tokenize(self, request):
        fields = Fields(await self._body(request))
        text = text_of(fields.needed("prompt"), "prompt")
        special = fields.body.get("add_special_tokens") is None or fields.boolean("add_special_tokens")
        tokens = await asyncio.to_thread(self._encode, text, "prompt", special)
        return to_json({"tokens": tokens, "count": len(tokens), "max_model_len": self.context})

    async def detokenize(self, request):
        tokens = Fields(await self._body(request)).needed("tokens")
        if not isinstance(tokens, list):
            raise Refusal(400, f"tokens has to be a list of ids, and is {shown(tokens)}", "tokens")
        self._check_ids(tokens, "tokens")
        return to_json({"prompt": await asyncio.to_thread(self.tokenizer.decode, tokens)})

    def _encode(self, text, param, begin=True):
        """The ids of a text, behind the begin of a text where the tokenizer has one. An empty text is that alone, or
        where there is none, the end of the text before."""
        try:
            ids = self.tokenizer.encode(text_of(text, param)).tolist()
        except ValueError as error:
            raise Refusal(400, f"{param}: {error}", param) from None
        before = self.tokenizer.eos_id if self.tokenizer.bos_id is None and not ids else self.tokenizer.bos_id
        return [before, *ids] if begin and before is not None else ids

    def _check_ids(self, ids, param):
        for n, token in enumerate(ids):
            if not is_id(token) or not 0 <= token < self.vocab_size:
                told = f"{param}[{n}] has to be an id from 0 to {self.vocab_size - 1}, and is {shown(token)}"
                raise Refusal(400, told, param)
            try:
                self.tokenizer.token_bytes(token)
            except ValueError as error:  # a vocabulary may have gaps, and an embedding more rows
                raise Refusal(400, f"{param}[{n}]: {error}", param) from None

    # -------------------------------------------------------------- answers

    async def completions(self, request):
        return Answer(self, self._read_completion)

    async def chat_completions(self, request):
        return Answer(self, self._read_chat)

    def _read_completion(self, body):
        fields, ignored = Fields(body), check_names(body, "completion")
        self._check_model(fields.get("model", self.name))
        prompts = self._prompts(fields.needed("prompt"))
        n = fields.number("n", 1, 1, MOST_CHOICES)
        if fields.get("best_of", 1) not in (1, n) or isinstance(fields.get("best_of"), bool):
            raise Refusal(400, f"best_of is not supported, and is {shown(body['best_of'])}: leave it out", "best_of")
        alternatives = fields.number("logprobs", None, 0, 5)
        echo = fields.boolean("echo")
        asked = fields.number("max_tokens", None, 0 if echo else 1, self.most)
        rooms = [self._room(len(ids), asked, "max_tokens", 16) for ids in prompts]
        form = Completion(self.tokenizer, self.name, alternatives is not None)
        special = {"alternatives": alternatives, "echo": echo}
        return self._asked(fields, form, prompts, rooms, n, special, ignored)

    def _read_chat(self, body):
        fields, ignored = Fields(body), check_names(body, "chat")
        self._check_model(fields.get("model", self.name))
        if self.template is None:
            told = "this model was never taught to chat: use /v1/completions, or start the server with --template"
            raise Refusal(400, told, "model")
        messages = plain_messages(fields.needed("messages"))
        try:
            ids = render(messages, self.template, self.tokenizer, add_generation_prompt=True)[0].tolist()
        except ValueError as error:
            raise Refusal(400, " ".join(str(error).split()), "messages") from None
        logprobs, top = fields.boolean("logprobs"), fields.number("top_logprobs", None, 0, 20)
        if top is not None and not logprobs:
            raise Refusal(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
        room = self._room(len(ids), fields.number(name, None, 1, self.most), name, self.context)
        n = fields.number("n", 1, 1, MOST_CHOICES)
        special = {"alternatives": (top or 0) if logprobs else None, "continues": False}
        return self._asked(fields, Chat(self.tokenizer, self.name, logprobs), [ids], [room], n, special, ignored)

    def _prompts(self, prompt):
        """The ids of each of the prompts, in lists."""
        if isinstance(prompt, str):
            return [self._some(self._encode(prompt, "prompt"), "prompt")]
        if not isinstance(prompt, list) or not prompt:
            told = "prompt has to be a text, a list of texts, a list of ids or a list of lists of ids, and is "
            raise Refusal(400, told + shown(prompt), "prompt")
        if is_id(prompt[0]):
            self._check_ids(prompt, "prompt")
            return [prompt]
        if len(prompt) > MOST_CHOICES:
            raise Refusal(400, f"prompt has {len(prompt)} texts, and {MOST_CHOICES} are the most", "prompt")
        kind, found = (list, "a list of ids") if isinstance(prompt[0], list) else (str, "a text"), []
        for n, one in enumerate(prompt):
            if not isinstance(one, kind[0]):
                raise Refusal(400, f"prompt[{n}] has to be {kind[1]}, and is {shown(one)}", "prompt")
            if isinstance(one, list):
                self._check_ids(one, f"prompt[{n}]")
            found.append(self._some(self._encode(one, f"prompt[{n}]") if isinstance(one, str) else one, f"prompt[{n}]"))
        return found

    def _some(self, ids, param):
        if not ids:
            raise Refusal(400, f"{param} is empty: it needs at least one token", "prompt")
        return ids

    def _room(self, count, asked, param, default):
        """How many tokens a text with a prompt of `count` gets."""
        room = self.context - count
        if asked is None and room >= 1:
            return min(default, room, self.limits.max_new_tokens or room)
        if asked is None or asked > room:
            wanted = f"{count} of the prompt"
            wanted += "; no room is left for an answer" if asked is None else f" and {shown(asked)} of {param}"
            total = shown(count + (asked or 0))
            told = f"the model's context is {self.context} tokens, and {total} are asked for: {wanted}"
            raise Refusal(400, told, "messages" if asked is None else param, "context_length_exceeded")
        return asked

    def _asked(self, fields, form, prompts, rooms, n, special, ignored):
        """What both kinds of requests have, and their rows: n for each prompt."""
        if n * len(prompts) > MOST_CHOICES:
            told = f"n times the number of prompts is {n * len(prompts)}, and {MOST_CHOICES} is the most"
            raise Refusal(400, told, "n")
        temperature = fields.number("temperature", 1.0, 0, 2, whole=False)
        top_p = fields.number("top_p", 1, 0, 1, whole=False, above=True)
        settings = {
            "temperature": temperature if temperature >= 1e-6 else 0,  # a logit divided by less may be infinite
            "top_p": top_p if top_p < 1 else None,
            "top_k": fields.number("top_k", None, 1, self.vocab_size),
            "min_p": fields.number("min_p", None, 0, 1, whole=False),
            "repetition_penalty": fields.number("repetition_penalty", 1, 0, 100, whole=False, above=True),
        }
        stops, stream = fields.stops(), fields.boolean("stream")
        options = fields.get("stream_options", {})
        if not isinstance(options, dict) or (options and not stream):
            raise Refusal(400, "stream_options has to be an object, and needs stream to be true", "stream_options")
        seed = fields.number("seed", None, -(2**63), 2**63 - 1)
        seed = (self.seed, next(self.seeds)) if seed is None else (seed % 2**64,)
        rows = [
            Row(
                prompt=ids,
                max_new_tokens=room,
                listener=None,
                settings={name: value for name, value in settings.items() if value is not None},
                stop_tokens=self.stops,
                stop_strings=stops,
                seed=(*seed, place * n + copy),
                stream=stream,
                **special,
            )
            for place, (ids, room) in enumerate(zip(prompts, rooms, strict=True))
            for copy in range(n)
        ]
        return Asked(
            rows=rows,
            form=form,
            prompt_tokens=sum(map(len, prompts)),
            stream=stream,
            include_usage=Fields(options).boolean("include_usage"),
            ignored=ignored,
        )


def plain_messages(messages):
    """Messages with text as their content; what is wrong beyond that, `render` tells."""
    if not isinstance(messages, list):
        raise Refusal(400, f"messages has to be a list of messages, and is {shown(messages)}", "messages")
    found = []
    for n, message in enumerate(messages):
        if not isinstance(message, dict):
            raise Refusal(
                400, f"messages[{n}] has to be an object with role and content, and is {shown(message)}", "messages"
            )
        if message.get("tool_calls") or message.get("function_call"):
            raise Refusal(400, f"messages[{n}]: tool calls are not supported", "messages")
        plain = {name: message[name] for name in ("role", "content") if name in message}
        if isinstance(plain.get("content"), list):
            plain["content"] = "".join(
                text_part(part, f"messages[{n}].content[{place}]") for place, part in enumerate(plain["content"])
            )
        if plain.get("role") == "developer":  # OpenAI's newer name
            plain["role"] = "system"
        found.append(plain)
    return found


def text_part(part, where):
    """The text of one part of a message's content."""
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        told = f'{where} has to be {{"type": "text", "text": ...}}, and is {shown(part)}: this model reads text alone'
        raise Refusal(400, told, "messages")
    return part["text"]


class Answer:
    """Reads one request, has it computed, and sends what comes: whole, or piece by piece."""

    def __init__(self, service, read):
        self.service, self.read = service, read

    async def __call__(self, scope, receive, send):
        service = self.service
        if service.batcher.deadline is not None:
            raise Refusal(503, "the server is shutting down")
        if service.in_work >= service.limits.requests:
            told = f"{service.in_work} requests are in work, and more are not taken: try again later"
            raise Refusal(429, told, code="rate_limit_exceeded", headers={"Retry-After": "1"})
        service.in_work += 1
        try:
            body = await service._body(requests.Request(scope, receive))
            asked = await asyncio.to_thread(self.read, body)
            scope["record"].asked = asked
            await self._compute(asked, receive, send, scope)
        finally:
            service.in_work -= 1

    async def _compute(self, asked, receive, send, scope):
        loop, queue, batcher = asyncio.get_running_loop(), asyncio.Queue(), self.service.batcher
        for index, row in enumerate(asked.rows):
            row.listener = lambda piece, index=index: loop.call_soon_threadsafe(queue.put_nowait, (index, piece))
        watch = asyncio.create_task(self._wait_for_the_end(receive, queue))
        try:
            batcher.submit(asked.rows)
            send_all = self._stream if asked.stream else self._whole
            await send_all(asked, self._events(asked, queue), send, scope, receive)
        except Closed as error:
            raise Refusal(503, str(error)) from None
        finally:
            watch.cancel()
            batcher.cancel(asked.rows)

    async def _wait_for_the_end(self, receive, queue):
        """Tell the queue when the client is gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        queue.put_nowait(None)

    async def _events(self, asked, queue):
        """(index, piece) as they come, until every row is finished. Refusal: one can not be."""
        left = len(asked.rows)
        while left:
            event = await queue.get()
            if event is None:
                raise requests.ClientDisconnect
            index, piece = event
            if isinstance(piece.error, Closed):
                raise Refusal(503, str(piece.error))
            if piece.error is not None:
                raise Refusal(500, f"the answer could not be computed: {type(piece.error).__name__}")
            left -= piece.finish is not None
            yield index, piece

    def _usage(self, asked):
        written = sum(len(row.ids) for row in asked.rows)
        usage = {"prompt_tokens": asked.prompt_tokens, "completion_tokens": written}
        return usage | {"total_tokens": asked.prompt_tokens + written}

    async def _whole(self, asked, events, send, scope, receive):
        choices = [None] * len(asked.rows)
        async for index, piece in events:
            choices[index] = asked.form.choice(index, *piece[:3])
        answer = asked.form.answer(asked.form.whole, choices, usage=self._usage(asked))
        await to_json(answer)(scope, receive, send)

    async def _stream(self, asked, events, send, scope, receive):
        """Server-sent events. They begin with the first piece: until then an error has a status of its own."""
        form, begun = asked.form, set()
        nothing = {"usage": None} if asked.include_usage else {}

        async def say(*data):
            text = "".join(f"data: {item if isinstance(item, str) else to_text(item)}\n\n" for item in data)
            await send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": True})

        try:
            async for index, piece in events:
                if not begun:
                    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                first = form.begin(index) if index not in begun else []
                begun.add(index)
                await say(*(form.answer(form.chunk, [c], **nothing) for c in (*first, *form.pieces(index, piece))))
        except Refusal as refusal:
            if not begun:
                raise
            scope["record"].status = refusal.status
            await say(refusal.body())
        else:
            if asked.include_usage:
                await say(form.answer(form.chunk, [], usage=self._usage(asked)))
            await say("[DONE]")
        await send({"type": "http.response.body", "body": b""})


def to_text(value):
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def to_json(value, status=200, headers=None):
    """A response. A name may hold what UTF-8 can not spell."""
    return responses.Response(to_text(value).encode("utf-8", "replace"), status, headers, "application/json")


def netloc_of(origin):
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


# ------------------------------------------------------------------ the page

PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$name</title>
<style nonce="$nonce">
  :root { color-scheme: light dark; --line: #8886; --ink: #2563eb }
  @media (prefers-color-scheme: dark) { :root { --ink: #7aa2ff } }
  * { box-sizing: border-box }
  body { font: 1rem/1.5 system-ui, sans-serif; max-width: 46rem; height: 100dvh; margin: auto; padding: 1rem;
         display: flex; flex-direction: column; gap: .6rem }
  header { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: baseline }
  h1 { font-size: 1rem; margin: 0; flex: 1; overflow-wrap: anywhere }
  #talk { flex: 1; overflow-y: auto; border: solid var(--line); border-width: 1px 0; padding: .6rem 0 }
  .turn { border-left: 3px solid var(--line); padding-left: .8rem; margin: .8rem 0;
          white-space: pre-wrap; overflow-wrap: anywhere }
  .user { border-color: var(--ink) }
  .error { border-color: #dc2626 }
  form { display: flex; gap: .6rem; align-items: end }
  textarea { flex: 1; resize: vertical }
  button, input, textarea { font: inherit; padding: .3rem .6rem }
  input[type=number] { width: 5.5rem }
  label, #state { font-size: .85rem; opacity: .8 }
  #state { min-height: 1.3rem; margin: 0 }
</style>
<header>
  <h1>$name</h1>
  <label>temperature <input id="temperature" type="number" min="0" max="2" step="0.1" value="0.8"></label>
  <label>tokens <input id="tokens" type="number" min="1" step="1" placeholder="all"></label>
  <label id="locked" hidden>API key <input id="key" type="password" autocomplete="off" size="12"></label>
</header>
<div id="talk" role="log" aria-label="conversation" tabindex="0"></div>
<form id="form">
  <textarea id="text" rows="3" autofocus aria-label="message"></textarea>
  <button id="send">Send</button>
  <button id="again" type="button">New</button>
</form>
<p id="state" role="status"></p>
<script nonce="$nonce">
  const by = id => document.getElementById(id), chat = !!"$chat"
  const help = "Enter sends, Shift+Enter begins a line, Esc stops the answer."
    + (chat ? "" : " This model was never taught to chat: it goes on with your text.")
  let messages = [], running = null
  by("locked").hidden = !"$key"
  by("state").textContent = help

  function show(kind, text) {
    const turn = document.createElement("div")
    turn.className = "turn " + kind
    turn.dir = "auto"
    turn.textContent = text
    by("talk").append(turn)
    turn.scrollIntoView({block: "end"})
    return turn
  }
  function busy(controller) {
    running = controller
    by("send").textContent = running ? "Stop" : "Send"
  }
  async function* events(reader) {
    const decoder = new TextDecoder()
    let rest = ""
    for (;;) {
      const {done, value} = await reader.read()
      if (done) return
      const parts = (rest + decoder.decode(value, {stream: true})).split("\\n\\n")
      rest = parts.pop()
      for (const part of parts) if (part != "data: [DONE]") yield JSON.parse(part.slice(6))
    }
  }
  async function ask(text) {
    const controller = new AbortController(), said = show("user", text)
    busy(controller)
    by("state").textContent = "…"
    const turn = chat ? show("assistant", "") : said
    const body = {stream: true, temperature: +by("temperature").value}
    if (by("tokens").value) body.max_tokens = +by("tokens").value
    else if (!chat) body.max_tokens = 64
    if (chat) body.messages = [...messages, {role: "user", content: text}]
    else body.prompt = text
    const headers = {"Content-Type": "application/json"}
    if (by("key").value) headers.Authorization = "Bearer " + by("key").value
    const before = messages
    let answer = "", state = help, failed = false
    try {
      const url = chat ? "v1/chat/completions" : "v1/completions"
      const options = {method: "POST", headers, body: JSON.stringify(body), signal: controller.signal}
      const response = await fetch(url, options)
      if (!response.ok) throw Error((await response.json()).error.message)
      for await (const event of events(response.body.getReader())) {
        if (event.error) throw Error(event.error.message)
        for (const choice of event.choices) {
          answer += (chat ? choice.delta.content : choice.text) ?? ""
          if (choice.finish_reason == "length") state = "The answer was cut off: no room is left."
        }
        turn.textContent = chat ? answer : text + answer
        turn.scrollIntoView({block: "end"})
      }
    } catch (error) {
      if (error.name == "AbortError") state = "Stopped."
      else { failed = true; show("error", error.message) }
    }
    if (chat && !failed && messages == before) messages = [...body.messages, {role: "assistant", content: answer}]
    if (failed) {
      if (!answer && chat) turn.remove()
      by("text").value ||= text  // to send it again
    }
    by("state").textContent = state
    busy(null)
  }
  by("form").onsubmit = event => {
    event.preventDefault()
    if (running) return running.abort()
    const text = by("text").value
    if (!text.trim()) return
    by("text").value = ""
    ask(text)
  }
  by("text").onkeydown = event => {
    if (event.key != "Enter" || event.shiftKey || event.isComposing) return
    event.preventDefault()
    if (!running) by("form").requestSubmit()
  }
  addEventListener("keydown", event => { if (event.key == "Escape") running?.abort() })
  by("again").onclick = () => {
    running?.abort()
    messages = []
    by("talk").textContent = ""
    by("state").textContent = help
    by("text").focus()
  }
</script>
""")
