"""Patterns: which files they name, in which order, and what is said where they name none."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from olmo.io.patterns import match_files


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files at three depths, hidden ones, and links that lead back and out."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "a.json.gz",
        "web/b.json.gz",
        "web/deep/er/c.json.gz",
        "web-2/d.json.gz",
        "Books/É.json.gz",
        "web/notes.txt",
        "web/.hidden.json.gz",
        ".git/e.json.gz",
    ):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "corpus/again").symlink_to("web")
    (tmp_path / "corpus/web/deep/loop").symlink_to("../../..")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/f.json.gz").touch()
    (tmp_path / "corpus/out").symlink_to("../elsewhere")
    return tmp_path


EVERY = [  # by code point, the folders and their separators among it
    "corpus/Books/É.json.gz",
    "corpus/a.json.gz",
    "corpus/out/f.json.gz",
    "corpus/web-2/d.json.gz",
    "corpus/web/b.json.gz",
    "corpus/web/deep/er/c.json.gz",
]


def test_two_stars_are_folders_of_any_depth_and_each_file_is_there_once(corpus: Path):
    assert match_files("corpus/**/*.json.gz") == EVERY
    assert match_files("corpus/**/**/*.json.gz") == EVERY
    assert match_files("./corpus/**/*.json.gz") == [f"./{path}" for path in EVERY]
    absolute = match_files(f"{corpus}/corpus/**/*.json.gz")
    assert absolute == [f"{corpus}/{path}" for path in EVERY]
    assert match_files("corpus/**") == sorted([*EVERY, "corpus/web/notes.txt"])
    assert match_files("corpus/**/er/**/*.gz") == ["corpus/web/deep/er/c.json.gz"]
    assert match_files("**/c.json.gz") == ["corpus/web/deep/er/c.json.gz"]
    assert match_files("corpus/**/.*.gz") == ["corpus/web/.hidden.json.gz"], (
        "the pattern has the dot"
    )


def test_one_star_is_one_level_as_it_was(corpus: Path):
    assert match_files("corpus/*.json.gz") == ["corpus/a.json.gz"]
    assert match_files("corpus/[w]*/?.json.gz") == [
        "corpus/web-2/d.json.gz",
        "corpus/web/b.json.gz",
    ]
    assert match_files("corpus/a.json.gz") == ["corpus/a.json.gz"]
    assert match_files("corpus/a.JSON.gz") == match_files("corpus/none/**/*.gz") == []


def test_a_name_with_brackets_is_a_file_unless_it_is_others_too(corpus: Path):
    (corpus / "x[1].gz").touch()
    assert match_files("x[1].gz") == ["x[1].gz"]
    (corpus / "x1.gz").touch()
    with pytest.raises(ValueError, match=r"x\[1\].gz is a file.* matches x1.gz; .* x\[\[\]1\].gz"):
        match_files("x[1].gz")
    assert match_files("x[[]1].gz") == ["x[1].gz"], "as it says"


def test_a_folder_is_no_file(corpus: Path):
    for pattern in ("corpus", "corpus/*", "corpus/"):
        with pytest.raises(ValueError, match="expected files, found the folder corpus"):
            match_files(pattern)


def test_a_folder_that_cannot_be_read_is_not_passed_over(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    listed = os.listdir

    def listdir(folder: str) -> list[str]:
        if folder == "corpus/web":  # root, who may run this, reads all
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return listed(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    for pattern in ("corpus/**/*.gz", "corpus/web/*.gz"):
        with pytest.raises(ValueError, match=r"corpus/web: .*folder to read: Permission denied"):
            match_files(pattern)


def test_a_locale_changes_nothing(corpus: Path):
    program = (
        "from olmo.io.patterns import match_files; print(ascii(match_files('corpus/**/*.json.gz')))"
    )
    for locale in ("C", "POSIX", "en_US.UTF-8", "et_EE.UTF-8"):
        env = {**os.environ, "LC_ALL": locale, "PYTHONPATH": str(Path(__file__).parents[2])}
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, env=env)
        assert said.stdout.decode().strip() == ascii(EVERY), said.stderr
