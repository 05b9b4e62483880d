"""
Show what a model sees of a conversation, and which of its tokens are trained.

    python scripts/render.py chats.jsonl --row 3 --show-mask
    python scripts/render.py chat.json --template llama3 --tokenizer tokenizer.json
    echo '{"messages": [{"role": "user", "content": "Hi"}]}' | python scripts/render.py - --add-generation-prompt

FILE holds conversations, {"messages": [{"role": ..., "content": ...}, ...]}: one as JSON, or one in each line. Without
--tokenizer every byte is a token. Colours end where the output is no terminal, unless --color always.
"""

import os
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm import chat
from minillm.files import parse_json
from minillm.tokenizer import Tokenizer

# Neighbours get different shades, so that the borders between tokens show: (first, second) of not trained and trained.
SHADES = {False: ("\x1b[0m", "\x1b[100m"), True: ("\x1b[30;42m", "\x1b[30;102m")}
BRACKETS = {False: ("‹", "›"), True: ("⟦", "⟧")}


def conversations(text, name):
    """Yields (place, object) for the conversations of a file: one JSON object, a list of them, or one in each line.

    ValueError, beginning with name:line, where a line is no JSON. Lines end at \\n only: JSON strings may hold U+2028.
    """
    try:
        whole = parse_json(text)
    except ValueError as error:
        if name.endswith(".json"):
            raise ValueError(f"{name}: {error}") from None
    else:
        whole = whole if isinstance(whole, list) else [whole]
        yield from ((f"{name}:{n}", row) for n, row in enumerate(whole, 1))
        return
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{name}:{n}", parse_json(line)
            except ValueError as error:
                raise ValueError(f"{name}:{n}: {error}") from None


def masked_view(ids, mask, tokenizer, color):
    """The tokens of a conversation with those that are trained set off, by colour or by brackets."""
    shown = []
    for n, (token, trained) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        first, last = (SHADES[trained][n % 2], "\x1b[0m") if color else BRACKETS[trained]
        shown += [first, tokenizer.visible(token), last, "\n" * (b"\n" in tokenizer.token_bytes(token))]
    legend = "\x1b[30;42mtrained\x1b[0m  not trained" if color else "⟦trained⟧ ‹not trained›"
    return "".join(shown).rstrip("\n") + f"\n\n{legend}"


def show(row, options, template, tokenizer, color):
    """Prints one conversation. ValueError: it is none, or not one for this template."""
    if not isinstance(row, dict) or "messages" not in row:
        raise ValueError('not an object with "messages"')
    pieces = chat.segments(row["messages"], template, tokenizer, options.add_generation_prompt)
    ids, mask = chat.encode_segments(pieces, tokenizer)
    print(masked_view(ids, mask, tokenizer, color) if options.show_mask else "".join(piece.text for piece in pieces))
    print(f"{len(ids)} tokens, {mask.sum()} trained")


def main():
    parser = command_line.Parser(prog="render.py", description="Show a conversation as a model sees it.")
    parser.add_argument("file", metavar="FILE", help='JSON or JSONL with {"messages": [...]}, or - for standard input')
    parser.add_argument(
        "--template",
        default="chatml",
        metavar="NAME|PATH",
        help=f"{', '.join(chat.TEMPLATES)}, a Jinja file, or a checkpoint's folder (chatml)",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or its folder (one token for each byte)")
    parser.add_argument("--show-mask", action="store_true", help="show the tokens, and which of them are trained")
    parser.add_argument("--row", type=int, metavar="N", help="only the N-th conversation, counted from 1 (all)")
    parser.add_argument("--add-generation-prompt", action="store_true", help="end with what stands before an answer")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto")
    options = parser.parse_args()
    if options.row is not None and options.row < 1:
        parser.error(f"--row counts from 1, and got {options.row}")
    color = options.color == "always" or (
        options.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    sys.stdout.reconfigure(encoding="utf-8")

    name = "stdin" if options.file == "-" else options.file
    try:
        template = options.template
        if template not in chat.TEMPLATES:
            if not Path(template).exists():
                parser.error(f"no template {template!r}: {', '.join(chat.TEMPLATES)}, or a Jinja file")
            template = chat.load_template(template)
        path = options.tokenizer
        tokenizer = Tokenizer.load(path) if path else chat.bytes_tokenizer()
        text = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
        rows = conversations(text.decode("utf-8"), name)
        empty = True
        for place, row in islice(rows, options.row and options.row - 1, options.row):
            empty = False
            try:
                show(row, options, template, tokenizer, color)
            except ValueError as error:
                parser.error(f"{place}: {error}")
        if empty:
            parser.error(f"{name}: no conversation" + (f" {options.row}" if options.row else ""))
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeDecodeError as error:
        parser.error(f"{name}: not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
