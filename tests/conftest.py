"""One torch thread: the tests share few cores, and results then do not depend on their number."""

import torch

torch.set_num_threads(1)
