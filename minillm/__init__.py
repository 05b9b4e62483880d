"""
minillm: LLM training from scratch, with no deep-learning framework. A hand-written autograd engine on NumPy and CuPy,
and fused kernels in Numba and CUDA.

Read it in the order in which it imports itself: `kernels` (arrays in, arrays out), `autograd` (the engine, which sees
no formula), `functional` (the transformer's ops: each with its forward, its gradient and the derivation), and then as
the README's table "Where things are" has it.
"""

import os
from pathlib import Path

__version__ = "0.1.0"

# The threads of libgomp, which runs Numba's parallel loops, spin for a while after each loop, and so take the cores
# from the BLAS threads that come next: 7.3 ms against 1.4 ms for a matrix product and a softmax. libgomp reads this
# once, at the first launch, so it has to be set before any.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# But a few microseconds of spinning bridge the gap to the next small loop, where waking a thread would take longer:
# sampling from a model of 260,000 parameters ran at 166 tokens/s without and 378 with it, one row at a time.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# And the other way round: OpenBLAS's threads spin for 2^26 cycles after each product, beside the loop that comes next:
# 33 ms against 24 ms for a 1024 x 1024 product and an attention of 11 ms. OpenBLAS reads this when NumPy is imported,
# so it has an effect only where minillm is imported first.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

# In a checkout `minillm.kernels` is the folder kernels/ beside this one; an installed wheel has it in here.
if not Path(__file__).with_name("kernels").joinpath("__init__.py").exists():
    __path__.append(str(Path(__file__).parents[1]))
