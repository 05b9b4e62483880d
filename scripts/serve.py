"""
Serve a model over HTTP, as OpenAI's interface has it, and a page to chat on.

    python scripts/serve.py FOLDER
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "Once upon a time"}'

FOLDER is what the trainers make, or any folder in Hugging Face's layout. There are /v1/completions (with echo and
logprobs), /v1/chat/completions, both also streamed, /v1/models, the tokenizer for lm-evaluation-harness (/tokenize,
/detokenize, /tokenizer_info), /health, and the page at /. Requests that come together are computed together. Only this
machine can reach the server, unless --host says otherwise; then requests have to bring an --api-key. Ctrl-C and
SIGTERM give the answers under way a few seconds to come to an end.

With --out, DIR/metrics.jsonl gets a row for each request: times and counts, and nothing of what was said.
"""

import contextlib
import dataclasses
import errno
import ipaddress
import json
import os
import socket
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.chat import TEMPLATES
from minillm.extras import extra
from minillm.generate import generate
from minillm.hub import stop_tokens
from minillm.trainers.common import load_tokenizer, template_of
from scripts.chat import never_taught

LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclasses.dataclass(kw_only=True)
class Options(command_line.Reading):
    """The server. What it serves, to whom, and how much of it."""

    model: tyro.conf.Positional[Path | None] = None
    """a model folder: config.json, *.safetensors, tokenizer.json"""
    host: str = "127.0.0.1"
    """the address to listen at; any that other machines can reach needs an --api-key"""
    port: int = 8000
    """0: any that is free"""
    api_key: str = ""
    """what requests have to bring, as "Authorization: Bearer KEY"; @FILE: a file's text, which `ps` does not show"""
    name: str = ""
    """what requests call the model; none: the folder's name"""
    template: str = ""
    """chatml, llama2, llama3, alpaca, or a Jinja file; none: the model folder's own"""
    seed: int = 0
    """of requests that bring none: the same ones in the same order get the same answers"""
    out: Path | None = None
    """a folder for metrics.jsonl, which gets a row for each request; none: nothing is written"""

    max_rows: int = 8
    """texts that are decoded together; others wait"""
    max_requests: int = 64
    """requests in work and waiting; one more is refused with status 429"""
    max_body: int = 1_000_000
    """bytes of a request"""
    max_new_tokens: int = 0
    """tokens of an answer; 0: as many as the model's context has room for"""
    grace: float = 5.0
    """seconds that answers under way get at the end"""

    def __post_init__(self):
        def refuse(name, must):
            raise ValueError(f"--{name.replace('_', '-')} has to be {must}, and is {getattr(self, name)}")

        if self.model is None:
            raise ValueError("MODEL is missing: the folder of the model to serve")
        if not 0 <= self.port <= 65535:
            refuse("port", "from 0 to 65535")
        for name, least in (("seed", 0), ("max_rows", 1), ("max_requests", 1), ("max_body", 1), ("max_new_tokens", 0)):
            if getattr(self, name) < least:
                refuse(name, f"at least {least}")
        if not 0 <= self.grace <= 3600:
            refuse("grace", "from 0 to 3600")
        if not self.api_key and not self.is_local():
            raise ValueError(f"--host {self.host} lets other machines in: give them an --api-key, or leave it out")

    def is_local(self):
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False

    def hosts(self):
        """What browsers here call the server; None where it can have any name."""
        return LOCAL | {f"[{self.host}]" if ":" in self.host else self.host} if self.is_local() else None


def read_key(given):
    """The API key: the option's text, or that of a file."""
    if not given.startswith("@"):
        key, where = given, "--api-key"
    else:
        key, where = Path(given[1:]).read_text(encoding="utf-8", errors="replace").strip(), given[1:]
        if not key:
            raise ValueError(f"{where} is empty: it has to hold the API key")
    if not key.isascii() or any(not "!" <= char <= "~" for char in key):
        raise ValueError(f"{where}: an API key is of ASCII letters, digits and signs, without blanks")
    return key


def listen(host, port):
    """A socket that listens. ValueError: it can not."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        # asyncio and socket add to the reason what they tried; a name that is not found has no such number
        reason = (os.strerror(error.errno) if (error.errno or 0) > 0 else str(error.strerror)).lower()
        told = f"--host {host} --port {port} can not be used ({reason})"
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"{told}: take an address of this machine, such as 127.0.0.1") from None
        raise ValueError(f"{told}: take another port, or 0 for any free one") from None


@contextlib.contextmanager
def logging(folder):
    """A function that appends a dict to folder/metrics.jsonl; one that does nothing where there is no folder."""
    if folder is None:
        yield lambda row: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:

        def log(row):
            file.write(json.dumps(row) + "\n")
            file.flush()

        yield log


def run(options):
    uvicorn = extra("uvicorn", "serve")
    extra("starlette", "serve")
    from minillm.server import Limits, Service  # without the extra, it can not be imported

    key = read_key(options.api_key)
    tokenizer = load_tokenizer(options.model)
    template = template_of(options.model, options.template)
    model = options.load(options.model, "lm")
    if not options.template and never_taught(options.model, template):
        template = None
    generate(model, [[tokenizer.eos_id]], max_new_tokens=2)  # the first call loads the kernels
    limits = Limits(
        rows=options.max_rows,
        requests=options.max_requests,
        body=options.max_body,
        max_new_tokens=options.max_new_tokens,
    )
    name = options.name or options.model.resolve().name
    access = {"api_key": key, "hosts": options.hosts(), "stops": stop_tokens(options.model)}
    sock = listen(options.host, options.port)
    with sock, logging(options.out) as log:
        service = Service(model, tokenizer, template, name=name, limits=limits, seed=options.seed, log=log, **access)
        config = uvicorn.Config(
            service,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # the service tells about errors itself
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=options.grace + 2,
        )
        server = uvicorn.Server(config)

        def end(*_):
            """Ctrl-C or SIGTERM; the second one does not wait."""
            server.force_exit = server.should_exit
            if not server.should_exit:
                service.batcher.drain(options.grace)
            server.should_exit = True

        server.handle_exit = end
        host = f"[{options.host}]" if ":" in options.host else options.host
        known = template if template in TEMPLATES else "of its own" if template else "none, so no chat"
        print(
            f"{options.model}: {model.flat.size:,} parameters, context {model.config.max_position_embeddings:,}, "
            f"template {known}\nhttp://{host}:{sock.getsockname()[1]} is open; Ctrl-C ends",
            flush=True,
        )
        with service:
            server.run(sockets=[sock])
        print(f"ended after {service.count:,} requests" if service.count != 1 else "ended after 1 request")


def main():
    command_line.run(run, command_line.parse(Options, "Serve a model over HTTP, as OpenAI's interface has it."))


if __name__ == "__main__":
    main()
