"""
Let a model continue a text.

    python scripts/generate.py FOLDER "Once upon a time"

FOLDER holds config.json, *.safetensors and tokenizer.json (Hugging Face's layout). One text is printed as it comes;
with --samples N there are N, computed as one batch.
"""

import math
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.generate import generate
from minillm.hub import stop_tokens
from minillm.trainers.common import load_tokenizer, load_with_head


def parse(arguments):
    parser = command_line.Parser(prog="generate.py", description="Let a model continue a text.", allow_abbrev=False)
    parser.add_argument("model", metavar="FOLDER", help="a model folder: config.json, *.safetensors, tokenizer.json")
    parser.add_argument("prompt", nargs="?", default="", help="the text to continue (nothing)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="(200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest (0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, metavar="P", help="only the likeliest that add up to P")
    parser.add_argument("--min-p", type=float, metavar="P", help="only tokens at least P times as likely as the first")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less (1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end where TEXT occurs; repeatable")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="how many continuations (1)")
    parser.add_argument("--no-cache", action="store_true", help="compute every token from all before it, to compare")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the GPU, by CuPy (cpu)")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and activations; bfloat16 is for GPUs (float32)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    options = parser.parse_args(arguments)
    for name, fits, must in (
        ("samples", lambda x: x >= 1, "at least 1"),
        ("max_new_tokens", lambda x: x >= 1, "at least 1"),
        ("seed", lambda x: x >= 0, "at least 0"),
        ("temperature", lambda x: 0 <= x < math.inf, "at least 0"),
        ("top_k", lambda x: x >= 0, "at least 0"),
        ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
        ("min_p", lambda x: 0 <= x <= 1, "from 0 to 1"),
        ("repetition_penalty", lambda x: 0 < x < math.inf, "above 0"),
    ):
        value = getattr(options, name)
        if value is not None and not fits(value):
            parser.error(f"--{name.replace('_', '-')} has to be {must}, and is {value}")
    if "" in options.stop:
        parser.error("--stop has to be a text, and is empty: that occurs everywhere")
    return options


def run(options):
    tokenizer = load_tokenizer(options.model)
    model = load_with_head(options.model, "lm", device=options.device, precision=options.precision)
    prompt = tokenizer.encode(options.prompt).tolist()
    if tokenizer.bos_id is not None:
        prompt = [tokenizer.bos_id, *prompt]
    stream, untold = tokenizer.decoder(skip_special=True), list(prompt)

    def show(row, token):
        """Print a token, and before the first of them the prompt."""
        if options.samples == 1:
            untold.append(token)
            print("".join(map(stream.push, untold)), end="", flush=True)
            untold.clear()

    begin = time.perf_counter()
    texts = generate(
        model,
        [prompt] * options.samples,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop_tokens=sorted(stop_tokens(options.model) | ({tokenizer.eos_id} - {None})),
        stop_strings=options.stop,
        tokenizer=tokenizer,
        seed=options.seed,
        cache=not options.no_cache,
        cut_prompts=True,
        on_token=show,
    )
    seconds = time.perf_counter() - begin
    if options.samples == 1:
        print(stream.flush())
    for i, text in enumerate(texts if options.samples > 1 else ()):
        print(f"--- {i + 1}\n{tokenizer.decode([*text.prompt, *text.ids], skip_special=True)}")
    count = sum(len(text.ids) for text in texts)
    ends = ", ".join(sorted({text.finish for text in texts}))
    print(f"[{count} tokens, {count / seconds:.0f} tokens/s; ended by {ends}]", file=sys.stderr)


def main():
    options = parse(None)
    warnings.showwarning = lambda message, *_: print(f"generate.py: {message}", file=sys.stderr)
    command_line.run(run, options)


if __name__ == "__main__":
    main()
