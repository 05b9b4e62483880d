import sys

import pytest
from hypothesis import HealthCheck, settings

from tests.gradcheck import worst_errors

# The same examples in every run: a failure shows again at the next run, and a pass stays one. No deadline and no
# complaint about slow examples, because the first example of a kernel compiles it.
settings.register_profile(
    "minillm",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("minillm")


@pytest.fixture
def status_of(monkeypatch, capsys):
    """status_of(main, name, *arguments): (exit status, output, error output) of a script's main in this process."""

    def status_of(main, name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return status_of


def pytest_addoption(parser):
    parser.addoption("--errors", action="store_true", help="print the largest error seen of every gradient and kernel")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist's
        session.config.workeroutput["worst errors"] = worst_errors


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for name, (worst, count) in getattr(node, "workeroutput", {}).get("worst errors", {}).items():
        seen, before = worst_errors.get(name, (0.0, 0))
        worst_errors[name] = max(worst, seen), before + count


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--errors"):
        terminalreporter.section("largest relative errors")
        for name, (worst, count) in sorted(worst_errors.items()):
            terminalreporter.write_line(f"{name:<52} {worst:9.1e}   {count} checks")
