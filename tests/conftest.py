"""One thread for every test: the networks are tiny, and more threads only wait for each other."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
