"""What all tests share: one thread each, since threads that wait for each other cost more than tiny tensors do."""

import torch

import lightning_regularize  # noqa: F401  (before Lightning, so that it looks for both packages of it)

torch.set_num_threads(1)
