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


def pytest_addoption(parser):
    parser.addoption("--errors", action="store_true", help="print the largest error seen of every gradient and kernel")


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--errors"):
        terminalreporter.section("largest relative errors")
        for name, (worst, count) in sorted(worst_errors.items()):
            terminalreporter.write_line(f"{name:<52} {worst:9.1e}   {count} checks")
