"""A pytest plugin that plants a slowdown into fastsam: a step runs its second pass three times."""

import slowed_gate

setattr(*slowed_gate.second_passes(3))
