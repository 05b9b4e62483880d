"""scripts/serve.py: OpenAI's interface to a model. What it answers is what minillm.generate says, whoever else asks."""

import asyncio
import contextlib
import errno
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from minillm import batching, server
from minillm.autograd import Tensor
from minillm.batching import Batcher, Row, Writing, log_softmax
from minillm.chat import render, stop_ids
from minillm.generate import generate
from minillm.model import Config, build
from minillm.server import Limits, Service
from minillm.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from minillm.trainers.common import save_model

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("scripts.serve", ROOT / "scripts/serve.py")
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script  # where the help finds the source of its options
spec.loader.exec_module(script)

TOKENIZER = Tokenizer.train(["user assistant Hello there, who is it? It is me."] * 9, SMALLEST_VOCABULARY + 30)
CONTEXT = 96
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
EOS = TOKENIZER.eos_id
STOPS = stop_ids("chatml", TOKENIZER)


def sharp(**options):
    """A model whose distributions are far from uniform."""
    model = build(Config(vocab_size=TOKENIZER.vocab_size, **{**SIZES, **options}))
    model.flat += 0.3 * np.random.default_rng(1).standard_normal(model.flat.size).astype(np.float32)
    return model


MODEL = sharp()


@pytest.fixture
def serve():
    """serve(**options): a running Service of MODEL, which must not make a mistake unless it is told whom to tell."""
    faults = []
    with contextlib.ExitStack() as stack:

        def serve(model=MODEL, template="chatml", **options):
            options = {"name": "tiny", "tell": faults.append} | options
            return stack.enter_context(Service(model, TOKENIZER, template, **options))

        yield serve
    assert faults == []


class Reply:
    def __init__(self, status, headers, data):
        self.status, self.headers, self.data = status, dict(headers), data

    @property
    def json(self):
        return json.loads(self.data)

    @property
    def events(self):
        """What stands behind "data:", in order; [DONE] has to be the last."""
        *events, done, end = self.data.decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


async def request(service, method, path, body=None, headers=(), leave_after=None):
    """One request to an ASGI application. A body: bytes, a list of parts, or what is sent as JSON. leave_after: so many
    parts of the answer are read, and then the client is gone."""
    given = {"host": "127.0.0.1:8000"} | ({"content-type": "application/json"} if body is not None else {})
    given |= {name.lower(): value for name, value in dict(headers).items()}
    if not isinstance(body, bytes | list):
        body = json.dumps(body).encode() if body is not None else b""
    parts = list(body) if isinstance(body, list) and body and isinstance(body[0], bytes) else None
    parts = parts or [body if isinstance(body, bytes) else json.dumps(body).encode()]
    gone, found = asyncio.Event(), {"status": None, "headers": [], "parts": []}
    if leave_after == 0:
        gone.set()

    async def receive():
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            found.update(status=message["status"], headers=message["headers"])
        else:
            found["parts"].append(message.get("body", b""))
            if leave_after is not None and len(found["parts"]) >= leave_after:
                gone.set()

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"root_path": "", "headers": [(n.encode(), v.encode("latin-1")) for n, v in given.items()]}
    await asyncio.wait_for(service(scope, receive, send), 20)
    assert not found["status"] or found["status"] < 400 or len(found["parts"]) == 1
    headers = [(name.decode(), value.decode()) for name, value in found["headers"]]
    return Reply(found["status"], headers, b"".join(found["parts"]))


def get(service, path, **options):
    return asyncio.run(request(service, "GET", path, **options))


def post(service, path, body, **options):
    return asyncio.run(request(service, "POST", path, body, **options))


def complete(service, prompt, **fields):
    return post(service, "/v1/completions", {"prompt": prompt, **fields})


def chat(service, *contents, **fields):
    return post(service, "/v1/chat/completions", {"messages": talk(*contents), **fields})


def talk(*contents):
    return [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * len(contents), contents, strict=False)]


def ids(text):
    return [TOKENIZER.bos_id, *TOKENIZER.encode(text).tolist()]


def continuation(prompt, new):
    """The text of new ids behind those of a prompt."""
    decoder = TOKENIZER.decoder(skip_special=True)
    for token in prompt:
        decoder.push(token)
    return "".join(map(decoder.push, new)) + decoder.flush()


def expected(prompt, max_tokens=16, model=MODEL, **options):
    """(text, ids) that minillm.generate gives for one prompt of ids."""
    options = {"temperature": 0.0, "stop_tokens": STOPS, **options}
    (made,) = generate(model, [prompt], max_new_tokens=max_tokens, tokenizer=TOKENIZER, **options)
    return continuation(prompt, made.ids), made


# ------------------------------------------------------------------ the batch


def run_rows(rows, size, model=MODEL, pause=0.0):
    """The pieces of each row, submitted one after another."""
    found, done, faults = {row: [] for row in rows}, threading.Semaphore(0), []
    batcher = Batcher(model, TOKENIZER, size, tell=faults.append)
    batcher.cache.keys[...] = batcher.cache.values[...] = np.nan  # what fresh memory may hold
    with batcher:
        for row in rows:

            def listener(piece, row=row):
                found[row].append(piece)
                if piece.finish or piece.error:
                    done.release()

            row.listener = listener
            batcher.submit([row])
            time.sleep(pause)
        for _ in rows:
            assert done.acquire(timeout=20)
    assert faults == []
    return list(found.values())


@pytest.mark.parametrize("slack", [256, 0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9}])
def test_rows_that_come_and_go_say_what_they_say_alone(architecture, settings, slack, monkeypatch):
    monkeypatch.setattr(batching, "SLACK", slack)  # 0: the rows are computed again in other columns now and then
    model, rng = sharp(architecture=architecture), np.random.default_rng(0)
    sizes = (3, 50, 7, 1, 20, 33, 5, 80, 2, 9)
    prompts = [rng.integers(0, TOKENIZER.vocab_size, n).tolist() for n in sizes]
    alone = [
        generate(model, [p], max_new_tokens=9 + 3 * i, stop_tokens=[EOS], seed=[i], **settings)[0]
        for i, p in enumerate(prompts)
    ]
    rows = [
        Row(prompt=p, max_new_tokens=9 + 3 * i, listener=None, settings=settings, stop_tokens={EOS}, seed=i)
        for i, p in enumerate(prompts)
    ]
    pieces = run_rows(rows, 4, model, pause=0.003)
    for row, made, (piece,) in zip(rows, alone, pieces, strict=True):
        assert row.ids == made.ids.tolist() and piece.finish == made.finish
        assert piece.text == continuation(row.prompt, row.ids)


def test_the_cache_is_computed_again_where_too_much_of_it_is_wasted(monkeypatch):
    monkeypatch.setattr(batching, "SLACK", 0)
    counts = []
    again = Batcher._compute_again
    monkeypatch.setattr(Batcher, "_compute_again", lambda self, *a: counts.append(a) or again(self, *a))
    prompts = [[1 + n] for n in range(40)]
    alone = [generate(MODEL, [p], max_new_tokens=8 + n % 5, temperature=0)[0] for n, p in enumerate(prompts)]
    rows = [
        Row(prompt=p, max_new_tokens=8 + n % 5, listener=None, settings={"temperature": 0.0})
        for n, p in enumerate(prompts)
    ]
    run_rows(rows, 2)
    assert [row.ids for row in rows] == [made.ids.tolist() for made in alone]
    assert len(counts) >= 2


def test_requests_that_come_together_are_decoded_together():
    model, widths = sharp(), []
    hidden = model.hidden
    model.hidden = lambda tokens, *rest: widths.append(tokens.shape) or hidden(tokens, *rest)
    rows = [Row(prompt=[1, 2, n], max_new_tokens=30, listener=None, settings={"temperature": 0.0}) for n in range(4)]
    run_rows(rows, 4, model)
    assert (4, 1) in widths and sum(width for width, length in widths if length == 1) >= 4 * 29
    assert len(widths) < 60  # alone, each would take 30 steps


def test_rows_after_a_request_that_met_nan_are_well():
    """What it left in the cache is behind a mask, and nan times nothing would still be nan."""
    model, bad = sharp(tie_word_embeddings=False), 7
    model.parameters[model.embedding_name].data[bad] = np.nan

    def finishes(*prompts):
        found, left = [], threading.Semaphore(0)
        listener = lambda piece: (found.append(piece.finish or type(piece.error).__name__), left.release())
        settings = {"temperature": 0.0}
        batcher.submit([Row(prompt=p, max_new_tokens=2, listener=listener, settings=settings) for p in prompts])
        for _ in prompts:
            assert left.acquire(timeout=20)
        return found

    with Batcher(model, TOKENIZER, 2, tell=lambda line: None) as batcher:
        batcher.submit([])  # nobody is asked for anything
        assert "length" not in finishes([bad] * 40)
        assert finishes([1, 2], [3] * 20) == ["length", "length"]


def test_requests_take_turns():
    """A large request does not keep the others waiting."""
    order, done = [], threading.Event()

    def listener(name):
        return lambda piece: (order.append(name), len(order) == 9 and done.set())

    batcher = Batcher(MODEL, TOKENIZER, 2)
    large = [Row(prompt=[1], max_new_tokens=3, listener=listener("large")) for _ in range(8)]
    batcher.submit(large)
    batcher.submit([Row(prompt=[2], max_new_tokens=3, listener=listener("small"))])
    with batcher:
        assert done.wait(10)
    assert order.index("small") <= 1


@pytest.mark.parametrize(
    "texts, stops, out",
    [
        (["He", "llo", " wor", "ld"], ["wo"], "Hello "),
        (["a", "b", "a", "b", "c"], ["abc"], "ab"),
        (["aa", "aab"], ["aab"], "aa"),
        (["x", "STO", "x", "STOP"], ["STOP"], "xSTOx"),
        (["abc"], ["c", "ab"], ""),
        (["no", "thing"], ["never"], "nothing"),
        (["end of S"], ["STOP"], "end of S"),
    ],
)
def test_stop_strings_never_leak(texts, stops, out):
    row = Row(prompt=[1], max_new_tokens=1, listener=None, stop_strings=tuple(stops), alternatives=0)
    writing, taken = Writing(TOKENIZER, row), []
    for text in texts:
        for token in TOKENIZER.encode(text).tolist():
            stopped = writing.push(token, None, [])
            piece, tokens = writing.take()
            taken.append(piece)
            assert all(token.offset < len("".join(taken)) for token in tokens)
            assert out.startswith("".join(taken))
            if stopped:
                break
        else:
            continue
        break
    writing.end()
    taken.append(writing.take(everything=True)[0])
    assert "".join(taken) == out


# ------------------------------------------------------------------ completions


def test_a_completion_is_what_generate_says(serve):
    service = serve()
    for prompt in ("Hello", "who is", ""):
        text, made = expected(ids(prompt))
        answer = complete(service, prompt, temperature=0).json
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
        choice["finish_reason"] = "length" if made.finish == "length" else "stop"
        assert answer["choices"] == [choice] and answer["object"] == "text_completion" and answer["model"] == "tiny"
        count = len(ids(prompt))
        usage = {"prompt_tokens": count, "completion_tokens": len(made.ids), "total_tokens": count + len(made.ids)}
        assert answer["usage"] == usage


@pytest.mark.parametrize("spelt", TOKENIZER.special_tokens)
def test_a_control_token_that_somebody_types_is_text(spelt, serve, monkeypatch):
    """In a turn and in a prompt: what the model is given has the template's control ids and no others."""
    service, given = serve(), []
    submit = service.batcher.submit
    monkeypatch.setattr(service.batcher, "submit", lambda rows: given.extend(rows) or submit(rows))
    control = set(TOKENIZER.special_tokens.values())
    count = lambda row: sum(i in control for i in np.asarray(row.prompt).tolist())
    assert chat(service, f"a {spelt} b", max_tokens=1).status == chat(service, "a b", max_tokens=1).status == 200
    assert count(given[0]) == count(given[1]) > 0
    assert complete(service, f"a{spelt}b", max_tokens=1).status == 200
    assert count(given[2]) == 1  # the begin that the server puts before every prompt


def test_a_checkpoints_own_stops_end_an_answer_too(serve):
    _, made = expected(ids("Hello"))
    whole = complete(serve(), "Hello", temperature=0).json["choices"][0]["text"]
    cut = complete(serve(stops={int(made.ids[3])}), "Hello", temperature=0).json["choices"][0]
    assert cut["finish_reason"] == "stop" and whole.startswith(cut["text"]) and len(cut["text"]) < len(whole)


@pytest.mark.parametrize(
    "prompt, lists",
    [
        ("Hello", [ids("Hello")]),
        (["Hello", "It is me, who"], [ids("Hello"), ids("It is me, who")]),
        ([40, 50, 60], [[40, 50, 60]]),
        ([[40, 50, 60], [41]], [[40, 50, 60], [41]]),
    ],
)
def test_prompts_of_every_kind_and_several_choices_with_a_seed(serve, prompt, lists):
    n = 2
    made = generate(
        MODEL, [p for p in lists for _ in range(n)], max_new_tokens=7, temperature=0.9, top_p=0.8, seed=5,
        stop_tokens=STOPS,
    )  # fmt: skip
    answer = complete(serve(), prompt, n=n, max_tokens=7, temperature=0.9, top_p=0.8, seed=5).json
    assert [choice["index"] for choice in answer["choices"]] == list(range(n * len(lists)))
    texts = [continuation(g.prompt, g.ids) for g in made]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert answer["usage"]["prompt_tokens"] == sum(map(len, lists))


def test_an_empty_prompt_is_the_begin_of_a_text_or_the_end_of_one(serve):
    for bos, before in ((TOKENIZER.bos, TOKENIZER.bos_id), (None, TOKENIZER.eos_id)):
        tokenizer = Tokenizer(TOKENIZER._backend, bos, TOKENIZER.eos, TOKENIZER.pad)
        with Service(MODEL, tokenizer, None, name="tiny") as service:
            answer = complete(service, "", temperature=0, max_tokens=3).json
        assert answer["usage"]["prompt_tokens"] == 1 and answer["choices"][0]["text"] == expected([before], 3)[0]


def test_echo_and_logprobs_are_the_models(serve):
    prompt = ids("Hello there é")
    (choice,) = complete(serve(), "Hello there é", temperature=0, max_tokens=3, logprobs=2, echo=True).json["choices"]
    text, made = expected(prompt, 3)
    assert choice["text"] == "Hello there é" + text
    scores, all_ids = choice["logprobs"], [*prompt, *made.ids.tolist()]
    assert {len(column) for column in scores.values()} == {len(all_ids)}
    logp = log_softmax(MODEL(np.array([all_ids])).data[0].astype(np.float64))
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    for n, token in enumerate(all_ids[1:], 1):
        assert scores["token_logprobs"][n] == pytest.approx(logp[n - 1, token], abs=1e-4)
        top = scores["top_logprobs"][n]
        assert 2 <= len(top) <= 3 and max(top.values()) == pytest.approx(logp[n - 1].max(), abs=1e-4)
        # what a harness calls greedy is exact
        greedy = token == logp[n - 1].argmax()
        assert (scores["token_logprobs"][n] == max(top.values())) == greedy
        assert greedy or n < len(prompt)
    for name, offset, token in zip(scores["tokens"], scores["text_offset"], all_ids, strict=True):
        if not name.startswith("bytes:") and token not in TOKENIZER.special_tokens.values():
            assert choice["text"][offset:].startswith(name)
    assert scores["tokens"][0] == "<s>" and sum(name.startswith("bytes:") for name in scores["tokens"]) >= 2


def test_scoring_alone(serve):
    service = serve()
    scored = complete(service, [[40, 50, 60]], temperature=0, max_tokens=0, logprobs=1, echo=True).json
    longer = complete(service, [[40, 50, 60]], temperature=0, max_tokens=1, logprobs=1, echo=True).json
    assert scored["usage"]["completion_tokens"] == 0 and scored["choices"][0]["finish_reason"] == "length"
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == 3
    assert (
        len(longer["choices"][0]["logprobs"]["tokens"]) == 4
    )  # a harness takes the last one off, so it has to be there
    full = complete(service, [40] * CONTEXT, max_tokens=0, echo=True, logprobs=0).json["choices"][0]["logprobs"]
    assert [len(top) for top in full["top_logprobs"][1:]] == [1] * (CONTEXT - 1)


def test_a_stop_token_counts_and_is_scored_but_not_written(serve):
    model = sharp()
    model.head.data[EOS] = 0
    (first,) = expected(ids("Hello"), 1, model)[1].ids.tolist()
    model.head.data[[EOS, first]] = model.head.data[[first, EOS]]
    (choice,) = (answer := complete(serve(model), "Hello", temperature=0, logprobs=0).json)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop") and answer["usage"]["completion_tokens"] == 1
    assert choice["logprobs"]["tokens"] == ["</s>"]


@pytest.mark.parametrize("stop_at", [2, 5, 9])
def test_a_stop_string_ends_the_text_before_it(serve, stop_at):
    service, (text, made) = serve(), expected(ids("It is"), 30)
    stop = text[stop_at : stop_at + 2]
    wanted = text[: text.index(stop)]
    for stops in (stop, ["§§", stop]):
        answer = complete(service, "It is", temperature=0, max_tokens=30, stop=stops, logprobs=0).json
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (wanted, "stop")
        assert answer["usage"]["completion_tokens"] <= len(made.ids)
        assert all(offset < max(len(wanted), 1) for offset in answer["choices"][0]["logprobs"]["text_offset"])
    events = complete(service, "It is", temperature=0, max_tokens=30, stop=stop, stream=True).events
    assert "".join(event["choices"][0]["text"] for event in events) == wanted


@pytest.mark.parametrize(
    "fields",
    [{}, {"n": 3}, {"echo": True, "logprobs": 2}, {"stop": ["e", "is"], "logprobs": 0, "n": 4}, {"max_tokens": 1}],
)
def test_the_pieces_of_a_stream_join_to_the_whole(serve, fields):
    service, fields = serve(), {"max_tokens": 25, "seed": 3, "temperature": 1.5, **fields}
    whole = complete(service, "Hello é", **fields).json
    reply = complete(service, "Hello é", stream=True, stream_options={"include_usage": True}, **fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, usage = reply.events
    assert usage["usage"] == whole["usage"] and usage["choices"] == []
    assert all(event["usage"] is None and len(event["choices"]) == 1 for event in events)
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        if choice["logprobs"]:
            for name, column in choice["logprobs"].items():
                assert [value for piece in mine for value in piece["logprobs"][name]] == column


def test_a_stream_never_breaks_a_character(serve):
    """Tokens are bytes for this model: a letter outside ASCII takes several."""
    model = sharp()
    service = serve(model)
    pieces = [TOKENIZER.encode(char).tolist() for char in "é🙂"]
    assert all(len(piece) > 1 for piece in pieces)
    wanted = [token for piece in pieces for token in piece]
    steps = iter(wanted)

    def hidden(tokens, *rest):
        found = np.zeros((*tokens.shape, TOKENIZER.vocab_size), np.float32)
        found[:, -1, next(steps)] = 9
        return Tensor(found)

    model.hidden = hidden
    model.used = {
        **model.used,
        "model.embed_tokens.weight": Tensor(np.eye(TOKENIZER.vocab_size, dtype=np.float32)),
    }
    events = complete(service, "Hello", temperature=0, max_tokens=len(wanted), stream=True).events
    assert [event["choices"][0]["text"] for event in events] == ["é", "🙂"]


def test_a_sampled_text_does_not_depend_on_its_neighbours(serve):
    service = serve(limits=Limits(rows=4))
    bodies = [
        {"prompt": "Hello " * n, "seed": n, "temperature": 1.0, "max_tokens": 10 + 5 * n, "logprobs": n % 2}
        for n in range(1, 9)
    ]

    async def together():
        return await asyncio.gather(*(request(service, "POST", "/v1/completions", body) for body in bodies))

    alone = [post(service, "/v1/completions", body).json["choices"][0]["text"] for body in bodies]
    assert [reply.json["choices"][0]["text"] for reply in asyncio.run(together())] == alone
    for body, text in zip(bodies, alone, strict=True):
        prompt = ids(body["prompt"])
        options = {"temperature": 1.0, "seed": body["seed"]}
        assert text == expected(prompt, body["max_tokens"], **options)[0]


def test_requests_without_a_seed_differ_and_repeat_with_the_server(serve):
    first = serve(seed=4)
    texts = [complete(first, "Hello", max_tokens=20).json["choices"][0]["text"] for _ in range(3)]
    assert len(set(texts)) == 3
    again = serve(seed=4)
    assert [complete(again, "Hello", max_tokens=20).json["choices"][0]["text"] for _ in range(3)] == texts
    assert complete(serve(seed=5), "Hello", max_tokens=20).json["choices"][0]["text"] != texts[0]


# ------------------------------------------------------------------ chat


def test_a_chat_answer_is_what_generate_says(serve):
    service = serve()
    prompt = render(talk("Hello"), "chatml", TOKENIZER, add_generation_prompt=True)[0].tolist()
    (made,) = generate(MODEL, [prompt], max_new_tokens=20, temperature=0, stop_tokens=STOPS)
    wanted = TOKENIZER.decode(made.ids, skip_special=True)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for content in ("Hello", parts):
        for name in ("max_tokens", "max_completion_tokens"):
            answer = chat(service, content, temperature=0, **{name: 20}).json
            assert answer["choices"][0]["message"] == {"role": "assistant", "content": wanted, "refusal": None}
            assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] == len(prompt)
    unlimited = chat(service, "Hello", temperature=0).json
    assert unlimited["usage"]["total_tokens"] <= CONTEXT and unlimited["choices"][0]["message"]["content"].startswith(
        wanted[:-1]
    )
    (choice,) = chat(service, "Hello", temperature=0, max_tokens=20, logprobs=True, top_logprobs=3).json["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode("utf-8", "replace") == wanted
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in content)
    assert {len(token["top_logprobs"]) for token in content} == {3}


def test_a_streamed_chat_answer_begins_with_the_role(serve):
    service, fields = serve(), {"max_tokens": 20, "seed": 1, "n": 2}
    whole = chat(service, "Hello", **fields).json
    events = chat(service, "Hello", stream=True, stream_options={"include_usage": True}, **fields).events
    assert events[-1]["usage"] == whole["usage"] and {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""} and mine[-1]["delta"] == {}
        assert "".join(piece["delta"].get("content", "") for piece in mine) == choice["message"]["content"]
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]


def test_a_model_that_was_never_taught_to_chat_says_so(serve):
    service = serve(template=None)
    assert "never taught to chat" in chat(service, "Hello").json["error"]["message"]
    assert complete(service, "Hello").status == 200


# ------------------------------------------------------------------ what else is there


def test_models_health_tokenizer_and_page(serve):
    service = serve(name="a <b>")
    (model,) = get(service, "/v1/models").json["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("a <b>", "model", CONTEXT)
    assert get(service, "/v1/models/a <b>").json == model
    assert get(service, "/v1/models/b").json["error"]["code"] == "model_not_found"
    assert get(service, "/health").json == {"status": "ok"}
    info = get(service, "/tokenizer_info").json
    assert info == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": None}
    text = "Hello </s> é"
    tokens = post(service, "/tokenize", {"prompt": text, "add_special_tokens": False}).json["tokens"]
    assert tokens == TOKENIZER.encode(text).tolist()
    assert post(service, "/tokenize", {"prompt": text}).json["tokens"] == ids(text)
    assert post(service, "/detokenize", {"tokens": tokens}).json == {"prompt": text}
    page = get(service, "/")
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", page.headers["content-security-policy"])[1]
    html = page.data.decode()
    assert "default-src 'none'" in page.headers["content-security-policy"] and html.count(f'nonce="{nonce}"') == 2
    assert "a &lt;b&gt;" in html and "<b>" not in html and "http" not in html.split("</title>")[1]
    assert (
        "innerHTML" not in html
        and get(service, "/").headers["content-security-policy"] != page.headers["content-security-policy"]
    )
    assert page.headers["x-content-type-options"] == "nosniff" and "access-control-allow-origin" not in page.headers


# ------------------------------------------------------------------ mistakes

DEEP = b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
BAD = [
    # the body
    (b"", 400, "the body is not usable JSON: expecting value, line 1, column 1"),
    (b"{", 400, "the body is not usable JSON: "),
    (b'{"prompt": "x",}', 400, "the body is not usable JSON: "),
    (b"[1]", 400, "it has to be an object"),
    (b'"x"', 400, "it has to be an object"),
    (b'{"prompt": "\xff"}', 400, "byte 0xff at position 12 is not UTF-8"),
    (b'{"prompt": "x", "temperature": NaN}', 400, "NaN is no number of JSON"),
    (b'{"prompt": "x", "temperature": -Infinity}', 400, "-Infinity is no number of JSON"),
    (b'{"prompt": "x", "temperature": 1e999}', 400, "temperature has to be a number from 0 to 2"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, "a number has too many digits"),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 4000 + b"}", 400, "the model's context is 96 tokens"),
    (DEEP, 400, "nested too deeply"),
    (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', 413, "the body is larger than 1,000,000 bytes"),
    ([b'{"prompt": "', *[b"x" * 65536] * 200, b'"}'], 413, "the body is larger than 1,000,000 bytes"),
    (b'{"prompt": "\\ud800"}', 400, "prompt: character 0 is the lone surrogate U+D800"),
    # fields
    ({}, 400, "prompt is missing"),
    ({"prompt": None}, 400, "prompt is missing"),
    ({"prompt": {}}, 400, "prompt has to be a text, a list of texts"),
    ({"prompt": []}, 400, "prompt has to be a text, a list of texts"),
    ({"prompt": [""], "max_tokens": 1.5}, 400, "max_tokens has to be a whole number of at least 1, and is 1.5"),
    ({"prompt": [[]]}, 400, "prompt[0] is empty"),
    ({"prompt": [1, "x"]}, 400, "prompt[1] has to be an id from 0 to"),
    ({"prompt": ["x", 1]}, 400, "prompt[1] has to be a text, and is 1"),
    ({"prompt": [[1], "x"]}, 400, "prompt[1] has to be a list of ids"),
    ({"prompt": [True]}, 400, "prompt[0] has to be a text, and is true"),
    ({"prompt": [-1]}, 400, "prompt[0] has to be an id from 0 to"),
    ({"prompt": [10**30]}, 400, "prompt[0] has to be an id from 0 to"),
    ({"prompt": ["x"] * 129}, 400, "prompt has 129 texts, and 128 are the most"),
    ({"prompt": ["x"] * 20, "n": 10}, 400, "n times the number of prompts is 200"),
    ({"prompt": "x" * 500}, 400, "the model's context is 96 tokens, and 501 are asked for"),
    ({"prompt": "x", "max_tokens": 95}, 400, "context is 96 tokens, and 97 are asked for: 2 of the prompt and 95 of"),
    ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens has to be a whole number of at least 1, and is -1"),
    ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens has to be a whole number of at least 1, and is 0"),
    ({"prompt": "x", "max_tokens": True}, 400, "max_tokens has to be a whole number of at least 1, and is true"),
    ({"prompt": "x", "max_tokens": "5"}, 400, "max_tokens has to be a whole number of at least 1, and is '5'"),
    ({"prompt": "x", "n": 0}, 400, "n has to be a whole number from 1 to 128, and is 0"),
    ({"prompt": "x", "n": 10**9}, 400, "n has to be a whole number from 1 to 128, and is 1000000000"),
    ({"prompt": "x", "temperature": -0.1}, 400, "temperature has to be a number from 0 to 2, and is -0.1"),
    ({"prompt": "x", "temperature": [1]}, 400, "temperature has to be a number from 0 to 2, and is [1]"),
    ({"prompt": "x", "top_p": 0}, 400, "top_p has to be a number above 0 and at most 1, and is 0"),
    ({"prompt": "x", "top_k": 0}, 400, "top_k has to be a whole number from 1 to"),
    ({"prompt": "x", "min_p": 2}, 400, "min_p has to be a number from 0 to 1, and is 2"),
    ({"prompt": "x", "repetition_penalty": 0}, 400, "repetition_penalty has to be a number above 0"),
    ({"prompt": "x", "seed": 2**64}, 400, "seed has to be a whole number"),
    ({"prompt": "x", "logprobs": 6}, 400, "logprobs has to be a whole number from 0 to 5, and is 6"),
    ({"prompt": "x", "logprobs": True}, 400, "logprobs has to be a whole number from 0 to 5, and is true"),
    ({"prompt": "x", "echo": 1}, 400, "echo has to be true or false, and is 1"),
    ({"prompt": "x", "stream": "yes"}, 400, "stream has to be true or false, and is 'yes'"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "needs stream to be true"),
    ({"prompt": "x", "stop": 3}, 400, "stop has to be a text that is not empty, or a list of such, and is 3"),
    ({"prompt": "x", "stop": ["a", ""]}, 400, "stop has to be a text that is not empty"),
    ({"prompt": "x", "stop": list("abcde")}, 400, "stop can have at most 4 texts"),
    ({"prompt": "x", "model": "gpt"}, 404, "there is no model 'gpt' here, only 'tiny'"),
    ({"prompt": "x", "model": 3}, 400, "model has to be a text, and is 3"),
    ({"prompt": "x", "presence_penalty": 0.5}, 400, "presence_penalty is not supported, and is 0.5: leave it out"),
    ({"prompt": "x", "best_of": 3}, 400, "best_of is not supported"),
    ({"prompt": "x", "max_token": 3}, 400, "no field 'max_token'; perhaps you meant max_tokens"),
]  # fmt: skip
BAD_CHATS = [
    ({}, 400, "messages is missing"),
    ({"messages": "Hello"}, 400, "messages has to be a list of messages, and is 'Hello'"),
    ({"messages": []}, 400, "messages is empty"),
    ({"messages": ["Hello"]}, 400, "messages[0] has to be an object with role and content, and is 'Hello'"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0]: content is missing"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0]: role is 'king', not one of"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0]: content: text has to be a string"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages[0]: content: character 0 is the lone"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0] has to be"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, 400, "tool calls are not supported"),
    ({"messages": talk("x" * 500)}, 400, "the model's context is 96 tokens, and"),
    ({"messages": talk("x"), "max_completion_tokens": 96}, 400, "of max_completion_tokens"),
    ({"messages": talk("x"), "logprobs": 1}, 400, "logprobs has to be true or false, and is 1"),
    ({"messages": talk("x"), "top_logprobs": 1}, 400, "top_logprobs needs logprobs to be true"),
    ({"messages": talk("x"), "tools": [{"type": "function"}]}, 400, "tools is not supported"),
    ({"messages": talk("x"), "response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
    ({"messages": talk("x"), "prompt": "x"}, 200, ""),
]


def test_a_malformed_request_is_one_clear_error_and_the_next_is_answered(serve):
    service = serve()
    good = complete(service, "Hello", temperature=0, max_tokens=3)
    cases = [("/v1/completions", *case) for case in BAD] + [("/v1/chat/completions", *case) for case in BAD_CHATS]
    cases += [
        ("/tokenize", {"prompt": 3}, 400, "prompt: text has to be a string"),
        ("/tokenize", {}, 400, "prompt is missing"),
    ]
    cases += [
        ("/detokenize", {"tokens": [10**9]}, 400, "tokens[0] has to be an id"),
        ("/detokenize", {"tokens": 3}, 400, "list of ids"),
    ]
    for path, body, status, message in cases:
        reply = post(service, path, body)
        said = f"{path} {str(body)[:80]}: {reply.status} {reply.data[:200]}"
        assert reply.status == status, said
        if status != 200:
            error = reply.json["error"]
            assert set(error) == {"message", "type", "param", "code"} and message in error["message"], said
            assert "\n" not in error["message"] and len(error["message"]) < 300, said
        again = complete(service, "Hello", temperature=0, max_tokens=3)
        assert again.json["choices"] == good.json["choices"], said
    assert service.in_work == 0


@pytest.mark.parametrize(
    "method, path, options, status, message",
    [
        ("GET", "/nothing", {}, 404, "there is nothing at '/nothing'"),
        ("GET", "/../../etc/passwd", {}, 404, "there is nothing at"),
        ("GET", "/v1/models/../../../etc/passwd", {}, 404, "there is no model"),
        ("GET", "/v1/completions", {}, 405, "GET is not possible here"),
        ("OPTIONS", "/v1/completions", {}, 405, "OPTIONS is not possible here"),
        ("POST", "/v1/models", {"body": {}}, 405, "POST is not possible here"),
        (
            "POST",
            "/v1/completions",
            {"body": {}, "headers": {"content-type": "text/plain"}},
            415,
            "and is 'text/plain'",
        ),
        ("POST", "/v1/completions", {"body": {}, "headers": {"content-type": ""}}, 415, "application/json"),
        ("POST", "/v1/completions", {"body": {}, "headers": {"content-encoding": "gzip"}}, 415, "Content-Encoding"),
        ("POST", "/v1/completions", {"body": {}, "headers": {"content-length": "10000000"}}, 413, "larger than"),
        ("GET", "/", {"headers": {"host": "evil.example"}}, 403, "and the request for 'evil.example'"),
        ("GET", "/", {"headers": {"host": "localhost.evil.example:8000"}}, 403, "this server is for"),
        ("GET", "/v1/models", {"headers": {"origin": "http://evil.example"}}, 403, "pages of 'http://evil.example'"),
        ("GET", "/v1/models", {"headers": {"origin": "null"}}, 403, "pages of 'null'"),
    ],
)
def test_a_foreign_or_misdirected_request_is_refused(serve, method, path, options, status, message):
    service = serve(hosts=script.LOCAL)
    reply = asyncio.run(request(service, method, path, **options))
    assert reply.status == status and message in reply.json["error"]["message"]
    for host in ("127.0.0.1:8000", "localhost:1", "[::1]:8000", "LOCALHOST"):
        assert get(service, "/health", headers={"host": host, "origin": f"http://{host}"}).status == 200


def test_the_key(serve):
    service = serve(api_key="secret")
    for headers in ({}, {"authorization": "Bearer secre"}, {"authorization": "secret"}, {"authorization": "Bearer é"}):
        reply = get(service, "/v1/models", headers=headers)
        assert reply.status == 401 and reply.json["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert get(service, "/v1/models", headers={"authorization": "Bearer secret"}).status == 200
    assert get(service, "/").status == get(service, "/health").status == 200


def test_unknown_fields_are_ignored_and_logged_and_neutral_ones_pass(serve):
    rows = []
    service = serve(log=rows.append)
    fields = {"user": "me", "metadata": {}, "presence_penalty": 0, "logit_bias": {}, "suffix": None, "best_of": 1}
    assert complete(service, "Hello", max_tokens=2, **fields).status == 200
    (row,) = rows
    assert row["ignored"] == ["user", "metadata"] and row["step"] == 1 and row["status"] == 200
    assert (row["completion_tokens"], row["prompt_tokens"], row["choices"]) == (2, len(ids("Hello")), 1)
    assert 0 <= row["time_to_first_token"] <= row["seconds"] and row["tokens_per_second"] > 0
    assert "Hello" not in json.dumps(row)


# ------------------------------------------------------------------ limits, clients that leave, faults


def test_too_many_requests_are_told_to_come_back(serve):
    service = serve(limits=Limits(rows=1, requests=2))

    async def crowd():
        body = {"prompt": "Hello", "max_tokens": 80, "temperature": 0}
        return await asyncio.gather(*(request(service, "POST", "/v1/completions", body) for _ in range(5)))

    replies = asyncio.run(crowd())
    assert sorted(reply.status for reply in replies) == [200, 200, 429, 429, 429]
    refused = next(reply for reply in replies if reply.status == 429)
    assert refused.headers["retry-after"] == "1" and refused.json["error"]["type"] == "rate_limit_error"
    assert complete(service, "Hello").status == 200


def test_the_longest_answer_can_be_limited(serve):
    service = serve(limits=Limits(max_new_tokens=5))
    assert "from 1 to 5, and is 6" in complete(service, "Hello", max_tokens=6).json["error"]["message"]
    assert chat(service, "Hello", temperature=0).json["usage"]["completion_tokens"] <= 5


@pytest.mark.parametrize("stream, leave_after", [(True, 1), (True, 0), (False, 0)])
def test_a_client_that_leaves_frees_its_rows(serve, stream, leave_after):
    rows = []
    service = serve(limits=Limits(rows=2), log=rows.append)
    body = {"prompt": "Hello", "max_tokens": 85, "n": 20, "stream": stream, "temperature": 1.5}
    post(service, "/v1/completions", body, leave_after=leave_after)
    assert rows[0]["status"] == 499 and service.in_work == 0
    assert complete(service, "Hello", max_tokens=2).status == 200
    assert rows[0].get("completion_tokens", 0) < 20 * 85 and not service.batcher.requests


def test_a_fault_of_the_model_is_an_error_and_the_server_goes_on(serve):
    told, model = [], sharp()
    service, hidden = serve(model, tell=told.append), model.hidden
    good = complete(service, "Hello", temperature=0).json["choices"]

    def broken(tokens, *rest):
        if tokens.shape[1] == 1:
            raise MemoryError("no room")
        return hidden(tokens, *rest)

    model.hidden = broken
    reply = complete(service, "Hello", temperature=0)
    assert reply.status == 500 and reply.json["error"]["message"] == "the answer could not be computed: MemoryError"
    streamed = complete(service, "Hello", temperature=0, stream=True).data.decode().split("\n\n")
    assert json.loads(streamed[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in streamed
    (line, _) = told
    assert line.startswith("error in the model: MemoryError: no room (") and "\n" not in line
    model.hidden = lambda *a: Tensor(hidden(*a).data * np.nan)
    assert complete(service, "Hello").status == 500
    model.hidden = hidden
    assert complete(service, "Hello", temperature=0).json["choices"] == good


def test_a_fault_of_the_server_is_one_line(serve, monkeypatch):
    told = []
    service = serve(tell=told.append)
    monkeypatch.setattr(service, "_model", lambda: {}["x"])
    assert get(service, "/v1/models").status == 500 and told == ["error: KeyError: 'x'"]
    assert get(service, "/health").status == 200


def test_a_body_that_does_not_come(serve, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.05)
    service = serve()

    async def slow():
        found = []

        async def receive():
            await asyncio.sleep(5)

        async def send(message):
            found.append(message)

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/tokenize", "query_string": b"", "headers": headers}
        await service(scope | {"root_path": ""}, receive, send)
        return found[0]["status"]

    assert asyncio.run(slow()) == 408


def test_what_is_under_way_at_the_end_is_told(serve):
    service = serve(limits=Limits(rows=1))

    async def late():
        body = {"prompt": "Hello", "max_tokens": 85, "n": 20}
        task = asyncio.create_task(request(service, "POST", "/v1/completions", body))
        while not service.batcher.rows:
            await asyncio.sleep(0.001)
        service.batcher.drain(0)
        return await task, await request(service, "POST", "/v1/completions", body)

    for reply in asyncio.run(late()):
        assert reply.status == 503 and reply.json["error"]["message"] == "the server is shutting down"


# ------------------------------------------------------------------ the program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    save_model(folder, MODEL, TOKENIZER, "chatml")
    return folder


def test_the_program(folder, tmp_path):
    """A real server on a port of its own: a request, a stream, a port that is taken, SIGTERM."""
    command = [sys.executable, str(ROOT / "scripts/serve.py"), str(folder)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    arguments = ["--port", "0", "--out", tmp_path / "log", "--grace", "0.3"]
    with subprocess.Popen([*command, *map(str, arguments)], **options) as running:
        try:
            assert re.fullmatch(r".*: [\d,]+ parameters, context 96, template chatml\n", running.stdout.readline())
            port = int(re.search(r"http://127\.0\.0\.1:(\d+) is open", running.stdout.readline())[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            for body in (
                {"prompt": "Hello", "temperature": 0},
                b"{" * 3_000_000,
                {"prompt": "Hello", "temperature": 0},
            ):
                data = body if isinstance(body, bytes) else json.dumps(body)
                connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                found = json.loads(reply.read())
                if isinstance(body, bytes):
                    assert (reply.status, found["error"]["message"]) == (413, "the body is larger than 1,000,000 bytes")
                else:
                    assert found["choices"][0]["text"] == expected(ids("Hello"))[0]
            many = json.dumps({"prompt": "Hello", "max_tokens": 90, "n": 128, "stream": True})
            connection.request("POST", "/v1/completions", many, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            assert reply.readline().startswith(b"data: {")
            running.send_signal(signal.SIGTERM)
            rest = reply.read().decode()
            assert "[DONE]" in rest or "the server is shutting down" in rest
            out, err = running.communicate(timeout=20)
        finally:
            running.kill()
    assert (running.returncode, out, err) == (0, "ended after 4 requests\n", "")
    log = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4] and [row["status"] for row in log[:3]] == [200, 413, 200]


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ("", 2, "MODEL is missing: the folder of the model to serve"),
        ("{tiny} --port 70000", 2, "--port has to be from 0 to 65535, and is 70000"),
        ("{tiny} --max-rows 0", 2, "--max-rows has to be at least 1, and is 0"),
        ("{tiny} --host 0.0.0.0", 2, "--host 0.0.0.0 lets other machines in: give them an --api-key, or leave it out"),
        ("{tiny} --host example.com", 2, "--host example.com lets other machines in"),
        ("{tiny} --grace nan", 2, "--grace has to be from 0 to 3600, and is nan"),
        ("{tiny} --prot 1", 2, "perhaps you meant --port"),
        ("absent", 1, "absent: no such folder"),
        ("{tiny} --api-key @absent", 1, "absent: No such file or directory"),
        ("{tiny} --api-key é", 1, "--api-key: an API key is of ASCII letters"),
        ("{tiny} --template none", 1, "--template 'none' is none of chatml"),
        ("{tiny} --port {taken}", 1, "can not be used (address already in use): take another port, or 0 for any"),
    ],
)
def test_a_mistake_is_one_line(arguments, code, message, folder, tmp_path, monkeypatch, status_of):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = arguments.format(tiny=folder, taken=taken.getsockname()[1]).split()
        status, out, err = status_of(script.main, "serve.py", *words)
    assert (status, out) == (code, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [socket.gaierror(socket.EAI_NONAME, "Name or service not known"), OSError(errno.EADDRNOTAVAIL, "?")]
)
def test_a_host_that_is_none_of_this_machine_is_told_so_and_no_other_port_advised(error, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(error))
    told = r"--host nosuch --port 8000 can not be used \(.*\): take an address of this machine, such as 127\.0\.0\.1$"
    with pytest.raises(ValueError, match=told):
        script.listen("nosuch", 8000)


def test_without_the_extra_it_is_named(folder, monkeypatch, status_of):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "uvicorn")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    status, _, err = status_of(script.main, "serve.py", folder)
    assert (status, err) == (
        1,
        'serve.py: uvicorn is not installed; it comes with: pip install "minillm-train[serve]"\n',
    )


class Missing:
    """An importer that has no uvicorn."""

    def find_spec(self, name, path=None, target=None):
        if name == "uvicorn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_which_hosts_are_local():
    assert script.Options(model=Path("x"), host="127.0.0.2").hosts() == script.LOCAL | {"127.0.0.2"}
    assert script.Options(model=Path("x"), host="::1").hosts() == script.LOCAL
    assert script.Options(model=Path("x"), host="0.0.0.0", api_key="k").hosts() is None
