"""Image files are found by the names that any machine or tool wrote, and none is ever guessed."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from hf_dino.data.readers.files import find_image_files


NFC, NFD = (unicodedata.normalize(form, "Körbe.jpg") for form in ("NFC", "NFD"))


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(names, folder, root=None, split=None):
    """Return the paths that were found, relative to the dataset's directory."""
    result = find_image_files(names, folder, root, split)
    assert len(result.paths) == len(names)
    assert all(path in result.paths for path in result.renamed)
    return {
        name: path.relative_to(root or folder).as_posix()
        for name, path in zip(names, result.paths)
        if name not in result.missing
    }


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a.jpg", "a.jpg"),
        ("./sub//a.jpg", "sub/a.jpg"),
        ("images\\a.jpg", "a.jpg"),
        ("images\\a.jpg", "images/a.jpg"),
        ("..\\..\\label-studio\\media\\upload\\4\\a.jpg", "a.jpg"),
        ("C:\\Users\\me\\a.jpg", "a.jpg"),
        ("/label-studio/data/media/upload/4/a.jpg", "a.jpg"),
        ("../elsewhere/a.jpg", "a.jpg"),
        ("/data/local-files/?d=images/a.jpg", "a.jpg"),
        ("https://host/bucket/a.jpg?alt=media&token=b.jpg#c.jpg", "a.jpg"),
        ("https://host/v0/o/images%2Fa%20b.jpg?alt=media", "a b.jpg"),
        ("s3://bucket/images/a.jpg", "a.jpg"),
        ("http://[::1/a.jpg", "a.jpg"),
        ("my%20image.jpg", "my image.jpg"),
        ("my image.jpg", "my%20image.jpg"),
        ("my%20image.jpg", "my%20image.jpg"),
        ("100%.jpg", "100%.jpg"),
        (NFC, NFD),
        (NFD, NFC),
        (f"sub\\{NFD}", f"sub/{NFC}"),
        ("IMG_1.JPG", "img_1.jpg"),
        ("upload/4/1a2b3c4d-a.jpg", "a.jpg"),
        ("a.jpg", "1a2b3c4d-a.jpg"),
        ("1a2b3c4d-a.jpg", "1a2b3c4d-a.jpg"),
        ("train/a.jpg", "images/a.jpg"),
    ],
)
def test_names_of_other_machines(tmp_path, name, file):
    make_files(tmp_path, file, "other.jpg")
    (tmp_path.parent / "a.jpg").touch()
    result = find_image_files([name], tmp_path)
    assert (result.paths, result.missing) == ([tmp_path / file], [])
    assert result.renamed == ({tmp_path / file} - {tmp_path / os.path.normpath(name)})


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["b.jpg"], ["a.jpg"]),
        (["x\\a.jpg"], ["1/a.jpg", "2/a.jpg"]),
        (["x\\a.jpg", "y\\a.jpg"], ["a.jpg"]),
        (["A.jpg", "A.JPG"], ["a.jpg"]),
        (["00000001-a.jpg"], ["00000002-a.jpg"]),
        (["%fe.jpg"], ["%ff.jpg"]),
        (["a.jpg"], ["a.jpg/b.png"]),
        (["a.jpg"], ["a.txt", "a.jpeg"]),
        (["notes.txt", "x/notes.txt"], ["y/notes.txt"]),
        (["", ".", "..", "/", "\\", "sub", "sub/", "a.jpg\0", "\0", "?d=", "://"], ["sub/a.jpg"]),
        (["a" * 300 + ".jpg", "a/" * 5000 + "b.jpg", "\ud800.jpg", "\ud800/a.jpg"], ["c.jpg"]),
    ],
)
def test_names_that_are_never_guessed(tmp_path, names, files):
    make_files(tmp_path, *files)
    assert found(names, tmp_path) == {}


def test_the_exact_file_wins(tmp_path):
    make_files(tmp_path, "a.jpg", "A.JPG", "a%20b.jpg", "a b.jpg", "sub/a.jpg", "1a2b3c4d-a.jpg", f"{NFC}", f"{NFD}")
    names = ["a.jpg", "A.JPG", "a%20b.jpg", "a b.jpg", "sub/a.jpg", NFC, NFD]
    assert found(names, tmp_path) == {name: name for name in names}
    assert found(["x\\A.JPG", f"x\\{NFD}", "x\\a%20b.jpg"], tmp_path) == {
        "x\\A.JPG": "A.JPG",
        f"x\\{NFD}": NFD,
        "x\\a%20b.jpg": "a%20b.jpg",
    }


def test_of_several_files_the_one_in_the_same_directories(tmp_path):
    make_files(tmp_path, "1/cam/a.jpg", "2/cam/a.jpg", "2/a.jpg")
    names = ["D:\\1\\CAM\\a.jpg", "D:\\2\\cam\\a.jpg", "D:\\2\\a.jpg"]
    assert found(names, tmp_path) == dict(zip(names, ["1/cam/a.jpg", "2/cam/a.jpg", "2/a.jpg"]))
    assert found(["D:\\3\\cam\\a.jpg"], tmp_path) == {}


def test_the_same_names_in_many_directories(tmp_path):
    names = [f"{camera}/{side}/{frame}.jpg" for camera in range(6) for side in "lr" for frame in range(6)]
    make_files(tmp_path, *(f"videos/{name}" for name in names))
    others = ["D:\\run\\" + name.replace("/", "\\") for name in names]
    assert found(others, tmp_path) == {other: f"videos/{name}" for other, name in zip(others, names)}
    assert found([f"l\\{frame}.jpg" for frame in range(6)], tmp_path) == {}
    (tmp_path / "videos" / "0" / "l" / "0.jpg").unlink()
    assert len(found(others, tmp_path)) == len(names) - 1


@pytest.mark.parametrize("seed", range(10))
def test_the_file_with_the_most_directories_of_the_name_is_that_of_a_slow_search(tmp_path, seed):
    rng = np.random.default_rng(seed)

    def draw():
        return [*rng.choice(["p", "q", "r"], rng.integers(0, 4)), "a.jpg"]

    def num_common(first, second):
        equal = [x == y for x, y in zip(reversed(first), reversed(second))]
        return [*equal, False].index(False)

    files = {"/".join(parts): parts for parts in (draw() for _ in range(12))}
    make_files(tmp_path, *files)
    for parts in (draw() for _ in range(30)):
        common = {file: num_common(["D:", *parts], other) for file, other in files.items()}
        best = [file for file, number in common.items() if number == max(common.values())]
        name = "\\".join(["D:", *parts])
        assert found([name], tmp_path) == ({name: best[0]} if len(best) == 1 else {})


def test_a_file_missing_among_others_is_not_looked_for_elsewhere(tmp_path):
    """Directories of two cameras often have images of the same names."""
    make_files(tmp_path, "one/1.jpg", "one/3.jpg", "two/2.jpg", "two/3.jpg", f"one/{NFD}")
    names = ["1.jpg", "2.jpg", NFC, "images\\3.jpg", "new/2.jpg"]
    expected = {"1.jpg": "one/1.jpg", NFC: f"one/{NFD}", "images\\3.jpg": "one/3.jpg", "new/2.jpg": "two/2.jpg"}
    assert found(names, tmp_path / "one", tmp_path) == expected


def test_the_directory_of_the_images_comes_first_and_other_splits_do_not_count(tmp_path):
    make_files(tmp_path, "val/a.jpg", "train/a.jpg", "train/b.jpg", "images/train/c.jpg", "more/d.jpg")
    names = [f"x\\{letter}.jpg" for letter in "abcd"]
    here, more = {names[0]: "val/a.jpg"}, {names[3]: "more/d.jpg"}
    assert found(names, tmp_path / "val", tmp_path, "validation") == here | more
    everything = {names[1]: "train/b.jpg", names[2]: "images/train/c.jpg"}
    assert found(names, tmp_path / "val", tmp_path) == here | everything | more


def test_nothing_outside_of_the_dataset_is_read(tmp_path):
    make_files(tmp_path, "secret.jpg", "data_2/b.jpg", "data/train/a.jpg", "data/images/c.jpg")
    root = tmp_path / "data"
    outside = ["../../secret.jpg", str(tmp_path / "secret.jpg"), "../../data_2/b.jpg", str(tmp_path / "data_2/b.jpg")]
    assert found(outside, root / "train", root) == {}
    inside = ["../images/c.jpg", str(root / "train" / "a.jpg"), "../../data/train/../train/a.jpg"]
    assert [*found(inside, root / "train", root).values()] == ["images/c.jpg", "train/a.jpg", "train/a.jpg"]
    assert not find_image_files(inside, root / "train", root).renamed


def test_symbolic_links(tmp_path):
    make_files(tmp_path, "disk/a.jpg", "data/c.jpg")
    root = tmp_path / "data"
    (root / "images").symlink_to(tmp_path / "disk")
    (root / "b.jpg").symlink_to(tmp_path / "disk" / "a.jpg")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "gone.jpg").symlink_to(root / "nothing.jpg")
    names = ["images/a.jpg", "b.jpg", "c.jpg", "loop.jpg", "gone.jpg", "images/../c.jpg"]
    assert found(names, root) == {name: name for name in names[:3]} | {names[5]: "c.jpg"}


def test_paths_relative_to_the_working_directory(tmp_path, monkeypatch):
    make_files(tmp_path, "data/train/a.jpg")
    monkeypatch.chdir(tmp_path / "data")
    for folder, root in ((Path("train"), Path()), (Path("../data/train"), Path("../data"))):
        assert find_image_files(["a.jpg"], folder, root).paths == [folder / "a.jpg"]
        for name in ("../train/a.jpg", str(tmp_path / "data" / "train" / "a.jpg")):
            assert find_image_files([name, "../../a.jpg"], folder, root).missing == ["../../a.jpg"]


def test_no_directory_is_searched_if_all_files_are_there(tmp_path, monkeypatch):
    make_files(tmp_path, "a.jpg", "sub/b.jpg")
    monkeypatch.setattr(os, "walk", None)
    assert len(found(["a.jpg", "sub/b.jpg"], tmp_path)) == 2


@pytest.mark.parametrize("seed", range(40))
def test_of_all_names_and_files(tmp_path, seed):
    """Found are existing files inside the dataset, by their own names if possible, one for each name, in any order."""
    rng = np.random.default_rng(seed)
    folders, stems = ["", "one/", "one/two/", "val/"], ["a", "A", "1a2b3c4d-a", "a%20b", "a b", NFC[:-4], NFD[:-4]]
    prefixes = ["", "", "one/", "../", "x\\", "one\\two\\", "/", "https://host/one/", "../data/", "%2e%2e/"]

    def draw(items, number):
        return {str(rng.choice(items)) + str(rng.choice(stems)) + ".jpg" for _ in range(number)}

    root = tmp_path / "data"
    make_files(root, *draw(folders, 8))
    make_files(tmp_path, *draw(["", "elsewhere/"], 4))
    names = sorted(draw(prefixes, 10))
    folder = root / str(rng.choice(["", "one"]))
    result = find_image_files(names, folder, root)
    paths = {name: path for name, path in zip(names, result.paths) if name not in result.missing}
    for name, path in paths.items():
        normal = Path(os.path.normpath(path))
        assert normal.is_file() and root in normal.parents
        assert path in result.renamed or normal == Path(os.path.normpath(folder / name))
    for name in names:
        direct = Path(os.path.normpath(folder / name))
        assert not (direct.is_file() and root in direct.parents) or paths[name] == direct
    by_other_names = [path for path in paths.values() if path in result.renamed]
    assert len(by_other_names) == len(result.renamed)
    shuffled = [names[index] for index in rng.permutation(len(names))]
    again = find_image_files(shuffled, folder, root)
    assert dict(zip(shuffled, again.paths)) == dict(zip(names, result.paths))
    assert sorted(again.missing) == sorted(result.missing)
