"""CIFAR's archives, refused where anything is wrong with it, and the way from stored bytes to a model's inputs."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsam.__main__ import main
from fastsam.cli import data, training
from fastsam.cli.cifar import CIFAR10, CIFAR100, PIXELS
from fastsam.cli.config import Config
from fastsam.cli.data import DATA_SETS, Split, crop_and_flip, draw_moves, generator, load, resolve, short
from fastsam.cli.errors import InputError

# pictures in each file
TRAIN, TEST = 12, 7
SETS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Both data sets, cut down to a few pictures in each file."""
    for name, full in SETS.items():
        cut = replace(full, records=TRAIN, test_records=TEST)
        monkeypatch.setitem(DATA_SETS, name, data._cifar_entry(cut, ""))


def contents(name, n, seed):
    random = np.random.default_rng(seed)
    x = random.integers(256, size=(n, PIXELS), dtype=np.uint8)
    return x, random.permutation(n) % SETS[name].classes


def write(name, path, seed=0, x=None, y=None):
    """Write one file as the data set's authors did."""
    random_x, random_y = contents(name, TEST if path.name.startswith("test") else TRAIN, seed)
    x, y = random_x if x is None else x, random_y if y is None else y
    coarse = [np.full((len(y), 1), 3, np.uint8)] if name == "cifar100" else []
    np.hstack([*coarse, np.asarray(y, np.uint8)[:, None], x]).tofile(path)


def archive(name, parent):
    """Write a whole data set and return its folder."""
    folder = parent / SETS[name].folder
    folder.mkdir(parents=True)
    for seed, file in enumerate(SETS[name].files):
        write(name, folder / file, seed)
    return folder


def loaded(source, **changes):
    settings = {"seed": 0, "split_seed": 0, "label_noise": 0.0, "scored_on": "test", "device": "cpu"}
    return load(resolve(source), **settings | changes)


# archives


def test_sizes_are_those_of_the_real_files():
    assert {CIFAR10.size(n) for n in CIFAR10.files.values()} == {30_730_000}
    assert [CIFAR100.size(n) for n in CIFAR100.files.values()] == [153_700_000, 30_740_000]
    assert sum(CIFAR10.files.values()) == sum(CIFAR100.files.values()) == 60_000


@pytest.mark.parametrize("name", SETS)
def test_the_archive_gives_the_pictures_and_labels_in_order(name, tmp_path):
    folder = archive(name, tmp_path)
    files = SETS[name].train
    expected = [contents(name, TRAIN, seed) for seed in range(len(files))]
    test_x, test_y = contents(name, TEST, len(files))
    for source in (folder, tmp_path):
        split = loaded(f"{name}:{source}")
        assert split.x.dtype == split.score_x.dtype == torch.uint8
        assert split.y.dtype == split.score_y.dtype == torch.int64
        assert split.classes == SETS[name].classes
        assert np.array_equal(split.x.numpy(), np.vstack([x for x, _ in expected]).reshape(-1, 3, 32, 32))
        assert np.array_equal(split.y.numpy(), np.concatenate([y for _, y in expected]))
        assert np.array_equal(split.score_x.numpy(), test_x.reshape(-1, 3, 32, 32))
        assert np.array_equal(split.score_y.numpy(), test_y)


def test_every_spelling_of_a_directory_resolves_to_the_same(tmp_path, monkeypatch):
    folder = archive("cifar10", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = [f"cifar10:{spelled}" for spelled in (folder, tmp_path, ".", "cifar-10-batches-bin/", "~")]
    assert {resolve(source) for source in sources} == {f"cifar10:{folder}"}
    assert short(resolve("cifar10:.")) == "cifar10:cifar-10-batches-bin"
    assert [short(name) for name in ("digits", "fake:20x1x4x4")] == ["digits", "fake:20x1x4x4"]


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


MANY = "is there more than once, as {folder}/data_batch_1.bin and {folder}/"
BROKEN = {
    "cifar10": [
        (shutil.rmtree, "is not a directory; unpack cifar-10-binary.tar.gz from https://"),
        (lambda f: [file.unlink() for file in f.iterdir()], "{folder} holds no CIFAR-10; unpack"),
        (lambda f: (f / "data_batch_3.bin").unlink(), "{folder}/data_batch_3.bin is missing, a file of CIFAR-10;"),
        (lambda f: truncate(f / "test_batch.bin"), "test_batch.bin has 21,510 bytes where CIFAR-10 has 21,511 bytes;"),
        (
            lambda f: write("cifar10", f / "test_batch.bin", y=[0, 0, 10, 0, 0, 0, 0]),
            "test_batch.bin is no file of CIFAR-10: picture 2 has label 10, beyond 9; unpack cifar-10-binary.tar.gz",
        ),
        (lambda f: archive("cifar10", f), MANY + "cifar-10-batches-bin/data_batch_1.bin; name the folder of one"),
    ],
    "cifar100": [
        (lambda f: truncate(f / "train.bin"), "train.bin has 36,887 bytes where CIFAR-100 has 36,888 bytes;"),
        (
            lambda f: write("cifar100", f / "train.bin", y=[100] * TRAIN),
            "train.bin is no file of CIFAR-100: picture 0 has label 100, beyond 99",
        ),
    ],
}
CASES = [(name, damage, message) for name, cases in BROKEN.items() for damage, message in cases]


@pytest.mark.parametrize(("name", "damage", "message"), CASES)
def test_a_broken_archive_is_one_line_and_nothing_happens(name, damage, message, capsys, tmp_path, monkeypatch):
    folder = archive(name, tmp_path / "data")
    loaded(f"{name}:{folder}")
    damage(folder)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", f"{name}:{folder}", "--out", "runs/out"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message.format(folder=folder) in err
    assert str(folder) in err
    assert not list(tmp_path.glob("runs/out/*"))


def test_the_other_data_set_is_recognised(tmp_path):
    archive("cifar100", tmp_path)
    with pytest.raises(InputError, match="holds no CIFAR-10 but CIFAR-100; unpack"):
        resolve(f"cifar10:{tmp_path}")


def test_a_directory_is_looked_at_before_a_comparison_is_begun(capsys, tmp_path):
    folder = archive("cifar10", tmp_path / "data")
    truncate(folder / "test_batch.bin")
    assert main(["compare", "--data", f"cifar10:{folder}", "--out", str(tmp_path / "out")]) == 2
    assert "test_batch.bin has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argument", ["", "x", "512x3x32", "512x3x32x0", "-1x3x8x8", "9x3x8x8", "512x3x32x32x1", "5 x3x8x8"]
)
def test_a_bad_size_of_fake_pictures_is_refused(argument):
    with pytest.raises(InputError, match=r"is not fake:NxCxHxW with N of at least 10, such as fake:512x3x32x32"):
        resolve(f"fake:{argument}")


@pytest.mark.parametrize("n", [10**9, 10**15, 10**30])
def test_fake_pictures_that_do_not_fit_are_refused(n):
    with pytest.raises(InputError, match="does not fit into memory"):
        loaded(f"fake:{n}x3x4096x4096")


def test_fake_pictures_are_uniform_and_fixed_by_the_split_seed():
    one, same, other = (loaded("fake:500x2x6x8", split_seed=s, seed=i) for i, s in enumerate((0, 0, 1)))
    assert (one.x.shape, one.score_x.shape, one.classes) == ((500, 2, 6, 8), (100, 2, 6, 8), 10)
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.score_y, same.score_y)
    assert not torch.equal(one.x, other.x)
    inputs = one.normalised(one.x).double()
    assert abs(inputs.mean()) < 4 / inputs.numel() ** 0.5
    assert inputs.std().item() == pytest.approx(1, abs=0.02)


# from stored bytes to inputs


def by_hand(picture, top, left, flip):
    """The definition, one picture at a time."""
    padded = torch.zeros(picture.shape[0], picture.shape[1] + 8, picture.shape[2] + 8, dtype=picture.dtype)
    padded[:, 4:-4, 4:-4] = picture
    cropped = padded[:, top : top + picture.shape[1], left : left + picture.shape[2]]
    return cropped.flip(2) if flip else cropped


def test_crop_and_flip_are_those_of_one_picture_at_a_time():
    x = torch.randint(256, (81 * 2, 3, 6, 9), dtype=torch.uint8, generator=generator(0, "test"))
    moves = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    expected = torch.stack([by_hand(picture, *move) for picture, move in zip(x, moves.tolist(), strict=True)])
    moved = crop_and_flip(x, moves)
    assert moved.dtype == torch.uint8
    assert moved.is_contiguous()
    assert torch.equal(moved, expected)
    assert torch.equal(moved[(moves == torch.tensor([4, 4, 0])).all(1)], x[(moves == torch.tensor([4, 4, 0])).all(1)])


def test_crops_are_uniform_and_half_of_the_pictures_are_flipped():
    n = 162_000
    moves = draw_moves(n, generator(0, "test"))
    together = torch.bincount(moves[:, 0] * 18 + moves[:, 1] * 2 + moves[:, 2], minlength=162).double()
    assert len(together) == 162  # every pair of offsets with and without a flip
    chi_squared = ((together - n / 162) ** 2 / (n / 162)).sum().item()
    assert abs(chi_squared - 161) < 4 * (2 * 161) ** 0.5
    assert torch.equal(moves, draw_moves(n, generator(0, "test")))
    assert not torch.equal(moves, draw_moves(n, generator(1, "test")))


def test_padding_is_black_before_normalising(tmp_path):
    archive("cifar10", tmp_path)
    split = loaded(f"cifar10:{tmp_path}")
    inputs = split.augmented(torch.tensor([0]), torch.tensor([[0, 8, 0]]))
    black = (0 - torch.tensor(CIFAR10.mean)) / torch.tensor(CIFAR10.std)
    assert torch.equal(inputs[0, :, :4].amax((1, 2)), black)
    assert torch.equal(inputs[0, :, :, 28:].amin((1, 2)), black)


def test_inputs_are_normalised_as_torchvision_does(tmp_path):
    archive("cifar100", tmp_path)
    split = loaded(f"cifar100:{tmp_path}")
    rows, moves = torch.tensor([5, 0, 11]), torch.tensor([[1, 7, 1], [4, 4, 0], [8, 0, 0]])
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (CIFAR100.mean, CIFAR100.std))
    for i, inputs in enumerate(split.augmented(rows, moves)):
        assert torch.equal(inputs, (by_hand(split.x[rows[i]], *moves[i].tolist()).float() / 255 - mean) / std)
    assert torch.equal(split.normalised(split.score_x), (split.score_x.float() / 255 - mean) / std)


def test_the_digits_are_taken_as_they_are():
    split = loaded("digits")
    rows = torch.tensor([3, 1])
    assert torch.equal(split.augmented(rows, draw_moves(2, generator(0, "test"))), split.x[rows])
    assert split.normalised(split.score_x) is split.score_x


def test_the_held_out_part_is_scored_without_augmentation(tmp_path, monkeypatch):
    archive("cifar10", tmp_path)
    options = {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0}
    source = resolve(f"cifar10:{tmp_path}")
    run = training.TrainingRun(Config("sgd", options, data=source, scored_on="held_out", batch_size=16))
    moved, seen = [], []
    monkeypatch.setattr(data, "crop_and_flip", lambda x, moves: moved.append(len(x)) or x)
    run.model.register_forward_pre_hook(lambda model, args: seen.append((model.training, args[0])))
    run.train_epoch(training.Watcher())
    assert sum(moved) == 54  # of the 60 in all, the held-out tenth never
    scored = torch.cat([x for trained, x in seen if not trained])
    assert torch.equal(scored, run.data.normalised(run.data.score_x))
    assert len(scored) == 6


def test_a_split_keeps_bytes():
    split = loaded("fake:20x3x8x8")
    assert isinstance(split, Split)
    assert (split.x.element_size(), split.score_x.element_size()) == (1, 1)
