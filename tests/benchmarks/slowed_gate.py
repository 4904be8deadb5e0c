"""The CPU gate with a slowdown planted into fastsam: `python slowed_gate.py PLANT RATIO [gate's arguments]`.

A process of its own, because times of both arms depend on what the process has allocated before: once malloc fetches
memory from the system anew for each tensor, eager SAM takes twice as long.
"""

import sys

import torch

from benchmarks.__main__ import main
from benchmarks.gates import cpu as cpu_gate
from fastsam.kernels import reference
from fastsam.two_pass.optimizer import TwoPassOptimizer


def temporaries(count):
    """Let perturb_ first make some temporaries of the weights' size."""
    perturb_ = reference.perturb_

    def slower(weights, *args):
        for _ in range(count):
            torch._foreach_add([w.detach() for w in weights], 0)
        perturb_(weights, *args)

    return reference, "perturb_", slower


def second_passes(count):
    """Let a step run its second pass some times over."""
    pair = TwoPassOptimizer._pair

    def slower(opt, first_pass, second_pass, *args, **keywords):
        return pair(opt, first_pass, lambda: [second_pass() for _ in range(count)], *args, **keywords)

    return TwoPassOptimizer, "_pair", slower


if __name__ == "__main__":
    plant, count, ratio, *arguments = sys.argv[1:]
    setattr(*globals()[plant](int(count)))
    cpu_gate.BYTES.clear()
    cpu_gate.RATIOS = {ratio: cpu_gate.RATIOS[ratio]}
    sys.exit(main(["gate", "cpu", *arguments]))
