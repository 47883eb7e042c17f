"""One torch thread, and Triton's interpreter where there is no GPU.

The tests share few cores, and results then do not depend on their number. The interpreter must be asked for before the
first import of triton, which any library may do while tests are collected.
"""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
