"""What the scripts share: options from a dataclass (by tyro), or of a few by argparse; help; errors of one line."""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import os
import re
import shutil
import sys
import textwrap
import types
from pathlib import Path
from typing import Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


@dataclasses.dataclass(kw_only=True)
class Reading:
    """The model's place. What scripts can be told that only read a model."""

    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: the GPU, by CuPy"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of weights and activations; bfloat16 is for GPUs, and takes half the memory there"""

    def load(self, folder, head):
        """The model of a folder, there and so precise (trainers.common.load_with_head)."""
        from minillm.trainers.common import load_with_head  # here, because Numba takes a second to load

        return load_with_head(folder, head, device=self.device, precision=self.precision)


def parse(config, description, arguments=None):
    """An instance of the dataclass `config` from the command line. A mistake ends the program with one line, rc 2.

    A field is an option, the string under it is its help. config's __post_init__ checks ranges and raises
    ValueError("--FIELD has to be ..., and is ..."). With --resume, what is not given is as in --out's settings.json.
    """
    import tyro  # here, because the benchmarks need only Parser, and run where tyro is not

    program = Path(sys.argv[0]).name
    arguments = sys.argv[1:] if arguments is None else arguments
    options = {option.flag: option for option in options_of(config)}
    if {"-h", "--help"} & set(arguments):
        try:
            print("\n".join(help_lines(program, description, options.values())), flush=True)
        except BrokenPipeError:  # `| head` has seen enough; Python would complain once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    seen = set()
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if re.match("--|-[A-Za-z]", flag) and flag not in options:
            fail(f"Unrecognized options: {argument}" + _suggestion(flag, options))
        if flag in options and flag in seen:
            several = ": its values stand behind one" if options[flag].values.endswith("...") else ""
            fail(f"{flag} is given twice{several}")
        seen.add(flag)
    arguments = list(_for_tyro(arguments, options, config))
    try:
        before = _before(config, arguments)
    except (OSError, ValueError) as error:
        fail(error)
    told = io.StringIO()
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "1000"  # tyro must not break the line
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            style = (tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes)
            return tyro.cli(config, prog=program, args=arguments, default=before, config=style)
    except ValueError as error:
        fail(error)
    except SystemExit:
        line = _one_line(re.sub(r"(--[a-z-]+)_\b", r"\1", told.getvalue()), options)
        if line.startswith("missing: ") and (out := _resumed(arguments)) is not None and before is None:
            line = f"{out} has no settings.json: there is no run to resume, and to begin one: {line}"
        fail(line)
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _before(config, arguments):
    """The settings of the run to resume, as defaults; None where there is none. ValueError: another trainer's run."""
    out = _resumed(arguments)
    if out is None:
        return None
    from minillm.files import read_object
    from minillm.trainers.run import SETTINGS, read_settings  # here, because Numba takes a second to load

    path = out / SETTINGS
    if not path.is_file():
        return None
    fields = {field.name for field in dataclasses.fields(config)}
    others = [name for name in read_object(path) if name not in fields]
    if len(others) > 1:  # one alone may be a slip of the pen
        raise ValueError(f"{out} is another trainer's run: its {SETTINGS} has {', '.join(others)}; take another --out")
    return dataclasses.replace(read_settings(config, path), overwrite=False)


def _resumed(arguments):
    """The folder of the run to resume; None where that is not asked for."""
    told = {flag.replace("_", "-"): value for flag, value in itertools.pairwise([*arguments, ""])}
    told |= dict(argument.split("=", 1) for argument in arguments if re.match("--[a-z-]+=", argument))
    return Path(told["--out"]) if told.get("--resume") == "True" and "--out" in told else None


def _suggestion(flag, options):
    """The option that somebody may have meant: the nearest, also to what other trainers call it."""
    names = {flag: flag for flag in options} | {theirs: ours for theirs, ours in ELSEWHERE.items() if ours in options}
    near = difflib.get_close_matches(flag, names, 1, 0.6)
    return f"; perhaps you meant {names[near[0]]}" if near else ""


ELSEWHERE = {
    "--learning-rate": "--lr",
    "--output-dir": "--out",
    "--num-train-epochs": "--epochs",
    "--per-device-train-batch-size": "--micro-batch-size",
    "--max-length": "--length",
}


def _for_tyro(arguments, options, config):
    """The arguments as tyro reads them: with the value True behind a yes-or-no option that has none, and --from for a
    field from_ spelt as the field is."""
    spelt = {f"--{f.name.rstrip('_')}": f"--{f.name}" for f in dataclasses.fields(config) if f.name.endswith("_")}
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        flag, equals, value = argument.partition("=")
        yield spelt.get(flag, flag) + equals + value
        option = options.get(argument.replace("_", "-"))
        if option and option.values == YES_OR_NO and following.startswith("--"):
            yield "True"


def _one_line(box, options):
    """The message in the box that tyro draws around an error, as one line."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.split("\n")]
    lines = [line for line in lines[1:] if line.strip("─-") and "--help" not in line]
    lines = list(itertools.takewhile(lambda line: not line.startswith("Argument helptext"), lines))
    if lines and lines[0].startswith("Missing from"):  # each option is followed by its help
        first = [line.split()[0] for line in lines if line]  # of what has no flag, tyro names what it takes
        called = lambda option: option.flag if option.flag.startswith("--") else option.values.split()[0]
        missing = [option for option in options.values() if option.required and called(option) in first]
        return "missing: " + ", ".join(map(_name, missing))
    line = re.sub("^Error parsing [A-Z]\\w*: ", "", "; ".join(lines))
    if match := re.match("Error parsing (--[a-z0-9-]+): (no type matching|Could not find valid parse)", line):
        return f"Error parsing {match[1]}: it takes {options[match[1]].values}"
    if match := re.match("invalid choice (.*) for argument '(--[a-z0-9-]+)'", line):
        return f"{match[2]} has to be one of {', '.join(options[match[2]].values.split('|'))}, and is {match[1]}"
    for pattern, told in TYROS_WORDS.items():
        line = re.sub(pattern, told, line)
    return line


TYROS_WORDS = {
    r"invalid literal for int\(\) with base 10: (.*)": r"\1 is no whole number",
    r"could not convert string to float: (.*)": r"\1 is no number",
    r"Missing value for argument '(.*?)'.*": r"\1 needs a value",
}


class Parser(argparse.ArgumentParser):
    """argparse's, for scripts with few options, with errors of one line."""

    def error(self, message):
        unknown = re.match("unrecognized arguments: (--[^ =]+)", message)
        near = unknown and difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
        fail(message + (f"; perhaps you meant {near[0]}" if near else ""))

    def add_overwrite(self, help):
        """--overwrite, alone or with True or False, as a dataclass has it."""
        self.add_argument(
            "--overwrite", type=_yes_or_no, nargs="?", const=True, default=False, metavar=YES_OR_NO, help=help
        )


def _yes_or_no(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"it has to be True or False, and is {text!r}")
    return text == "True"


def fail(message):
    """End the program with rc 2 and one line that says what is wrong."""
    sys.exit(_say(message, 2))


def _say(message, code):
    """Print one line to stderr; the code, for sys.exit."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def run(main, options):
    """main(options), with an error of one line for what the user can mend; quiet on Ctrl-C and on a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal or a file of another encoding does not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        main(options)
        sys.stdout.flush()  # a pipe that is closed is found out here, and not when Python ends
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # its own text begins with a number and ends with the file
        sys.exit(_say(f"{error.filename}: {error.strerror}" if error.filename is not None else error, 1))
    except MemoryError as error:
        sys.exit(_say(f"too little memory: {error or 'none is left'}", 1))
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(_say(error, 1))
    except KeyboardInterrupt as stop:  # a trainer's tells where it stopped, and by which signal
        sys.exit(_say(stop, stop.code) if stop.args else 130)


# ------------------------------------------------------------------ options and their help

YES_OR_NO = "True|False"


class Option(NamedTuple):
    """One field of a config."""

    flag: str  # "--batch-size", or the name alone of what is given without one
    values: str  # what it takes: "PATH", "N ...", "a|b"
    help: str
    default: object  # None where it is not worth a word
    required: bool
    group: str  # the first sentence about the class that brought it in
    apart: bool  # a blank line stands before it


def options_of(config):
    """The Options of a dataclass, in order: the group of the most derived class first."""
    kinds = get_type_hints(config, include_extras=True)
    found, owner = {}, {}
    for cls in reversed([c for c in config.__mro__ if dataclasses.is_dataclass(c)]):
        group = inspect.cleandoc(cls.__doc__).partition(".")[0].replace("\n", " ")
        for name, (text, apart) in _texts(cls).items():
            group_of, apart_of = owner.setdefault(name, (group, apart))
            found[name] = text, group_of, apart_of
    options = []
    for field in dataclasses.fields(config):
        text, group, apart = found.get(field.name, ("", "", False))
        flag = "--" + field.name.rstrip("_").replace("_", "-")  # from_ is --from: the word belongs to Python
        if get_origin(get_type_hints(config)[field.name]) is not get_origin(kinds[field.name]):
            flag = field.name.upper()  # Annotated: tyro.conf.Positional
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = None if required or field.default in (dataclasses.MISSING, "", ()) else field.default
        values = _values(get_type_hints(config)[field.name])
        options.append(Option(flag, values, text, default, required, group, apart))
    groups = list(dict.fromkeys(option.group for option in options))
    return sorted(options, key=lambda option: -groups.index(option.group))


def _texts(cls):
    """{field: (the string under it, whether a blank line stands before it)} of one class, without its bases."""
    found, end = {}, 0
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(text.value).split()), field.lineno > end + 1
            end = text.end_lineno
    return found


def _values(kind):
    """What an option of this type takes."""
    if get_origin(kind) in (Union, types.UnionType):
        return _values(next(part for part in get_args(kind) if part is not type(None)))
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"{_values(get_args(kind)[0])} ..."
    if get_origin(kind) is dict:
        return "NAME NUMBER ..."
    return {bool: YES_OR_NO, int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def help_lines(program, description, options):
    """The whole help, as wide as the terminal, within reason."""
    width, column = min(max(shutil.get_terminal_size().columns, 80), 110), 28
    needed = [option for option in options if option.required or not option.flag.startswith("--")]
    usage = [program, *map(_name, needed), "[--OPTION VALUE ...]"]
    usage = " ".join(part.replace(" ", "\xa0") for part in usage)  # an option and what it takes stay together
    yield from (
        line.replace("\xa0", " ") for line in textwrap.wrap(f"usage: {usage}", width, subsequent_indent=" " * 7)
    )
    yield from ("", description)
    group = None
    for option in (*needed, *(option for option in options if option not in needed)):
        now = "Needed" if option in needed else option.group
        if now != group:
            yield from ("", f"{now}:")
        elif option.apart and option not in needed:
            yield ""
        group = now
        default = f"{option.default:g}" if type(option.default) is float else option.default
        text = option.help + (f" (default {default})" if default is not None else "")
        name = f"  {_name(option)}"
        if len(name) > column - 2:
            yield name
            name = ""
        yield from textwrap.wrap(text, width, initial_indent=name.ljust(column), subsequent_indent=" " * column)


def _name(option):
    if option.flag.startswith("--"):
        return f"{option.flag} {option.values}"
    return f"{option.flag} ..." if option.values.endswith("...") else option.flag
