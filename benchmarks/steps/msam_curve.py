"""What mSAM's step costs as the shards grow in number and shrink, one after the other and side by side.

    python -m benchmarks.steps.msam_curve --models resnet18,vit --out benchmarks/results/msam_curve_cpu.json

Arms, ratios, noise and options are those of `benchmarks.steps.run`.
"""

from collections.abc import Sequence
from functools import partial

from benchmarks.arms.ours import METHODS, Method, ours
from benchmarks.steps import run
from fastsam import MSAM

SHARDS = [1, 2, 4, 8, 16, 32]
_NOT_COMPILED = dict.fromkeys(("compiled", "graph"), "not run: torch.func.vmap runs the model as it is")
CURVE = {f"msam {m}": Method(partial(ours, method=MSAM, num_shards=m)) for m in SHARDS}
CURVE |= {
    f"msam {m}, batched": Method(partial(ours, method=MSAM, num_shards=m, execution="batched"), _NOT_COMPILED)
    for m in SHARDS
}


def main(arguments: Sequence[str] | None = None) -> None:
    methods = {name: METHODS[name] for name in (*run.BASES, "sam")} | CURVE
    parser = run.parser(__doc__, "resnet18,vit", list(methods))
    parser.set_defaults(steps=1, rows=2 * max(SHARDS))  # batch norm takes 2 in a shard
    run.run("benchmarks.steps.msam_curve", methods, parser, arguments)


if __name__ == "__main__":
    main()
