"""What the scripts with many options share: options from a dataclass (by tyro), and errors of one line."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

import tyro

CONFIG = (tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes, tyro.conf.HelptextFromCommentsOff)


def parse(config, description, arguments=None):
    """An instance of the dataclass `config` from the command line. A mistake ends the program with one line, rc 2.

    config's __post_init__ checks ranges and raises ValueError("FIELD has to be ..., and is ...").
    """
    program = Path(sys.argv[0]).name
    arguments = sys.argv[1:] if arguments is None else arguments
    options = {"prog": program, "description": description, "args": arguments, "config": CONFIG}
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(config, **options)
    told = io.StringIO()
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "1000"  # tyro must not break the line
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            return tyro.cli(config, **options)
    except ValueError as error:
        fail(error)
    except SystemExit:
        fail(_first_lines(told.getvalue()))
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _first_lines(box):
    """The message in the box that tyro draws around an error, as one line."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.split("\n")]
    lines = [line for line in lines[1:] if line.strip("─-") and "--help" not in line]
    for i, line in enumerate(lines):
        if line.startswith("Argument helptext"):
            lines = lines[:i]
            break
        if line.startswith("Perhaps you meant"):
            lines = [*lines[:i], f"perhaps you meant {lines[i + 1]}"]
            break
    if lines and lines[0].startswith("Missing from"):  # each option is followed by its help
        lines = ["missing: " + ", ".join(line for line in lines if line.startswith("-"))]
    return re.sub("^Error parsing [A-Z]\\w*: ", "", "; ".join(lines))


def fail(message):
    """End the program with rc 2 and one line that says what is wrong."""
    line = " ".join(str(message).split())
    sys.exit(_say(line))


def _say(line):
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return 2


def run(main, options):
    """main(options), with an error of one line for what the user can mend, and a quiet end on Ctrl-C."""
    try:
        main(options)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(_say(" ".join(str(error).split())) - 1)
    except KeyboardInterrupt:
        sys.exit(130)
