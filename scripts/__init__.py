"""
The scripts. Each imports its command line before all that takes its time, so that this here is done first: Ctrl-C while
modules are being loaded, or options read, ends a script without a word; the shell sees 130.
"""

import sys


def _hook(kind, error, trace):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _hook
