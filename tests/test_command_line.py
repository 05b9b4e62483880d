"""The scripts with many options: their help, and what they say to a mistake: one line, before any training."""

import dataclasses
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.data.datasets import TokenWriter
from minillm.model import Config, build
from minillm.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from minillm.trainers import dpo, ppo, pretrain, reward, sft
from minillm.trainers.common import save_model

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "pretrain": pretrain.PretrainConfig,
    "sft": sft.SFTConfig,
    "reward": reward.RewardConfig,
    "ppo": ppo.PPOConfig,
    "dpo": dpo.DPOConfig,
}

spec = importlib.util.spec_from_file_location("command_line", ROOT / "scripts/command_line.py")
command_line = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command_line)


def script(name, arguments, monkeypatch):
    """Run scripts/NAME.py in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    try:
        runpy.run_path(str(ROOT / f"scripts/{name}.py"), run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return 0


# ------------------------------------------------------------------ help


@pytest.mark.parametrize("columns", [80, 100, 300])
@pytest.mark.parametrize("name", [*CONFIGS, "prepare"])
def test_help_is_narrow_and_speaks_of_nothing_inside(name, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert script(name, ["--help"], monkeypatch) == 0
    told = capsys.readouterr()
    assert told.err == "" and max(map(len, told.out.splitlines())) <= max(80, min(columns, 110))
    assert told.out.startswith(f"usage: {name}.py ") and "[--OPTION VALUE ...]" in told.out
    for inside in ("tyro", "dataclass", "NoneType", "None", "Literal", "<class", "MISSING", "PosixPath", "Config"):
        assert inside not in told.out, inside
    assert not any(line.endswith(" ") for line in told.out.splitlines())


@pytest.mark.parametrize("name", CONFIGS)
def test_help_has_every_option_once_with_its_meaning_and_default(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert script(name, ["-h"], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    begins = [i for i, line in enumerate(lines) if line.startswith("  --")]
    told = {
        lines[i].split()[0]: " ".join(" ".join(lines[i:end]).split())
        for i, end in zip(begins, [*begins[1:], None], strict=True)
    }
    fields = dataclasses.fields(CONFIGS[name])
    assert len(begins) == len(told) == len(fields)
    options = {option.flag: option for option in command_line.options_of(CONFIGS[name])}
    for field in fields:
        flag = "--" + field.name.replace("_", "-")
        meaning = " ".join(options[flag].help.split())
        assert len(meaning) > 8 and meaning in told[flag], flag
        required = field.default is dataclasses.MISSING
        if not required and field.default not in (None, "", ()):
            shown = f"{field.default:g}" if isinstance(field.default, float) else field.default
            assert f"(default {shown})" in told[flag], flag
    head = "\n".join(lines[: lines.index("Needed:") + 1])
    needed = [f"--{f.name.replace('_', '-')}" for f in fields if f.default is dataclasses.MISSING]
    assert all(flag in head for flag in needed)
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups[-2:] == ["What every trainer can be told:", "What every run can be told:"]


def test_an_overridden_default_is_explained_where_the_option_stands():
    options = {option.flag: option for option in command_line.options_of(pretrain.PretrainConfig)}
    assert options["--lr"].default == 4e-3 and "small models" in options["--lr"].help
    assert options["--lr"].group == options["--beta1"].group != options["--hidden-size"].group


# ------------------------------------------------------------------ what is understood


@dataclasses.dataclass(kw_only=True)
class Options:
    """Some options. Only for here."""

    many: tuple[Path, ...]
    """some paths"""
    micro_batch_size: int = 3
    """a number"""
    overwrite: bool = False
    """yes or no"""
    share: dict[str, float] | None = None
    """names and numbers"""
    kind: str = "a"
    """a text"""


@pytest.mark.parametrize(
    "given, expected",
    [
        ("--many a b --overwrite", {"many": (Path("a"), Path("b")), "overwrite": True}),
        ("--overwrite --many a", {"overwrite": True}),
        ("--many a --overwrite False", {"overwrite": False}),
        ("--many a --overwrite True --kind b", {"overwrite": True, "kind": "b"}),
        ("--many a --micro-batch-size 5", {"micro_batch_size": 5}),
        ("--many a --micro_batch_size=6", {"micro_batch_size": 6}),
        ("--many a --share x 0.5 y 2", {"share": {"x": 0.5, "y": 2.0}}),
    ],
)
def test_options_are_understood(given, expected, monkeypatch):
    monkeypatch.setenv("COLUMNS", "77")
    found = command_line.parse(Options, "", given.split())
    assert {name: getattr(found, name) for name in expected} == expected
    assert os.environ["COLUMNS"] == "77"


@pytest.mark.parametrize(
    "error, line, code",
    [
        (ValueError("one\n  two"), "one two", 1),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: No such file or directory", 1),
        (OSError("the disk is tired"), "the disk is tired", 1),
        (ModuleNotFoundError("x is not installed"), "x is not installed", 1),
        (MemoryError("Unable to allocate 3 GiB"), "too little memory: Unable to allocate 3 GiB", 1),
        (KeyboardInterrupt(), None, 130),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_a_fault_of_ours_is_a_traceback(error, line, code, monkeypatch, capsys):
    def main(options):
        raise error

    monkeypatch.setattr(sys, "argv", ["folder/x.py"])
    with pytest.raises(SystemExit) as ended:
        command_line.run(main, None)
    assert ended.value.code == code and capsys.readouterr().err == ("" if line is None else f"x.py: {line}\n")
    with pytest.raises(KeyError):
        command_line.run(lambda options: {}["key"], None)


INTERRUPTED = """
import runpy, sys

class Interrupted:
    def find_spec(name, path=None, target=None):
        if name.startswith("minillm.") and name != "minillm.kernels":  # bench_kernels.py has to load that first
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


PROGRAMS = sorted({p.stem for p in (ROOT / "scripts").glob("*.py") if "__main__" in p.read_text()} - {"mutants"})


@pytest.mark.parametrize("name", PROGRAMS)
def test_ctrl_c_while_modules_are_loaded_is_quiet(name):
    command = [sys.executable, "-c", INTERRUPTED, ROOT / f"scripts/{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")  # a shell calls it 130


def test_a_reader_that_has_seen_enough_ends_a_script_without_a_word():
    command = f"{sys.executable} {ROOT / 'scripts/bench_kernels.py'} --only adamw --rounds 1 | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


# ------------------------------------------------------------------ mistakes


def rows(name, *lines):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    Path(name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def make_world():
    """Folders and files with one thing wrong in each, in the current directory."""
    tokenizer, other = (
        Tokenizer.train([], SMALLEST_VOCABULARY),
        Tokenizer.train(["some words"] * 9, SMALLEST_VOCABULARY + 5),
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}

    def model(folder, tokenizer=tokenizer, head="lm"):
        save_model(Path(folder), build(Config(vocab_size=tokenizer.vocab_size, head=head, **sizes)), tokenizer)

    def data(folder, tokenizer, train=("some words here",)):
        Path(folder).mkdir()
        tokenizer.save(Path(folder))
        pieces = {"train": {}, "validation": {}}
        if train:
            with TokenWriter(Path(folder) / "a.train", tokenizer.vocab_size) as writer:
                for text in train:
                    writer.add([tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id])
            pieces["train"]["a"] = writer.piece
        manifest = json.dumps({"format": 1, "tokens": pieces, "weights": {}})
        (Path(folder) / "manifest.json").write_text(manifest, encoding="utf-8")

    model("base")
    model("rm", head="scalar")
    model("other", other)
    model("rm_other", other, head="scalar")
    model("too_many_tokens")
    other.save(Path("too_many_tokens"))
    model("no_tokenizer")
    (Path("no_tokenizer") / "tokenizer.json").unlink()
    model("no_weights")
    (Path("no_weights") / "model.safetensors").unlink()
    model("damaged")
    (Path("damaged") / "model.safetensors").write_bytes(b"\x00" * 20)
    model("no_end", Tokenizer.train([], SMALLEST_VOCABULARY, eos=None, pad=None))
    data("data", tokenizer)
    data("data_other", other)
    data("all_held_out", tokenizer, ())
    data("cut", tokenizer)
    (Path("cut") / "a.train.bin").write_bytes(b"")
    data("no_manifest", tokenizer)
    (Path("no_manifest") / "manifest.json").unlink()
    for folder in ("full", "foreign"):
        Path(folder).mkdir()
        (Path(folder) / "thesis.txt").write_text("mine", encoding="utf-8")
    (Path("kept") / "inner").mkdir(parents=True)
    (Path("kept") / "settings.json").write_text("{}", encoding="utf-8")
    Path("file").write_text("", encoding="utf-8")
    Path("bytes.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    Path("bytes.jinja").write_bytes(b"{{ messages }}\xff")
    Path("empty.jsonl").write_text("", encoding="utf-8")
    rows("sft.jsonl", *({"prompt": f"{i}?", "response": "yes"} for i in range(9)))
    rows("pref.jsonl", *({"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(9)))
    rows("broken.jsonl", {"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}, '{"prompt": "b", ')
    rows("no_answer.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    rows("long.jsonl", {"prompt": "a" * 99, "response": "b", "chosen": "c", "rejected": "d"})
    rows("same.jsonl", *({"prompt": f"{i}?", "chosen": "yes", "rejected": "yes"} for i in range(9)))
    rows("text.jsonl", {"text": "a"})
    Path("notes.docx").write_text("", encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root, before = tmp_path_factory.mktemp("world"), Path.cwd()
    os.chdir(root)
    try:
        make_world()
    finally:
        os.chdir(before)
    return root


GOOD = {
    "pretrain": "--data data --out out",
    "sft": "--model base --data sft.jsonl --out out",
    "reward": "--model base --data pref.jsonl --out out",
    "ppo": "--model base --reward rm --prompts sft.jsonl --out out --max-new-tokens 8",
    "dpo": "--model base --data pref.jsonl --out out",
    "prepare": "text.jsonl --out out",
}
WRONG = [  # script, what is added to its good command line (a later option goes before an earlier), code, message
    # options
    ("pretrain", "--learning-rat 1", 2, "Unrecognized options: --learning-rat; perhaps you meant --lr"),
    ("sft", "--micro-batch 2", 2, "Unrecognized options: --micro-batch; perhaps you meant --micro-batch-size"),
    ("dpo", "--label-smooth 0.1", 2, "Unrecognized options: --label-smooth; perhaps you meant --label-smoothing"),
    ("ppo", "--clip-vale=0.1", 2, "Unrecognized options: --clip-vale=0.1; perhaps you meant --clip-value"),
    ("prepare", "--langauges en", 2, "Unrecognized options: --langauges; perhaps you meant --languages"),
    ("pretrain", "stray", 2, "Unrecognized options: stray"),
    ("pretrain", "--lr fast", 2, "--lr: 'fast' is no number"),
    ("ppo", "--episodes 1.5", 2, "--episodes: '1.5' is no whole number"),
    ("reward", "--seed", 2, "--seed needs a value"),
    ("pretrain", "--schedule cos", 2, "--schedule has to be one of cosine, linear, constant, and is 'cos'"),
    ("sft", "--overwrite maybe", 2, "--overwrite has to be one of True, False, and is 'maybe'"),
    ("pretrain", "--weights a", 2, "--weights: it takes NAME NUMBER ..."),
    ("prepare", "--workers two", 2, "--workers: 'two' is no whole number"),
    # ranges
    ("pretrain", "--lr nan", 2, "--lr has to be a finite number, and is nan"),
    ("sft", "--lr 0", 2, "--lr has to be above 0, and is 0.0"),
    ("ppo", "--seed -1", 2, "--seed has to be at least 0, and is -1"),
    ("dpo", "--label-smoothing 0.6", 2, "--label-smoothing has to be at least 0 and below 0.5, and is 0.6"),
    ("ppo", "--gamma 2", 2, "--gamma has to be from 0 to 1, and is 2.0"),
    ("pretrain", "--context 5", 2, "--context has to be at least the rows' length 128, and is 5"),
    ("pretrain", "--model base --hidden-size 64", 2, "--hidden-size has to be left out with --model"),
    ("prepare", "--validation 1", 2, "--validation has to be at least 0 and below 1, and is 1.0"),
    ("prepare", "--preset gopher", 2, "--preset has to be one of "),
    ("pretrain", "--hidden-size 7", 1, "--num-attention-heads = 4 must divide hidden_size 7"),
    ("pretrain", "--model base", 1, "--length has to be at most the context of base, 64, and is 128"),
    ("pretrain", "--weights b 1", 1, "--weights is for b, and the sources are a"),
    # folders that come in
    ("pretrain", "--data absent", 1, "absent: no such folder"),
    ("pretrain", "--data no_manifest", 1, "no_manifest/manifest.json is missing: this is no folder of prepared data"),
    ("pretrain", "--data all_held_out", 1, "all_held_out has no text to train on"),
    ("pretrain", "--data cut", 1, "cut/a.train.bin has 0 bytes"),
    ("pretrain", "--data text.jsonl", 1, "text.jsonl is a file, and has to be a folder"),
    ("pretrain", "--model other --length 32", 1, "other and data have different tokenizers"),
    ("sft", "--model absent", 1, "absent: no such folder"),
    ("dpo", "--model no_tokenizer", 1, "no_tokenizer has no tokenizer.json"),
    ("sft", "--model no_weights", 1, "no_weights has no *.safetensors"),
    ("reward", "--model damaged", 1, "damaged/model.safetensors is not a readable safetensors file"),
    ("sft", "--model no_end", 1, "no_end: the tokenizer has no end-of-text token"),
    ("sft", "--model too_many_tokens", 1, "too_many_tokens: the tokenizer has"),
    ("sft", "--model data", 1, "data is no model folder: it has no config.json"),
    ("sft", "--model rm", 1, "rm is a reward model, and a language model is needed"),
    ("dpo", "--model rm", 1, "rm is a reward model, and a language model is needed"),
    ("dpo", "--reference rm", 1, "rm is a reward model, and a language model is needed"),
    ("ppo", "--model rm", 1, "rm is a reward model, and a language model is needed"),
    ("ppo", "--reward base", 1, "base is a language model, and a reward model is needed; scripts/reward.py makes one"),
    ("ppo", "--reward rm_other", 1, "rm_other"),
    ("pretrain", "--model rm --length 32", 1, "rm is a reward model, and a language model is needed"),
    ("sft", "--replay data_other", 1, "data_other and base have different tokenizers"),
    ("ppo", "--max-new-tokens 64", 1, "--max-new-tokens has to be below the models' context of 64, and is 64"),
    # files that come in
    ("sft", "--data absent.jsonl", 1, "absent.jsonl: no such file"),
    ("sft", "--data base", 1, "base: no such file"),
    ("sft", "--data notes.docx", 1, "notes.docx: not a kind of file that can be read"),
    ("sft", "--data empty.jsonl", 1, "--data: no row can be used: it is empty"),
    ("ppo", "--prompts empty.jsonl", 1, "--prompts: no row can be used: it is empty"),
    ("sft", "--data broken.jsonl", 1, "broken.jsonl:2: not JSON: "),
    ("reward", "--data bytes.jsonl", 1, "bytes.jsonl:1: invalid UTF-8: byte 0xFF at position 12"),
    ("dpo", "--data sft.jsonl", 1, "sft.jsonl:1: chosen is missing"),
    ("sft", "--data text.jsonl", 1, "text.jsonl:1: neither messages nor a prompt"),
    ("sft", "--data no_answer.jsonl", 1, "no row can be used: 1 with no token to train (first: no_answer.jsonl:1)"),
    ("sft", "--data long.jsonl", 1, "no row can be used: 1 too long for a length of 64 tokens (first: long.jsonl:1)"),
    ("ppo", "--prompts long.jsonl", 1, "no row can be used: 1 longer than 56 tokens (first: long.jsonl:1)"),
    ("reward", "--data same.jsonl --held-out 0", 1, "no row can be used: 9 whose chosen and rejected"),
    ("prepare", "--eval-sets absent.jsonl", 1, "absent.jsonl: No such file or directory"),
    ("prepare", "--key body", 1, "text.jsonl:1: no field 'body', only 'text'"),
    ("sft", "--template lama2", 1, "--template 'lama2' is none of chatml, llama2, llama3, alpaca, and no file"),
    ("sft", "--template bytes.jinja", 1, "bytes.jinja is not UTF-8"),
    # what goes out
    ("sft", "--out full", 1, "full is not empty: take another --out, or replace it with --overwrite True"),
    ("pretrain", "--out foreign --overwrite", 1, "foreign is not empty, and was not made by a trainer"),
    ("dpo", "--out file", 1, "file is a file, and has to be a folder"),
    ("reward", "--out file/below", 1, "file/below: Not a directory"),
    ("prepare", "--out full", 1, "full is not empty: take another --out, or replace it with --overwrite True"),
    ("sft", "--out kept --overwrite", 1, "kept/inner would be removed, and a trainer did not make it: take another"),
    ("sft", "--data a --data b", 2, "--data is given twice: its values stand behind one"),
    ("sft", "--seed 1 --seed=2", 2, "--seed is given twice"),
    ("prepare", "--out full --overwrite", 1, "full is not empty, and was not made by prepare.py: take another --out"),
]  # fmt: skip


def wrong_command(name, added):
    """The good command line with `added` in place of what it repeats."""
    flags = re.findall(r"--[\w-]+", added)
    words = " ".join(p for p in re.split(r" (?=--)", GOOD[name]) if p.split()[0] not in flags)
    return f"{words} {added}"


@pytest.mark.parametrize("name, added, code, message", WRONG, ids=[f"{name} {added}" for name, added, *_ in WRONG])
def test_a_mistake_is_one_line_before_any_training(name, added, code, message, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = sorted(p for p in Path().rglob("*"))
    arguments = wrong_command(name, added).split()
    assert script(name, arguments, monkeypatch) == code
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith(f"{name}.py: ") and message in line and told.out == ""
    for inside in ("Errno", "Error:", "Traceback", "tyro", "<class", "object at", "PosixPath"):
        assert inside not in line
    assert sorted(p for p in Path().rglob("*")) == before  # no folder is left behind
    if path := os.environ.get("MINILLM_WRONG_OPTIONS"):  # a table of what is said, for people
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"$ {name}.py {' '.join(arguments)}\n  {line.removeprefix(f'{name}.py: ')}  [{code}]\n")


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "dpo", "ppo"])
def test_the_command_that_the_mistakes_are_made_in_is_good(name, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    few = {
        "pretrain": "--tokens 64 --length 32 --samples 1",
        "ppo": "--episodes 8 --batch-size 4 --reference-samples 4 --value-warmup 1",
    }
    arguments = f"{wrong_command(name, few.get(name, '--epochs 0.1'))} --overwrite".split()
    assert script(name, arguments, monkeypatch) == 0
    told = capsys.readouterr()
    assert told.err == "" and told.out.splitlines()[-1] == "written to out"
    assert max(map(len, told.out.splitlines())) <= 120
    written = json.loads(Path("out/settings.json").read_text(encoding="utf-8"))
    assert written["out"] == "out" and written["overwrite"] is True
    assert all(
        "step" in json.loads(line) for line in Path("out/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )
