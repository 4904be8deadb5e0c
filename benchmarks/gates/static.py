"""Static gate: what the kernels compile to, held against a committed baseline. Needs no GPU.

    python -m benchmarks gate static            compile every variant for every target; 1 where one got worse
    python -m benchmarks gate static --renew    write what it is now into the baseline

The variants are the launches that the stages make for small lists of tensors, so that what is gated is what runs.
Hard: bytes per element in vector accesses, which have to be the algorithm's minimum; all other accesses, and spills.
Shared memory, barriers, registers and instructions move with the compiler: they have a ceiling, which holds for the
version of Triton that the baseline was made with.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from benchmarks.harness import names
from fastsam.cli.files import write_text

BASELINE = Path(__file__).with_suffix(".json")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
HARD = ("spills",)
CEILINGS = {"shared": 1.0, "barriers": 1.0, "registers": 1.25, "instructions": 1.25}
"""How much more than in the baseline is accepted."""


def launches() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Return every variant's kernel, its arguments and its constants, by name, as the stages of `ops` pass them."""
    import torch

    from fastsam.kernels import launch, launch_tables, ops, select, triton_backend
    from fastsam.kernels.philox import Draw
    from fastsam.kernels.reference import AdamOptions, Past, SGDOptions
    from fastsam.kernels.tensor_list import Backup

    assert not launch.INTERPRETED, "unset TRITON_INTERPRET: interpreted kernels cannot be compiled"
    found: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {}

    def record(label: str, kernel: Any, n_programs: int, *args: Any, **constants: Any) -> None:
        stage = kernel.__name__.strip("_").removesuffix("_kernel")
        name = stage if stage == "finish_norm" else f"{stage} {label}".strip()  # the same for every gradient
        found[name] = kernel, dict(zip(kernel.arg_names, args, strict=False)), constants

    def variant(label: str, stage: Callable, *args: Any, **kwargs: Any) -> None:
        with launch.observed_by(partial(record, label)):
            stage(*args, **kwargs)

    # tensors on the CPU stand in for a GPU's: nothing is run
    ops._pick = lambda tensors: triton_backend
    launch_tables.runs_here = triton_backend.runs_here = lambda *tensors: True
    f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
    one, length = torch.ones(()), torch.ones((), dtype=f64)

    def ones(dtype: Any) -> list[Any]:
        return [torch.ones(64, dtype=dtype)]

    draw, masked = Draw(0, 0, (0,)), Draw(0, 0, (0,), keep_probability=(0.5,))
    advance = torch.zeros((), dtype=torch.int64)
    captured, whole = masked._replace(advance=advance), masked._replace(advance=advance, whole=True)
    for dtype in (f32, bf16, f64):
        variant(_short(dtype), ops.norm, ones(dtype))
        variant(f"{_short(dtype)} adaptive", ops.norm, ones(dtype), ones(dtype), [0.0])
        variant(_short(dtype), ops.found_nonfinite, ones(dtype))
    for label, numbers in (("masked", masked), ("masked captured", captured), ("whole captured", whole)):
        variant(f"fp32 {label}", ops.norm, ones(f32), draw=numbers)
    for label, weight, grad, eta, numbers in (
        ("", f32, f32, None, None), ("adaptive", f32, f32, 0.0, None), ("masked", f32, f32, None, masked),
        ("", bf16, bf16, None, None), ("stochastic", bf16, bf16, None, draw), ("stochastic", f16, f16, None, draw),
        ("masked", bf16, bf16, None, masked), ("", f64, f64, None, None), ("bf16 gradient", f32, bf16, None, None),
        ("masked captured", f32, f32, None, captured), ("whole captured", f32, f32, None, whole),
        ("whole captured", bf16, bf16, None, whole),
    ):  # fmt: skip
        weights = ones(weight)
        backup = Backup(weights)
        name = f"{_short(weight)} {label}".strip()
        variant(name, ops.perturb_, weights, ones(grad), backup, length, [0.1], [eta], numbers)
        variant(_short(weight), ops.restore_, backup)
    for label, dtype, state, scalars in (
        ("", f32, f32, {}), ("found_inf", f32, f32, {"found_inf": one}),
        ("scaled", f32, f32, {"found_inf": one, "grad_scale": one}), ("found_inf", bf16, bf16, {"found_inf": one}),
        ("fp32 state", bf16, f32, {}), ("", f64, f64, {}),
    ):  # fmt: skip
        name, lists = f"{_short(dtype)} {label}".strip(), [ones(dtype), ones(dtype), ones(dtype)]
        sgd, adam = [SGDOptions(0.1, 0.9)], [AdamOptions(0.1)]
        variant(f"{name} momentum", ops.restore_sgd_step_, *lists, ones(state), sgd, **scalars)
        variant(name, ops.restore_sgd_step_, *lists, [None], [SGDOptions(0.1)], **scalars)
        states = [ones(state), ones(state), [None], [one]]
        variant(name, ops.restore_adam_step_, *lists, *states, adam, **scalars)
    for dtype, n_rows in ((f32, 256), (f32, 2048), (f32, 16384), (f32, 65536), (f64, 2048)):
        losses, chosen = torch.ones(n_rows, dtype=dtype), torch.ones(1, dtype=torch.int64)
        shape = select.shape_of(n_rows, dtype)
        args = losses, losses, chosen, 1, 1, n_rows, 1
        record(f"{_short(dtype)} {n_rows} rows", select._select_kernel, 1, *args, **shape, enable_fp_fusion=False)
    for average, value in ((f32, f32), (bf16, bf16), (f32, bf16)):
        name = _short(average) if average == value else f"{_short(average)} of {_short(value)}"
        variant(name, ops.ema_, ones(average), ones(value), 0.9)
    variant("fp32 found_inf", ops.ema_, ones(f32), ones(f32), 0.9, one)
    for n_classes, dtype, history, records in (
        (10, f32, f16, True), (1000, f32, f16, True), (1000, f32, f16, False), (1000, f32, torch.int8, True),
        (1000, bf16, f16, True), (1000, bf16, torch.int8, True), (1008, f32, f32, True), (50257, f32, f16, True),
        (50257, bf16, torch.int8, True), (1000, f32, None, False), (1000, bf16, None, False),
        (50257, bf16, None, False),
    ):  # fmt: skip
        logits, classes = torch.empty(2, n_classes, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        past, label = Past(logits), f"{_short(dtype)} {n_classes} classes"
        if history is not None:
            rows, tags = torch.empty(2, -(-n_classes // 16) * 16, dtype=history), classes.int()
            past = Past(rows, torch.ones(2) if history == torch.int8 else None, tags, classes, 1, 0, records, classes)
        name = f"{label} {'teacher' if history is None else _short(history)} {'record' if records else ''}".strip()
        variant(name, ops.trajectory_loss, logits, classes, past, tau=5.0, weight=1.0)
        if records and n_classes == 1000:
            variant(name, ops.record_, logits, past)
    return found


def _short(dtype: Any) -> str:
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "int8": "int8"}[
        str(dtype).split(".")[1]
    ]


_launches = cache(launches)


def measure(name: str, target: str) -> dict[str, Any]:
    """Compile one variant for one target and return what is gated."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastsam.kernels.launch import THREADS

    kernel, arguments, constants = _launches()[name]
    backend, architecture, warp_size = TARGETS[target]
    constants = dict(constants)
    threads = constants.pop("threads", THREADS)
    warps = max(1, threads // warp_size)
    options = {"num_warps": warps, "enable_fp_fusion": constants.pop("enable_fp_fusion", True)}
    types = {torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.float64: "*fp64",
             torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}  # fmt: skip
    constants |= {key: None for key, value in arguments.items() if value is None}
    signature = {key: types[v.dtype] if isinstance(v, torch.Tensor) else "i32" for key, v in arguments.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature={key: signature[key] for key in kernel.arg_names}, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget(backend, architecture, warp_size), options=options)
    read = _read_cuda if backend == "cuda" else _read_hip
    accesses, result = read(compiled, constants.get("WIDEST", 0))
    size = sum(n * width // 8 for (is_vector, _, width), n in accesses.items() if is_vector)
    return {
        "bytes_per_element": size * threads / constants["BLOCK_SIZE"],
        "vectors": {f"{kind}{width}": n for (is_vector, kind, width), n in sorted(accesses.items()) if is_vector},
        "others": {f"{kind}{width}": n for (is_vector, kind, width), n in sorted(accesses.items()) if not is_vector},
        "shared": compiled.metadata.shared,
        **result,
    }


Accesses = Counter[tuple[bool, str, int]]
"""How many accesses there are of each kind: whether it is a vector's, load or store, its width in bits."""


def _read_cuda(compiled: Any, widest: int) -> tuple[Accesses, dict[str, int]]:
    import triton

    ptx = compiled.asm["ptx"]
    accesses: Accesses = Counter()
    for kind, vector, width in re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v([248]))?\.[bfus](\d+)", ptx):
        accesses[bool(vector), kind, int(vector or 1) * int(width)] += 1
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return accesses, {
        "spills": used["STACK"] + used["LOCAL"],
        "barriers": len(re.findall(r"\bbar(?:rier)?\.sync", ptx)),
        "registers": used["REG"],
        "instructions": len(re.findall(r"^\t(?!\.|//).*;$", ptx, flags=re.MULTILINE)),
    }


def _read_hip(compiled: Any, widest: int) -> tuple[Accesses, dict[str, int]]:
    assembly = compiled.asm["amdgcn"]
    widths = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    accesses: Accesses = Counter()
    for path, kind, size in re.findall(r"\t(buffer|global|flat)_(load|store)_(\w+)", assembly):
        width = widths.get(size, 8 if "byte" in size else 16)
        # two words of a tensor are a vector of 16-bit elements where the widest have 32, else one element of 64
        is_vector = width == 128 or (path == "buffer" and width == 64 and widest == 32)
        accesses[is_vector, {"load": "ld", "store": "st"}[kind], width] += 1
    counts = {key: int(value) for key, value in re.findall(r"\.(\w+(?:_count|_size)):\s+(\d+)", assembly)}
    return accesses, {
        "spills": counts["vgpr_spill_count"] + counts["sgpr_spill_count"],
        "barriers": assembly.count("\ts_barrier"),
        "registers": counts["vgpr_count"],
        "instructions": len(re.findall(r"^\t[a-z]\w+_\w+", assembly, flags=re.MULTILINE)),
    }


def worse(now: dict[str, Any], then: dict[str, Any] | None, same_compiler: bool) -> list[str]:
    """Return what got worse in one variant, in words."""
    if then is None:
        return ["not in the baseline: run with --renew"]
    found = []
    if now["bytes_per_element"] != then["bytes_per_element"]:
        found.append(f"bytes per element {then['bytes_per_element']:g} -> {now['bytes_per_element']:g}")
    for part in ("vectors", "others"):
        before = Counter(then[part])
        found += [f"{part} {kind} {before[kind]} -> {n}" for kind, n in now[part].items() if n > before[kind]]
    found += [f"{key} {then[key]} -> {now[key]}" for key in HARD if now[key] > then[key]]
    if same_compiler:
        found += [f"{key} {then[key]} -> {now[key]}" for key, slack in CEILINGS.items() if now[key] > slack * then[key]]
    return found


def measure_all(names: list[str], targets: list[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Compile all variants for all targets, on every processor at hand."""
    pairs = [(name, target) for name in names for target in targets]
    if len(pairs) == 1:
        yield (*pairs[0], measure(*pairs[0]))
        return
    with ProcessPoolExecutor(min(len(pairs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for (name, target), result in zip(pairs, pool.map(measure, *zip(*pairs, strict=True)), strict=True):
            yield name, target, result


def print_table(results: dict[str, dict[str, Any]], targets: list[str]) -> None:
    """Print a row for each variant: bytes per element once, and for each target registers, spills and shared memory."""
    width = max(map(len, results))
    print("registers / spilled bytes / shared bytes of each target")
    print(f"{'':{width}}  {'B/element':>9}", *(f"{target:>12}" for target in targets))
    for name, by_target in results.items():
        cells = [f"{r['registers']} / {r['spills']} / {r['shared']}" for r in by_target.values()]
        sizes = sorted({r["bytes_per_element"] for r in by_target.values()})
        print(f"{name:{width}}  {', '.join(f'{size:g}' for size in sizes):>9}", *(f"{cell:>12}" for cell in cells))


def _as_text(baseline: dict[str, Any]) -> str:
    """JSON with a line for each variant and target."""
    text = json.dumps(baseline, indent=3)
    return re.sub(r"\n {12,}|\n {9}(?=\})", " ", text).replace("{ ", "{").replace(" }", "}") + "\n"


@click.command("static")
@click.option("--renew", is_flag=True, help="Write the results into the baseline.")
@click.option("--only", default="", help="Regular expression of the variants to look at.")
@names("--targets", "target", TARGETS, TARGETS)
def command(renew: bool, only: str, targets: list[str]) -> int:
    """Compile every variant of the kernels for every target and hold it against the baseline."""
    if renew and (only or targets != list(TARGETS)):
        raise click.UsageError("--renew takes all variants and targets")
    os.environ.pop("TRITON_INTERPRET", None)
    known = {} if not BASELINE.exists() else json.loads(BASELINE.read_text())
    chosen = [name for name in launches() if re.search(only, name)]
    if not chosen:
        raise click.UsageError(f"no variant matches --only {only}")
    results: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for name, target, result in measure_all(chosen, targets):
        results[name][target] = result
        if sys.stderr.isatty():
            print(f"\r\033[K{name} {target}", end="", file=sys.stderr, flush=True)
    print_table(results, targets)
    import triton

    if renew:
        write_text(BASELINE, _as_text({"triton": triton.__version__, "variants": results}))
        return 0
    same_compiler = known.get("triton") == triton.__version__
    if not same_compiler:
        print(f"Triton {triton.__version__} is not the baseline's: {', '.join(CEILINGS)} are not compared")
    found = [
        f"{name} on {target}: {what}"
        for name, by_target in results.items()
        for target, result in by_target.items()
        for what in worse(result, known.get("variants", {}).get(name, {}).get(target), same_compiler)
    ]
    if not (only or found):
        found += [f"{name} is in the baseline but no longer launched: run with --renew"
                  for name in known.get("variants", {}) if name not in results]  # fmt: skip
    print(*(f"WORSE {line}" for line in found), sep="\n")
    print(f"{len(chosen)} variants, {len(found)} findings")
    return int(bool(found))
