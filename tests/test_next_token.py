"""scripts/next_token.py: the numbers are the model's, and the bars are the numbers."""

import importlib.util
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from minillm.chat import render
from minillm.generate import generate, next_probabilities
from minillm.model import Config, build
from minillm.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from minillm.trainers.common import save_model

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("scripts.next_token", ROOT / "scripts/next_token.py")
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script  # where the help finds the source of its options
spec.loader.exec_module(script)

spelled = script.spelled
TOKENIZER = Tokenizer.train(["user assistant Hello there, who is it? It is me."] * 9, SMALLEST_VOCABULARY + 30)
OTHER = Tokenizer.train(["some other words here and there"] * 9, SMALLEST_VOCABULARY + 30)
V = TOKENIZER.vocab_size


def sharp(seed=1, **options):
    """A model whose distributions are far from uniform, with three rows more than there are tokens."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
    model = build(Config(vocab_size=V + 3, **sizes, **options))
    model.flat += 0.5 * np.random.default_rng(seed).standard_normal(model.flat.size).astype(np.float32)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_model(root / "sft", sharp(), TOKENIZER, "chatml")
    save_model(root / "ppo", sharp(2), TOKENIZER, "chatml")
    save_model(root / "reward", sharp(head="scalar"), TOKENIZER, "chatml")
    save_model(root / "other", sharp(), OTHER)
    save_model(root / "no_begin", sharp(), Tokenizer.train([], V, bos=None), "chatml")
    shutil.copytree(root / "sft", root / "elsewhere/sft")
    (root / "sft.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    return root


@pytest.fixture
def run(world, monkeypatch, status_of):
    """Runs the script in the world, on a terminal of 80 columns; returns its exit status, output and error output."""

    def run(*arguments, columns=80):
        monkeypatch.chdir(world)
        monkeypatch.setenv("COLUMNS", str(columns))
        return status_of(script.main, "next_token.py", *arguments)

    return run


def begin(text):
    return [TOKENIZER.bos_id, *TOKENIZER.encode(text).tolist()]


def percents(line):
    return [float(number) for number in re.findall(r"(\d+\.\d\d)%", line)]


def eighths(line):
    """How long the bar at the end of a line is."""
    bar = re.search("█*[▏▎▍▌▋▊▉]?$", line)[0]
    return sum(8 if c == "█" else script.EIGHTHS.index(c) for c in bar)


# ------------------------------------------------------------------ one distribution


def test_the_likeliest_tokens_with_their_probabilities(run):
    p = next_probabilities(sharp(), begin("who is"))
    order = np.argsort(-p, kind="stable")[:15]
    status, out, err = run("sft", "who is")
    head, *rows, others, entropy, perplexity = out.splitlines()
    assert (status, err) == (0, "") and head == "".join(spelled(i, TOKENIZER) for i in begin("who is"))
    for i, row in zip(order.tolist(), rows, strict=True):
        assert row.startswith(f"{spelled(i, TOKENIZER)} ")
        assert percents(row) == [round(100 * p[i], 2)] or "<0.01%" in row
    assert others.startswith(f"{V + 3 - 15:,} others ")
    assert abs(sum(map(sum, map(percents, [*rows, others]))) - 100) <= 16 * 0.005 + 1e-9
    bits = -(p * np.log2(p)).sum()
    assert entropy.split() == ["entropy", f"{bits:.2f}", "bits"]
    assert perplexity.split() == ["perplexity", f"{2**bits:.1f}"]


@pytest.mark.parametrize("columns", [20, 60, 80, 100, 300])
def test_bars_fall_with_the_probability_and_fit_the_terminal(columns, run):
    _, out, _ = run("sft", "who is", "--top", 30, columns=columns)
    rows = out.splitlines()[1:31]
    lengths, shares = list(map(eighths, rows)), [sum(percents(row)) for row in rows]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] % 8 == 0
    assert max(map(script.columns, out.splitlines())) == min(max(columns, 50), 100)  # the longest bar fills its column
    for length, share in zip(lengths, shares, strict=True):
        assert abs(length - lengths[0] * share / shares[0]) <= 1


def test_the_whole_vocabulary_adds_up_to_one(run):
    _, out, _ = run("sft", "who is", "--top", 9999)
    rows = out.splitlines()[1:-2]
    assert len(rows) == V + 3 and "other" not in out
    p = next_probabilities(sharp(), begin("who is"))
    assert abs(sum(map(sum, map(percents, rows))) - 100 * p[p >= 0.00005].sum()) < 0.005 * len(rows)
    assert sum(row.startswith("(id ") for row in rows) == 3  # rows of the embedding that are no token
    assert any(row.startswith("<|im_end|> ") for row in rows) and any(row.startswith("‹⏎› ") for row in rows)
    assert "1 other " in run("sft", "who is", "--top", V + 2)[1]


def test_temperature_sharpens_and_flattens(run):
    first = lambda *arguments: percents(run("sft", "who is", *arguments)[1].splitlines()[1])[0]
    assert first("--temperature", 0.2) > first() == first("--temperature", 1) > first("--temperature", 5)


def test_without_a_text_it_is_the_beginning_of_a_document(run):
    status, out, _ = run("sft")
    likeliest = next_probabilities(sharp(), begin("")).argmax()
    assert status == 0 and out.splitlines()[0] == "<s>"
    assert out.splitlines()[1].startswith(f"{spelled(likeliest, TOKENIZER)} ")
    assert out == run("sft", "")[1]
    assert run("no_begin", "a")[0] == 0


def test_blanks_show(run):
    assert run("sft", "who \n\t\x1b")[1].startswith("<s>‹who›‹ ›‹⏎›‹\\t›‹\\x1b›\n")


def test_a_long_text_shows_its_end(run):
    head = run("sft", "who is it? " * 5)[1].splitlines()[0]
    assert head.startswith("…‹") and head.endswith("‹?›‹ ›") and 70 < len(head) <= 80


def test_wide_and_long_tokens_keep_the_columns():
    words = ["日本語", "e\u0301" * 5, "a" * 99, "<"]
    tokenizer = Tokenizer.train([" ".join(words)] * 99, SMALLEST_VOCABULARY + 120)
    ids = [int(tokenizer.encode(word)[0]) for word in words]
    p = np.zeros(tokenizer.vocab_size)
    p[ids] = 0.4, 0.3, 0.2, 0.1
    rows = list(script.table([p], ["m"], tokenizer, 4, 60))[:4]
    assert len({script.columns(row.partition("%")[0]) for row in rows}) == 1
    assert max(map(script.columns, rows)) == 60 and "…" in rows[2]
    assert script.columns("日本語") == 6 and script.columns("e\u0301") == 1 and script.clipped("日本語", 4) == "日…"


def test_certainty_and_its_measures():
    one, half = np.array([1.0, 0.0, 0.0]), np.array([0.5, 0.5, 0.0])
    assert script.entropy(one) == 0 and math.copysign(1, script.entropy(one)) == 1
    assert script.entropy(half) == 1 and script.entropy(np.full(8, 1 / 8)) == 3
    assert script.divergence(one, half) == 1 and script.divergence(half, one) == math.inf
    assert script.divergence(half, half) == 0
    assert [script.percent(p) for p in (1.0, 0.12345, 0.00004, 0.0)] == ["100.00%", "12.35%", "<0.01%", "0.00%"]
    rows = list(script.table([one], ["m"], TOKENIZER, 3, 60))
    assert eighths(rows[0]) > 0 == eighths(rows[1]) and rows[-1].split() == ["perplexity", "1.0"]


def test_colour_is_for_terminals(run, monkeypatch):
    assert "\x1b" not in run("sft", "who is", "--top", 99)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    colored = run("sft", "who is", "--top", 99)[1]
    assert "\x1b[36m█" in colored and "\x1b[1m<" in colored
    monkeypatch.setenv("NO_COLOR", "1")
    assert re.sub(r"\x1b\[\d+m", "", colored).replace(" ", "") == run("sft", "who is", "--top", 99)[1].replace(" ", "")


# ------------------------------------------------------------------ conversations, steps, two models


def test_chat_shows_how_an_answer_begins(run, world):
    question = render([{"role": "user", "content": "Hello"}], "chatml", TOKENIZER, add_generation_prompt=True)[0]
    (answer,) = generate(sharp(), [question], max_new_tokens=1, temperature=0)
    for arguments in (["--chat", "sft", "Hello"], ["sft", "--chat", "Hello"], ["sft", "Hello", "--chat"]):
        status, out, err = run(*arguments, "--top", 1)
        assert (status, err) == (0, "")
        assert out.splitlines()[1].startswith(f"{spelled(answer.ids[0], TOKENIZER)} ")
    assert out == run("sft", "Hello", "--chat", "True", "--top", 1)[1]
    assert out.splitlines()[0] == "".join(spelled(i, TOKENIZER) for i in question)
    forged = run("sft", "<|im_end|>", "--chat")[1].splitlines()[0]
    assert "‹|›‹>›<|im_end|>" in forged and forged.count("<|im_end|>") == 1
    assert run("sft", "Hi", "--chat", "--template", "sft.jinja")[1].startswith("‹H›‹i›<|im_end|>\n")
    err = run("other", "Hello", "--chat")[2]
    assert err == "other was never taught to chat: chatml is only a guess\n"


def test_steps_go_on_with_the_likeliest(run):
    (text,) = generate(sharp(), [begin("who")], max_new_tokens=4, temperature=0, stop_tokens=[TOKENIZER.eos_id])
    status, out, _ = run("sft", "who", "--steps", 4)
    tables, ids = out.split("\n\n"), begin("who")
    assert status == 0 and len(tables) == 4 == len(text.ids)
    for token, shown in zip(text.ids.tolist(), tables, strict=True):
        head, first, *rest = shown.splitlines()
        assert head == "".join(spelled(i, TOKENIZER) for i in ids) and first.startswith(f"{spelled(token, TOKENIZER)} ")
        assert len(rest) == 4 + 3  # five tokens
        ids.append(token)
    assert tables[0] + "\n" == run("sft", "who", "--top", 5)[1]


def test_steps_end_with_the_text_and_with_the_context(run, monkeypatch):
    (text,) = generate(sharp(), [begin("who")], max_new_tokens=3, temperature=0)
    monkeypatch.setattr(script, "prompt_of", lambda *_: (begin("who"), {int(text.ids[1])}))
    assert len(run("sft", "who", "--steps", 9)[1].split("\n\n")) == 2 - (text.ids[0] == text.ids[1])
    monkeypatch.setattr(script, "prompt_of", lambda *_: ([5] * 38, set()))
    *tables, last = run("sft", "who", "--steps", 9)[1].split("\n\n")
    assert len(tables) == 2 and last == "the context is full\n"


def test_two_models_side_by_side(run):
    p, q = (next_probabilities(sharp(seed), begin("who is")) for seed in (1, 2))
    order = np.argsort(-(p + q), kind="stable")[:15].tolist()
    status, out, err = run("sft", "who is", "--compare", "ppo")
    _, names, *rows, others, entropy, perplexity, divergence = out.splitlines()
    assert (status, err) == (0, "") and names.split() == ["sft", "ppo"]
    right = names.index("ppo")  # where the second column begins
    full, largest = max(map(eighths, rows)), max(p[order].max(), q[order].max())
    for i, row in zip(order, rows, strict=True):
        assert row.startswith(f"{spelled(i, TOKENIZER)} ")
        for part, share in ((row[:right], p[i]), (row[right:], q[i])):
            assert percents(part) == [round(100 * share, 2)] or "<0.01%" in part
            assert abs(eighths(part.rstrip()) - full * share / largest) <= 1
    for part in (slice(right), slice(right, None)):
        assert abs(sum(sum(percents(row[part])) for row in [*rows, others]) - 100) < 0.1
    assert full % 8 == 0 and max(map(script.columns, out.splitlines())) <= 80
    bits = lambda p, q: (p * np.log2(p / q)).sum()
    assert divergence == f"KL(sft || ppo) {bits(p, q):.2f} bits, the other way {bits(q, p):.2f}"
    assert entropy.split()[1::2] == [f"{-(x * np.log2(x)).sum():.2f}" for x in (p, q)]
    assert len(perplexity.split()) == 3


def test_two_models_of_one_name_and_each_ones_own_template(run, world):
    names = run("sft", "who", "--compare", "elsewhere/sft")[1].splitlines()[1]
    assert names.split() == ["sft", "elsewhere/sft"]
    same = run("sft", "who", "--compare", "elsewhere/sft")[1].splitlines()
    assert same[-1] == "KL(sft || elsewhere/sft) 0.00 bits, the other way 0.00"
    shutil.copytree(world / "sft", world / "jinja")
    (world / "jinja/minillm.json").unlink()
    shutil.copy(world / "sft.jinja", world / "jinja/chat_template.jinja")
    p = next_probabilities(sharp(), [*TOKENIZER.encode("Q").tolist(), TOKENIZER.special_tokens["<|im_end|>"]])
    rows = run("sft", "Q", "--chat", "--compare", "jinja", "--top", V + 3)[1].splitlines()
    (row,) = [row for row in rows if row.startswith(f"{spelled(int(p.argmax()), TOKENIZER)} ")]
    assert percents(row)[-1] == round(100 * p.max(), 2)


def test_steps_of_two_models_go_on_with_what_the_first_would_say(run):
    likeliest = int(next_probabilities(sharp(), begin("who")).argmax())
    p, q = (next_probabilities(sharp(seed), [*begin("who"), likeliest]) for seed in (1, 2))
    first, second = run("sft", "who", "--compare", "ppo", "--steps", 2)[1].split("\n\n")
    assert first.splitlines()[0] + spelled(likeliest, TOKENIZER) == second.splitlines()[0]
    bits = [f"{(a * np.log2(a / b)).sum():.2f}" for a, b in ((p, q), (q, p))]
    assert second.splitlines()[-1] == f"KL(sft || ppo) {bits[0]} bits, the other way {bits[1]}"


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ("", 2, "MODEL is missing: the folder of the model to look into"),
        ("sft a --top 0", 2, "--top has to be at least 1, and is 0"),
        ("sft a --steps 0", 2, "--steps has to be at least 1, and is 0"),
        ("sft a --temperature 0", 2, "--temperature has to be above 0, and is 0.0"),
        ("sft a --temperature inf", 2, "--temperature has to be above 0, and is inf"),
        ("sft a --top many", 2, "--top: it takes N"),
        ("sft a b", 2, "Unrecognized options: b"),
        ("sft a --temprature 1", 2, "Unrecognized options: --temprature; perhaps you meant --temperature"),
        ("sft --chat", 2, "--chat needs a text, what the user says"),
        ("sft a --template chatml", 2, "--template goes with --chat"),
        ("sft a --chat --template lama2", 1, "--template 'lama2' is none of chatml, llama2, llama3, alpaca"),
        ("absent a", 1, "absent: no such folder"),
        ("reward a", 1, "reward is a reward model, and a language model is needed"),
        ("sft a --compare absent", 1, "absent: no such folder"),
        ("sft a --compare reward", 1, "reward is a reward model, and a language model is needed"),
        ("sft a --compare other", 1, "other and sft have different tokenizers"),
        ("no_begin", 1, "no_begin: this tokenizer has no token for the beginning of a document: give a text"),
        (f"sft {'a' * 39}", 1, "the text has 40 tokens, and the model's context is 40"),
    ],
)
def test_a_mistake_is_one_line(arguments, code, message, run):
    status, out, err = run(*arguments.split())
    assert (status, out) == (code, "") and err.startswith("next_token.py: ") and message in err
    assert len(err.splitlines()) == 1 and "Traceback" not in err


def test_help(run):
    status, out, err = run("--help")
    assert status == 0 and "--compare PATH" in out and err == "" and max(map(len, out.splitlines())) <= 80
