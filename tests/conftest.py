from hypothesis import HealthCheck, settings

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
