"""A training run: repeats and resumes bit for bit, noise as specified, and nothing is ever chosen on the test set."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from kernel_cases import kernels

from fastsam.cli import compare, training
from fastsam.cli.config import Config, options_for, when_of
from fastsam.cli.data import DATA_SETS, DataSet, Pictures, digits, draw_moves, generator, load, with_label_noise
from fastsam.cli.errors import InputError
from fastsam.cli.files import CHECKPOINT, read_checkpoint, write_checkpoint
from fastsam.cli.results import Epoch, Result, Watcher
from fastsam.cli.steps import BatchLosses, Criterion, build
from fastsam.cli.training import TrainingRun, train
from fastsam.graph import recorder as recorders
from fastsam.graph.plain_step import as_stepper
from fastsam.methods import METHODS


def config(method="sam", **changes):
    settings = {"model": "mlp", "epochs": 2, "label_noise": 0.4, "options": options_for(method, {})} | changes
    return Config(method=method, **settings)


AUGMENTED = {"data": "fake:150x3x8x8", "channels_last": True, "scored_on": "held_out"}
TIMES = ("samples_per_second", "seconds", "step_ms")


def numbers(result):
    return [{k: v for k, v in asdict(epoch).items() if k not in TIMES} for epoch in result.history]


def state(out):
    """All that a checkpoint holds, but for times."""
    checkpoint = read_checkpoint(out / CHECKPOINT)
    checkpoint["history"] = [{k: v for k, v in epoch.items() if k not in TIMES} for epoch in checkpoint["history"]]
    return checkpoint


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_equal(a[key], b[key])
    else:
        assert a == b


class Stop(Watcher):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, after):
        self.left = after

    def step(self, loss, note):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def make(tmp_path):
    def make(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


@pytest.mark.parametrize("method", METHODS)
def test_repeats_bit_for_bit(method, make):
    first, second = make("first"), make("second")
    numbers_of_first = numbers(train(config(method), first))
    assert numbers(train(config(method), second)) == numbers_of_first
    assert_equal(state(first), state(second))
    assert numbers(train(config(method, seed=1), make("other"))) != numbers_of_first


@pytest.mark.parametrize(
    ("method", "model", "amp"),
    [
        ("sam", "cnn", "off"),
        ("sam", "mlp", "fp16"),
        ("sgd", "mlp", "fp16"),
        ("asam", "mlp", "bf16"),
        ("adamw", "mlp", "off"),
        ("saf", "cnn", "off"),
        ("mesa", "cnn", "bf16"),
        ("msam", "cnn", "off"),
        ("msam", "mlp", "fp16"),
    ],
)
@pytest.mark.parametrize("changes", [{}, AUGMENTED], ids=["digits", "augmented"])
def test_interrupted_and_resumed_equals_uninterrupted(method, model, amp, changes, make):
    through, broken = make("through"), make("broken")
    wanted = config(method, model=model, amp=amp, epochs=3, **changes)
    steps = TrainingRun(wanted).steps_per_epoch
    expected = train(wanted, through)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, broken, watcher=Stop(after=steps + steps // 2))
    assert len(read_checkpoint(broken / CHECKPOINT)["history"]) == 1
    assert numbers(train(wanted, broken, resume=True)) == numbers(expected)
    assert_equal(state(broken), state(through))
    if amp == "fp16":
        assert state(broken)["scaler"]["_growth_tracker"] == 3 * steps  # so the scaler's state was not begun anew


@pytest.mark.parametrize(
    ("method", "amp", "when"),
    [
        ("sam", "off", "last:0.5"),
        ("looksam", "off", "first:0.5"),
        ("esam", "off", "every:3"),
        ("sam", "fp16", "every:2"),
    ],
)
def test_a_run_with_a_schedule_resumes_in_its_phase(method, amp, when, make):
    through, broken = make("through"), make("broken")
    wanted = config(method, amp=amp, epochs=3, when=when)
    steps = TrainingRun(wanted).steps_per_epoch
    expected = train(wanted, through)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, broken, watcher=Stop(after=steps + steps // 2))
    assert numbers(train(wanted, broken, resume=True)) == numbers(expected)
    assert_equal(state(broken), state(through))
    group, schedule = state(broken)["optimizer"]["param_groups"][0], when_of(when, 3 * steps)
    active = [step for step in range(3 * steps) if schedule.scale(step)]
    assert group["fastsam_taken"] == 3 * steps
    assert group["fastsam_active"] == len(active)
    assert 0 < len(active) < 3 * steps
    with pytest.raises(InputError, match=rf"when every:4 \(it has {when}\)"):
        train(replace(wanted, when="every:4"), broken, resume=True)


def test_before_its_start_a_schedule_trains_as_the_base(make):
    plain = numbers(train(config("sgd"), make("sgd")))
    late = numbers(train(config("sam", when="last:0.5"), make("late")))
    early = numbers(train(config("sam", when="first:0.5"), make("early")))
    always = numbers(train(config("sam"), make("always")))
    assert late[0] == plain[0]
    assert late[1] != plain[1]
    assert early[0] == always[0]
    assert early[1] != always[1]


def test_interrupted_in_the_first_epoch_resumes_from_the_start(make):
    out = make("out")
    with pytest.raises(KeyboardInterrupt):
        train(config(), out, watcher=Stop(after=1))
    assert numbers(train(config(), out, resume=True)) == numbers(train(config(), make("through")))


@pytest.mark.parametrize("method", ["sgd", "esam"])
def test_a_checkpoint_from_before_the_scheduler_resumes_bit_for_bit(method, make):
    """Its config said knobs, and its groups held the rate of the last step taken alone."""
    through, broken = make("through"), make("broken")
    wanted = config(method, epochs=3)
    steps = TrainingRun(wanted).steps_per_epoch
    expected = train(wanted, through)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, broken, watcher=Stop(after=steps + 1))
    checkpoint = read_checkpoint(broken / CHECKPOINT)
    checkpoint["config"]["knobs"] = checkpoint["config"].pop("options")
    for group in checkpoint["optimizer"]["param_groups"]:
        del group["initial_lr"]
        group["lr"] = 0.5 * wanted.options["lr"] * (1 + math.cos(math.pi * (steps - 1) / steps / 3))
    write_checkpoint(broken / CHECKPOINT, checkpoint)
    assert numbers(train(wanted, broken, resume=True)) == numbers(expected)
    assert_equal(state(broken), state(through))


def test_resume_refuses_another_config_and_names_what_differs(make):
    out = make("out")
    train(config(epochs=1), out)
    other = config(epochs=2, options=options_for("sam", {"rho": 0.2}))
    with pytest.raises(InputError, match=r"epochs 2 \(it has 1\), rho 0.2 \(it has 0.05\)"):
        train(other, out, resume=True)


def test_a_failed_write_leaves_the_last_checkpoint(make):
    out, run, resource = make("out"), TrainingRun(config()), pytest.importorskip("resource")
    run.save(out / CHECKPOINT)
    before = (out / CHECKPOINT).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*: File too large"):
            run.save(out / CHECKPOINT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / CHECKPOINT).read_bytes() == before
    assert [path.name for path in out.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", {"model": 1}])
def test_a_broken_checkpoint_is_refused(content, make):
    out = make("out")
    if isinstance(content, bytes):
        (out / CHECKPOINT).write_bytes(content)
    else:
        torch.save(content, out / CHECKPOINT)
    with pytest.raises(InputError, match="checkpoint"):
        train(config(), out, resume=True)


def test_sam_withstands_label_noise_that_sgd_fits(make):
    noisy = {"model": "cnn", "epochs": 12, "batch_size": 32}
    sgd = train(config("sgd", **noisy), make("sgd"))
    sam = train(config("sam", options=options_for("sam", {"rho": 0.5}), **noisy), make("sam"))
    assert sam.last > 90
    assert sam.last > sgd.last + 5
    assert sgd.history[-1].train_accuracy > sam.history[-1].train_accuracy


def test_each_epoch_draws_its_own_crops(monkeypatch):
    run, drawn = TrainingRun(config(**AUGMENTED)), []
    augmented = type(run.data).augmented
    monkeypatch.setattr(
        type(run.data), "augmented", lambda split, rows, moves: drawn.append(moves) or augmented(split, rows, moves)
    )
    for _ in range(2):
        run.train_epoch(Watcher())
    first, second = torch.cat(drawn).chunk(2)
    again = generator(run.config.seed, "crops and flips")
    assert torch.equal(first, draw_moves(135, again))
    assert torch.equal(second, draw_moves(135, again))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("channels_last", [False, True])
def test_weights_and_pictures_are_laid_out_as_asked(channels_last):
    run = TrainingRun(config("sgd", **AUGMENTED | {"channels_last": channels_last, "model": "cnn"}))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    seen = []
    run.model.register_forward_pre_hook(lambda model, args: seen.append(args[0]))
    run.train_epoch(Watcher())
    assert all(x.is_contiguous(memory_format=layout) for x in seen)
    convolutions = [m for m in run.model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=layout) for m in convolutions)


@pytest.mark.parametrize("scored", [1, 256, 257])
def test_accuracy_is_that_of_all_pictures_at_once(scored):
    run = TrainingRun(config())
    x, y = run.data.score_x[:scored], run.data.score_y[:scored]
    run.data = run.data._replace(score_x=x, score_y=y)
    with torch.no_grad():
        assert run.accuracy() == 100 * (run.model(x).argmax(1) == y).sum().item() / scored


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_run_trains_as_an_eager_one_and_resumes_bit_for_bit(make):
    wanted = config(data="fake:100x1x4x4", model="cnn", batch_size=40, compile=True, epochs=2)  # batches of 40 and 20
    through, broken = make("through"), make("broken")
    expected = train(wanted, through)
    eager = train(replace(wanted, compile=False), make("eager"))
    for one, other in zip(expected.history, eager.history, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, broken, watcher=Stop(after=4))
    torch.compiler.reset()  # a new process, in which the small batch comes last
    assert numbers(train(wanted, broken, resume=True)) == numbers(expected)
    assert_equal(state(broken), state(through))


def test_a_compiler_that_fails_is_one_line(make, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no working C++ compiler\nand much more")

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **keywords: compile_with(model, backend=broken, **keywords))
    with pytest.raises(
        InputError, match=r"mlp cannot be compiled here: .*no working C\+\+ compiler; mend that, or leave"
    ):
        train(config(compile=True), make("out"))


def test_the_tensor_mask_is_not_compiled():
    with pytest.raises(InputError, match=r"esam with --mask tensor cannot be compiled: .*; take --mask element, or"):
        config("esam", compile=True)
    config("esam", compile=True, options=options_for("esam", {"mask": "element"}))
    config("esam", compile=True, options=options_for("esam", {"beta": 1.0}))


def test_learning_rate_falls_as_a_cosine_over_all_steps():
    run = TrainingRun(config("sgd", options=options_for("sgd", {"lr": 0.2})))
    step, rates = run._step, []
    run._step = lambda batch: (rates.append(run.optimizer.param_groups[0]["lr"]), step(batch))[1]
    for _ in range(2):
        run.train_epoch(Watcher())
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 2 * run.steps_per_epoch)
    for rate in rates:
        assert rate == pytest.approx(plain.param_groups[0]["lr"], abs=1e-12)
        plain.step()
        schedule.step()


# data


def test_label_noise_is_uniform_over_all_classes():
    n, rate, classes = 100_000, 0.4, 10
    y = torch.arange(n) % classes
    noisy = with_label_noise(y, rate, classes, generator(0, "test"))
    assert torch.equal(y, torch.arange(n) % classes)
    changed = (noisy != y).float().mean().item()
    expected = rate * (1 - 1 / classes)  # a redrawn label may be its own
    assert abs(changed - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
    moves = torch.bincount((noisy - y)[noisy != y] % classes, minlength=classes)[1:].float()
    assert (moves - moves.mean()).abs().max() < 4 * moves.mean().sqrt()
    assert torch.equal(noisy, with_label_noise(y, rate, classes, generator(0, "test")))


def test_label_noise_of_0_and_1():
    y = torch.zeros(20_000, dtype=torch.int64)
    assert torch.equal(with_label_noise(y, 0.0, 10, generator(0, "test")), y)
    drawn = torch.bincount(with_label_noise(y, 1.0, 10, generator(0, "test")))
    assert (drawn - 2000).abs().max() < 4 * 2000**0.5


def numbered(argument, split_seed):
    """1000 "pictures" that are their own number, the last 300 of them the test set."""
    x = torch.arange(1000.0).reshape(-1, 1, 1, 1)
    y = torch.arange(1000) % 10
    return Pictures(x[:700], y[:700], x[700:], y[700:], classes=10)


def test_held_out_training_and_test_parts_are_disjoint(monkeypatch):
    monkeypatch.setitem(DATA_SETS, "numbered", DataSet("", numbered))
    arguments = {"seed": 3, "split_seed": 1, "label_noise": 0.4, "device": "cpu"}
    test = load("numbered", scored_on="test", **arguments)
    held = load("numbered", scored_on="held_out", **arguments)
    whole, test_ids, rest, out = (x.flatten().tolist() for x in (test.x, test.score_x, held.x, held.score_x))
    assert sorted(rest + out) == whole == list(range(700))
    assert test_ids == list(range(700, 1000))
    assert len(out) == 70
    assert torch.equal(test.score_y, torch.arange(700, 1000) % 10)  # clean
    assert [test.y[int(i)] for i in rest + out] == held.y.tolist() + held.score_y.tolist()  # the same noisy labels


def test_digits_split_is_stratified_and_fixed_by_its_seed():
    one, same, other = (digits("", seed) for seed in (0, 0, 1))
    assert torch.equal(one.test_x, same.test_x)
    assert not torch.equal(one.test_x, other.test_x)
    assert len(one.train_x) + len(one.test_x) == 1797
    assert (one.train_x.min(), one.train_x.max()) == (0, 1)
    counts = torch.bincount(torch.cat([one.train_y, one.test_y]))
    assert (torch.bincount(one.test_y) - 0.3 * counts).abs().max() <= 1


@pytest.mark.parametrize(
    ("method", "model", "n", "steps"),
    [
        ("sam", "mlp", 65, 2),
        ("sam", "cnn", 65, 1),
        ("sam", "cnn", 66, 2),
        ("msam", "mlp", 67, 1),
        ("msam", "mlp", 68, 2),
        ("msam", "cnn", 71, 1),
        ("msam", "cnn", 72, 2),
    ],
)
def test_a_last_batch_that_cannot_be_trained_on_is_dropped(method, model, n, steps, monkeypatch):
    full = digits("", 0)
    few = full._replace(train_x=full.train_x[:n], train_y=full.train_y[:n])
    monkeypatch.setitem(DATA_SETS, "few", DataSet("", lambda argument, split_seed: few))
    run = TrainingRun(config(method, data="few", model=model))
    step, seen = run._step, []
    run._step = lambda batch: (seen.append(len(batch[0])), step(batch))[1]
    run.train_epoch(Watcher())
    assert (len(seen), sum(seen)) == (steps, n if steps == 2 else 64)
    assert run.steps_per_epoch == steps


def test_batch_norm_refuses_batches_of_one():
    with pytest.raises(InputError, match="batch norm"):
        TrainingRun(config(model="cnn", batch_size=1))


@pytest.mark.parametrize("method", ["sgd", "sam", "esam", "msam"])
def test_hits_are_counted_in_first_forward_passes_alone(method):
    model = torch.nn.Linear(2, 2)
    losses = BatchLosses(model, Criterion(0.0), None, torch.device("cpu"))
    x = torch.randn(9, 2)
    y = model(x).argmax(dim=1)
    y[4] = 1 - y[4]
    options = options_for(method, {"rho": 100.0} if method != "sgd" else {"lr": 100.0})
    as_stepper(build(method, model, options)).step(losses, x, y, None)
    assert losses.hits.item() == 8


@pytest.mark.parametrize("method", ["sgd", "sam", "mesa"])
def test_on_the_cpu_graph_changes_nothing(method, make):
    wanted = config(method, data="fake:100x1x4x4", batch_size=40)
    expected = train(wanted, make("eager"))
    found = train(replace(wanted, graph=True), make("graph"))
    assert numbers(found) == numbers(expected)


@pytest.mark.skipif(kernels is None or not kernels.INTERPRETED, reason="records what Triton's interpreter runs")
@pytest.mark.parametrize("method", ["esam", "saf"])
def test_captured_training_goes_on_over_epochs_and_resumes_bit_for_bit(method, make, monkeypatch, choose):
    from recorded_work import RecordedWork

    choose("triton")
    options = options_for(method, {"mask": "element"} if method == "esam" else {"lag": 1, "start_epoch": 1})
    wanted = config(method, data="fake:70x1x4x4", batch_size=16, epochs=3, graph=True, options=options)
    replays = []
    replay = RecordedWork.replay
    monkeypatch.setattr(RecordedWork, "replay", lambda self: (replays.append(self), replay(self)))
    monkeypatch.setattr(recorders, "recorder_for", lambda params, batch: RecordedWork())
    through, broken = make("through"), make("broken")
    expected = train(wanted, through)
    assert len(replays) == {"esam": 3 * 4 - 3, "saf": 1 + 3 + 3}[method]  # of 4 full batches each
    with pytest.raises(KeyboardInterrupt):
        train(wanted, broken, watcher=Stop(after=8))
    assert numbers(train(wanted, broken, resume=True)) == numbers(expected)
    assert_equal(state(broken), state(through))
    eager = train(replace(wanted, graph=False), make("eager"))
    if method == "esam":
        assert numbers(eager) == numbers(expected)
    else:
        # the captured base steps in fastsam's kernel, equal to torch's to rounding
        for one, other in zip(eager.history, expected.history, strict=True):
            assert one.cross_entropy == pytest.approx(other.cross_entropy, rel=1e-4)
            assert one.divergence == pytest.approx(other.divergence, rel=1e-3, abs=1e-6)
        assert expected.history[-1].divergence > 0


def test_steps_of_several_processes_are_not_captured():
    with pytest.raises(InputError, match="--graph captures steps of one process"):
        config(graph=True, ranks=2)


def test_what_cannot_be_captured_is_one_line(make, monkeypatch):
    def refuse(*arguments, **keywords):
        raise ValueError("the step cannot be captured: for some reason")

    monkeypatch.setattr(training, "graph_step", refuse)
    with pytest.raises(InputError, match="--graph: the step cannot be captured: for some reason"):
        train(config(graph=True), make("out"))


# comparisons


def plan(**changes):
    settings = {"methods": ["sgd", "sam"], "label_noise": [0.4], "seeds": 2, "options": {}, "data": "digits"}
    settings |= {"model": "mlp", "epochs": 1, "batch_size": 64, "label_smoothing": 0.0, "amp": "off"}
    settings |= {"channels_last": False, "compile": False, "graph": False, "device": "cpu", "threads": 1}
    return compare.Plan(**settings | changes)


def test_options_are_never_chosen_on_the_test_set(make, monkeypatch):
    full, honest = digits("", 0), compare.run(plan(), make("honest"), Watcher())
    swapped = full._replace(test_x=torch.zeros_like(full.test_x), test_y=full.test_y.flip(0))
    monkeypatch.setitem(DATA_SETS, "digits", DataSet("", lambda argument, split_seed: swapped))
    blind = compare.run(plan(), make("blind"), Watcher())
    assert blind.choices == honest.choices
    assert [r.last for r in blind.results] != [r.last for r in honest.results]


def test_the_best_on_the_held_out_part_is_chosen_and_ties_go_to_the_smallest(make, monkeypatch):
    accuracies = {0.01: 10.0, 0.02: 20.0, 0.05: 40.0, 0.1: 60.0, 0.2: 60.0, 0.5: 50.0}
    trained = []

    def pretend(config, out, **_):
        trained.append(config)
        accuracy = accuracies[config.options["rho"]] if "rho" in config.options else 1.0
        epoch = Epoch(1, 0.0, 0.0, accuracy, 1.0, 1.0, 2.0 if config.method == "sam" else 1.0)
        return Result(config, (epoch,))

    monkeypatch.setattr(compare, "train", pretend)
    done = compare.run(plan(), make("out"), Watcher())
    assert [choice.value for choice in done.choices] == [0.1]
    assert done.choices[0].held_out_accuracy == {f"{rho}": a for rho, a in accuracies.items()}
    choosing = [c for c in trained if c.scored_on == "held_out"]
    final = [c for c in trained if c.scored_on == "test"]
    assert len(choosing) == len(METHODS["sam"].grid)
    assert [(c.seed, c.method) for c in final] == [(0, "sgd"), (0, "sam"), (1, "sgd"), (1, "sam")]
    assert {c.split_seed for c in trained} == {0}  # so the held-out part is in nobody's test set
    assert [(row.method, row.step_ratio) for row in done.rows] == [("sgd", None), ("sam", 2.0)]


def test_a_given_value_is_not_chosen(make):
    done = compare.run(plan(options={"rho": 0.3}, seeds=1), make("out"), Watcher())
    assert done.choices == []
    assert [row.value for row in done.rows] == [None, 0.3]


def test_a_plan_from_before_its_options_had_that_name_is_read(make):
    out = make("out")
    compare.prepare(plan(options={"rho": 0.3}), out, overwrite=False)
    saved = json.loads((out / compare.PLAN).read_text())
    saved["knobs"] = saved.pop("options")
    (out / compare.PLAN).write_text(json.dumps(saved))
    assert compare.read_plan(out) == plan(options={"rho": 0.3})
