"""One thread, as for the recorded results: threads of a busy machine wait for one another, and that would be timed."""

import torch

torch.set_num_threads(1)
