"""What all tests share: one thread each, since threads that wait for each other cost more than tiny tensors do."""

import torch

torch.set_num_threads(1)
