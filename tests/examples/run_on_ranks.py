"""One rank's side of test_examples.py: runs an example, whose final weights the first rank saves."""

import os
import runpy
import sys
import warnings

import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    example, out = sys.argv[1:]
    weights = runpy.run_path(example)["main"]()
    if os.environ["RANK"] == "0":
        torch.save(weights, out)
