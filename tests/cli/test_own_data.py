"""Pictures of one's own: what a folder and a file of arrays become, and what is refused of them."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastsam.__main__ import main
from fastsam.cli.data import load, resolve
from fastsam.cli.errors import InputError


def loaded(source, **changes):
    settings = {"seed": 0, "split_seed": 0, "label_noise": 0.0, "scored_on": "test", "device": "cpu"}
    return load(resolve(source), **settings | changes)


def picture(seed, *shape):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def folder(parent, parts=("train", "test"), classes=("ant", "bee", "cat"), n=4, shape=(6, 5, 3), suffix="png"):
    """Write n pictures of each class into each part, and return what they are, class by class."""
    written = {}
    for i, part in enumerate(parts):
        for j, name in enumerate(classes):
            place = parent / part / name
            place.mkdir(parents=True)
            for k in range(n):
                x = picture(100 * i + 10 * j + k, *shape)
                Image.fromarray(x).save(place / f"{k}.{suffix}")
                written.setdefault(part, []).append((x, j))
    return written


def as_tensors(written):
    x = torch.tensor(np.stack([np.atleast_3d(x) for x, _ in written])).permute(0, 3, 1, 2)
    return x, torch.tensor([y for _, y in written])


def test_a_folder_gives_its_pictures_with_classes_in_alphabetical_order(tmp_path):
    written = folder(tmp_path)
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no picture")
    split = loaded(f"folder:{tmp_path}")
    for part, x, y in (("train", split.x, split.y), ("test", split.score_x, split.score_y)):
        expected = as_tensors(written[part])
        assert torch.equal(x, expected[0])
        assert torch.equal(y, expected[1])
    assert split.classes == 3
    pixels = split.x.double() / 255
    assert split.mean.flatten().tolist() == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert split.std.flatten().tolist() == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_a_folder_without_parts_is_split_class_by_class_by_the_split_seed(tmp_path):
    written = folder(tmp_path, parts=("",), n=10)
    one, same, other = (loaded(f"folder:{tmp_path}", split_seed=seed) for seed in (0, 0, 1))
    assert torch.bincount(one.score_y).tolist() == [3, 3, 3]
    both = torch.cat([one.x, one.score_x])
    x, y = as_tensors(written[""])
    rows = [next(i for i, row in enumerate(x) if torch.equal(row, found)) for found in both]
    assert sorted(rows) == list(range(30))
    assert torch.equal(torch.cat([one.y, one.score_y]), y[rows])
    assert torch.equal(one.score_x, same.score_x)
    assert not torch.equal(one.score_x, other.score_x)


@pytest.mark.parametrize(
    ("shape", "suffix", "channels"), [((6, 5), "png", 1), ((6, 5, 4), "png", 3), ((6, 5), "bmp", 1)]
)
def test_grey_pictures_have_one_channel_and_alpha_is_dropped(shape, suffix, channels, tmp_path):
    written = folder(tmp_path, shape=shape, suffix=suffix)
    x, _ = as_tensors(written["train"])
    assert torch.equal(loaded(f"folder:{tmp_path}").x, x[:, :channels])


def test_one_picture_in_colour_makes_all_of_them(tmp_path):
    written = folder(tmp_path, shape=(6, 5))
    Image.fromarray(picture(1, 6, 5, 3)).save(tmp_path / "test" / "bee" / "9.png")
    split, (x, _) = loaded(f"folder:{tmp_path}"), as_tensors(written["train"])
    assert torch.equal(split.x, x.expand(-1, 3, -1, -1))


def deep(path):
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(path)


FOLDERS = [
    (lambda f: (f / "train" / "ant" / "0.png").write_bytes(b"no picture"), "ant/0.png cannot be read as a picture"),
    (lambda f: Image.fromarray(picture(0, 7, 5, 3)).save(f / "test" / "bee" / "0.png"), "are of 5x6 and 5x7 pixels"),
    (lambda f: deep(f / "train" / "cat" / "1.png"), "cat/1.png has more than 8 bits in each pixel"),
    (lambda f: (f / "test" / "dog").mkdir(), "class 'dog' is not in both of train and test"),
    (lambda f: [p.unlink() for p in (f / "test" / "cat").iterdir()], "test/cat holds no pictures (.png,"),
    (lambda f: (f / "test").rename(f / "val"), "has train but not its counterpart; make both train and test, or"),
]


@pytest.mark.parametrize(("damage", "message"), FOLDERS)
def test_a_folder_with_something_wrong_is_one_line(damage, message, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    folder(data)
    loaded(f"folder:{data}")
    damage(data)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", f"folder:{data}", "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("folder", "a path is needed after the colon: folder:DIR"),
        ("folder:frob", "frob is not a directory; name one with a subfolder of pictures for each class"),
        ("folder:.", "has 0 subfolders; make one for each class, at least two"),
        ("npz", "a path is needed after the colon: npz:FILE"),
        ("npz:frob", "cannot read frob: No such file or directory; name one that np.savez wrote"),
    ],
)
def test_what_is_not_there_is_refused(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        resolve(source)


def test_a_folder_needs_pillow(tmp_path, monkeypatch):
    folder(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(InputError, match="folder:DIR needs Pillow to read pictures: pip install pillow"):
        resolve(f"folder:{tmp_path}")


def arrays(**changes):
    given = {"x_train": picture(0, 20, 6, 5), "y_train": np.arange(20) % 3, "x_test": picture(1, 9, 6, 5)}
    return given | {"y_test": np.arange(9) % 3} | changes


def write(path, **changes):
    np.savez(path, **{name: value for name, value in arrays(**changes).items() if value is not None})
    return path


@pytest.mark.parametrize("labels", [np.uint8, np.int64])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_a_file_gives_its_arrays(labels, channels, tmp_path):
    x = picture(0, 20, 6, 5, *channels)
    y = (np.arange(20) % 3).astype(labels)[:, None]  # as Keras's are
    split = loaded(f"npz:{write(tmp_path / 'a.npz', x_train=x, y_train=y, x_test=picture(1, 9, 6, 5, *channels))}")
    assert torch.equal(split.x, torch.tensor(x.reshape(20, 6, 5, -1)).permute(0, 3, 1, 2))
    assert split.y.tolist() == (np.arange(20) % 3).tolist()
    assert (split.y.dtype, split.classes, len(split.score_x)) == (torch.int64, 3, 9)


def test_floats_are_taken_as_they_are(tmp_path):
    x = np.random.default_rng(0).random((20, 6, 5), dtype=np.float32)
    split = loaded(f"npz:{write(tmp_path / 'a.npz', x_train=x, x_test=x[:9])}")
    assert split.normalised(split.x) is split.x
    assert torch.equal(split.x[:, 0], torch.tensor(x))


def test_a_file_without_a_test_set_is_split(tmp_path):
    split = loaded(f"npz:{write(tmp_path / 'a.npz', x_test=None, y_test=None)}")
    assert (len(split.x), len(split.score_x)) == (14, 6)


def test_a_channel_of_one_value_is_not_divided_by_zero(tmp_path):
    x = np.full((20, 6, 5), 51, np.uint8)
    split = loaded(f"npz:{write(tmp_path / 'a.npz', x_train=x, x_test=x[:9])}")
    assert (split.mean.item(), split.std.item()) == (pytest.approx(0.2), 1)


FILES = [
    ({"y_test": None}, "has no array 'y_test'; it has x_train, y_train, x_test"),
    ({"x_train": picture(0, 20, 6)}, "x_train is uint8 of shape [20, 6]; it must be uint8 or float32"),
    ({"x_train": picture(0, 20, 6, 5).astype(np.float64)}, "x_train is float64 of shape [20, 6, 5]; it must be"),
    ({"x_train": np.full((20, 6, 5), 2, np.float32)}, "x_train must lie in [0, 1], and goes from 2 to 2"),
    ({"x_train": np.full((20, 6, 5), np.nan, np.float32)}, "x_train must lie in [0, 1], and goes from nan to nan"),
    ({"y_train": np.arange(19) % 3}, "y_train is int64 of shape [19]; it must be 20 integers"),
    ({"y_train": np.arange(20.0)}, "y_train is float64 of shape [20]; it must be 20 integers"),
    ({"y_train": np.arange(20) % 3 - 1}, "y_train holds -1; classes are numbered from 0"),
    ({"y_train": np.zeros(20, int), "y_test": np.zeros(9, int)}, "all pictures are of class 0"),
    ({"y_test": np.full(9, 3)}, "the training set has no picture of class 3, though labels go to 3"),
    ({"y_test": np.full(9, 10**12)}, "the training set has no picture of class 3, though labels go to 1000000000000"),
    ({"x_test": picture(1, 9, 5, 6)}, "pictures of train and test are not of one shape and type"),
    ({"y_train": np.array([None] * 20)}, "cannot be read: Object arrays cannot be loaded"),
    ({"x_test": None, "y_test": None, "y_train": np.arange(20)}, "30% of each class are to be tested on"),
]


@pytest.mark.parametrize(("changes", "message"), FILES)
def test_a_file_with_something_wrong_is_one_line(changes, message, tmp_path, capsys):
    file = write(tmp_path / "a.npz", **changes)
    assert main(["train", "--data", f"npz:{file}", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="it is no archive of arrays; name one"):
        resolve(f"npz:{tmp_path / 'a.npz'}")


def test_pictures_of_ones_own_train_and_resume(tmp_path, capsys):
    folder(tmp_path / "data", n=8)
    out = str(tmp_path / "out")
    assert main(["train", "--data", f"folder:{tmp_path / 'data'}", "--epochs", "2", "--out", out]) == 0
    assert main(["train", "--resume", "--data", f"folder:{tmp_path}/./data", "--out", out]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--data", "digits", "--out", out]) == 2
    assert "cannot be resumed with data digits (it has folder:" in capsys.readouterr().err
