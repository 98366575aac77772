"""Element types of the kernels and their numbers in `common.h`."""

import torch

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
