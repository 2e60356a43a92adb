"""What is taken from a folder of texts, and what becomes of line ends and byte-order marks."""

import os
import sysconfig
from pathlib import Path

import pytest

from difftrain.cli import main
from difftrain.data import open_corpus, prepare, read_folder
from difftrain.data.texts import read_texts
from difftrain.errors import UserError

LINE = "the quick brown fox jumps over the lazy dog\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(folder))
    return folder


@pytest.fixture
def root(tmp_path):
    return tmp_path / "texts"


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def taken(root, *patterns, newline="universal"):
    """The texts of a folder, and what is said of it."""
    texts, summary = read_texts(root, patterns, newline)
    return texts, summary


# Which files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (".env", "KEY=secret", "hidden (.env)"),
        (".git/config", "url = secret", "hidden (.git/)"),
        ("a/.hg/store", "secret", "hidden (a/.hg/)"),
        (".svn/entries", "secret", "hidden (.svn/)"),
        (".venv/pyvenv.cfg", "home = /", "hidden (.venv/)"),
        ("venv/a.py", "secret", "of an environment or a cache (venv/)"),
        ("mine/pyvenv.cfg", "home = /", "of an environment or a cache (mine/)"),
        ("a/node_modules/b.js", "secret", "of an environment or a cache (a/node_modules/)"),
        ("__pycache__/a.txt", "secret", "of an environment or a cache (__pycache__/)"),
        ("lib/site-packages/a.py", "secret", "of an environment or a cache (lib/site-packages/)"),
        ("a.png", b"\x89PNG\0\0", "binary, with NUL bytes (a.png)"),
        ("ids.bin", b"\1\0\2\0", "binary, with NUL bytes (ids.bin)"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text (latin.txt)"),
        ("utf16.txt", "abc".encode("utf-16"), "binary, with NUL bytes (utf16.txt)"),
        ("none.txt", b"", "empty (none.txt)"),
        ("mark.txt", b"\xef\xbb\xbf", "empty (mark.txt)"),
    ],
)
def test_what_is_no_text_of_the_user_is_left_out_and_named(root, name, content, reason):
    write(root, {"one.txt": "one", "sub/two.txt": "two", name: content})
    texts, summary = taken(root)
    assert texts == ["one", "two"]
    assert summary == f"2 text files taken, 1 left out: 1 {reason}"


def test_texts_that_only_look_alike_are_taken(root):
    files = {
        "env/a.txt": "a", "environment.txt": "b", "git/c": "c", "venv.txt": "d", "x.site-packages/e": "e",
    }  # fmt: skip
    write(root, files)
    assert taken(root) == (["a", "b", "c", "d", "e"], "5 text files taken, 0 left out")


def test_a_folder_below_a_hidden_one_or_an_environment_is_taken_where_it_is_named(tmp_path):
    for place in (".hidden/texts", "venv", "node_modules"):
        write(tmp_path / place, {"a.txt": "a"})
        assert taken(tmp_path / place)[0] == ["a"]


def test_reasons_and_names_are_counted_and_names_cut_short(root):
    write(root, {f"{i}.png": b"\0" for i in range(5)} | {".a": "", ".b/c": "", "one.txt": "one"})
    assert taken(root)[1] == (
        "1 text file taken, 7 left out: 2 hidden (.a, .b/); 5 binary, with NUL bytes (0.png, 1.png, 2.png and 2 more)"
    )


def test_files_come_in_the_order_of_their_paths(root):
    names = ["a/z.txt", "a.txt", "b/c/d.txt", "b/c.txt", "B.txt", "a-b/x.txt"]
    write(root, {name: name for name in names})
    expected = [path.relative_to(root).as_posix() for path in sorted(root / name for name in names)]
    assert taken(root)[0] == expected


def test_links_are_followed_and_each_file_is_taken_once(root, tmp_path):
    write(root, {"m/one.txt": "one", "m/sub/two.txt": "two"})
    write(tmp_path / "elsewhere", {"three.txt": "three", "deep/four.txt": "four", ".key": "secret"})
    (root / "a_link.txt").symlink_to(root / "m" / "one.txt")
    (root / "a_folder").symlink_to(root / "m")
    (root / "m" / "loop").symlink_to(root)
    (root / "m" / "sub" / "self").symlink_to("self")
    (root / "above").symlink_to("..")
    (root / "broken").symlink_to("nowhere")
    (root / "x_elsewhere").symlink_to(tmp_path / "elsewhere")
    (root / "y_again").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / ".hidden").symlink_to(tmp_path / "elsewhere")
    texts, summary = taken(root)
    assert texts == ["one", "two", "four", "three"]
    assert summary.startswith("4 text files taken, 10 left out: 2 hidden (.hidden/, x_elsewhere/.key)")
    for reason in (
        "2 no file or a broken link (broken, m/sub/self)",
        "6 reached twice (a_folder/, a_link.txt, above/ and 3 more)",
    ):
        assert reason in summary


def test_a_file_of_a_store_is_taken_through_its_link(root, tmp_path):
    """As git-annex, DVC and the caches of model hubs lay files out."""
    write(root, {".store/af12": "one"})
    (root / "one.txt").symlink_to(".store/af12")
    assert taken(root)[0] == ["one"]


def test_a_pipe_is_not_waited_for(root):
    write(root, {"one.txt": "one"})
    os.mkfifo(root / "pipe")
    assert taken(root) == (["one"], "1 text file taken, 1 left out: 1 no file or a broken link (pipe)")


def test_what_may_not_be_read_is_left_out_and_named(root, monkeypatch):
    """Such as lost+found at the top of a disk. The administrator may read all, so it is made up here."""
    write(root, {"one.txt": "one", "lost+found/a.txt": "a", "key.txt": "b"})
    listed, read = Path.iterdir, Path.read_bytes

    def forbidden(function):
        def call(path):
            if path.name in ("lost+found", "key.txt"):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path)

        return call

    monkeypatch.setattr(Path, "iterdir", forbidden(listed))
    monkeypatch.setattr(Path, "read_bytes", forbidden(read))
    texts, summary = taken(root)
    assert texts == ["one"]
    assert summary == "1 text file taken, 2 left out: 2 not readable (key.txt, lost+found/)"


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], ["README", "a.py", "docs/b.md", "docs/d.py", "docs/deep/c.md"]),
        (["*.py"], ["a.py", "docs/d.py"]),
        (["*.py", "README"], ["README", "a.py", "docs/d.py"]),
        (["docs/*.md"], ["docs/b.md", "docs/deep/c.md"]),
        (["docs/**/*.md"], ["docs/b.md", "docs/deep/c.md"]),
        (["**/*.md"], ["docs/b.md", "docs/deep/c.md"]),
        (["docs/deep/*"], ["docs/deep/c.md"]),
        (["*.PY"], []),
        (["?.py"], ["a.py", "docs/d.py"]),
        (["[ab].*"], ["a.py", "docs/b.md"]),
    ],
    ids=" ".join,
)
def test_patterns_choose_by_name_or_by_path(root, patterns, expected):
    names = ["README", "a.py", "docs/b.md", "docs/deep/c.md", "docs/d.py"]
    write(root, {name: name for name in names})
    texts, summary = taken(root, *patterns)
    assert texts == expected
    assert f"{len(expected)} text file" in summary
    assert (f"{5 - len(expected)} of another name (" in summary) == (len(expected) < 5)


def test_the_command_takes_patterns_and_says_what_it_took(root, tmp_path, capsys):
    write(root, {"a.py": LINE * 9, "b.md": LINE * 9, "c.txt": LINE, ".key": "secret"})
    argv = ["prepare", str(root), "--out", str(tmp_path / "out"), "--pattern", "*.py", "--pattern", "*.md"]
    assert main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    summary = f"{root}: 2 text files taken, 2 left out: 1 hidden (.key); 1 of another name (c.txt)"
    assert [line for line in out if "taken" in line] == [summary]
    corpus = read_folder(tmp_path / "out")
    assert len(corpus.train) + len(corpus.val) == 18 * len(LINE) + 1
    assert main(["prepare", str(root), "--out", str(tmp_path / "other"), "--pattern", "*.rst"]) == 2
    err = capsys.readouterr().err
    assert "texts holds neither train.bin nor text files: 0 text files taken, 4 left out" in err


@pytest.mark.parametrize("name", ["stdlib", "a.txt"])
def test_a_pattern_without_a_folder_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(LINE)
    with pytest.raises(UserError, match=f"a pattern chooses files of a folder, and {name} is none"):
        prepare(name, patterns=["*.txt"])


def test_training_says_what_it_took_where_it_prepares_and_only_there(root, tiny, capsys):
    write(root, {"a.txt": LINE * 40, ".key": "secret"})
    config = tiny(data=str(root), max_iters=1)
    argv = [f"--{name}={getattr(config, name)}" for name in ("data", "device", "block_size", "n_embd")]
    argv += ["--n_layer=1", "--n_head=2", "--max_iters=1", "--eval_iters=2", "--eval_batch_size=2"]
    line = f"{root}: 1 text file taken, 1 left out: 1 hidden (.key)"
    for expected in (1, 0):
        assert main(["train", *argv, f"--out_dir={config.out_dir}-{expected}"]) == 0
        assert capsys.readouterr().out.splitlines().count(line) == expected


@pytest.mark.parametrize("content", [b"a\0b\0" * 100, "text".encode("utf-16-le") * 100])
def test_one_binary_file_is_refused_by_name(tmp_path, content, cache):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt is binary, with NUL bytes"):
        prepare(str(tmp_path / "a.txt"))
    assert not cache.exists()


# Line ends and byte-order marks ---------------------------------------------------------------------


def all_text(folder):
    corpus = read_folder(folder)
    return corpus.vocabulary.decode([*corpus.train.tolist(), *corpus.val.tolist()])


RAW = "\ufeffone\r\ntwo\rthree\nfour\n\r\nfive\r\r\n\ufeffsix\x0b\x0c\x85\u2028"


def test_line_ends_and_the_mark_are_those_of_pythons_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(RAW.encode())
    with path.open(encoding="utf-8-sig") as file:
        expected = file.read()
    assert all_text(prepare(str(path))) == expected
    assert all_text(prepare(str(path), newline="keep")) == RAW
    assert all_text(prepare(str(path))) == expected


def test_every_file_of_a_folder_loses_its_own_mark(root):
    write(root, {"a.txt": "\ufeffone\r\n", "b.txt": "\ufefftwo\r\n"})
    assert taken(root)[0] == ["one\n", "two\n"]
    assert taken(root, newline="keep")[0] == ["\ufeffone\r\n", "\ufefftwo\r\n"]


def test_training_reads_a_text_of_another_system_as_the_same_text(tmp_path):
    for name, text in (("unix.txt", LINE * 20), ("dos.txt", "\ufeff" + LINE.replace("\n", "\r\n") * 20)):
        (tmp_path / name).write_bytes(text.encode())
    unix, dos = (open_corpus(str(tmp_path / f"{name}.txt")) for name in ("unix", "dos"))
    assert unix.vocabulary == dos.vocabulary
    assert unix.record == dos.record


def test_the_command_keeps_line_ends_where_it_is_asked_to(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(RAW.encode())
    for newline in ([], ["--newline", "universal"], ["--newline", "keep"]):
        out = tmp_path / f"out{len(newline)}{newline[-1:]}"
        assert main(["prepare", str(tmp_path / "a.txt"), *newline, "--out", str(out)]) == 0
        assert ("\r" in all_text(out)) == (newline[-1:] == ["keep"])
    assert main(["prepare", str(tmp_path / "a.txt"), "--newline", "dos"]) == 2
    with pytest.raises(UserError, match="newline must be universal or keep, got 'dos'"):
        prepare(str(tmp_path / "a.txt"), newline="dos")


def test_the_builtin_corpus_follows_it_too(tmp_path, monkeypatch):
    write(tmp_path / "lib", {"a.py": "x = 1\r\n" * 9, "nul.py": "\0" * 9, "none.py": ""})
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    assert all_text(prepare("stdlib")) == "x = 1\n" * 9
    assert all_text(prepare("stdlib", newline="keep")) == "x = 1\r\n" * 9


# The cache of prepared texts ------------------------------------------------------------------------


def test_an_edited_text_is_prepared_anew_though_its_length_and_times_stay(root):
    write(root, {"a.txt": LINE * 20})
    before = (root / "a.txt").stat()
    for name in (str(root), str(root / "a.txt")):
        write(root, {"a.txt": LINE * 20})
        os.utime(root / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
        first = prepare(name)
        write(root, {"a.txt": LINE * 19 + LINE.upper()})
        os.utime(root / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert prepare(name) != first
        assert "THE QUICK" in all_text(prepare(name))


def test_an_edited_tokenizer_is_read_anew(tmp_path, monkeypatch):
    from difftrain.data import preparing
    from difftrain.data.vocabulary import Characters

    (tmp_path / "a.txt").write_text("ab" * 40)
    path = tmp_path / "tokenizer.json"
    monkeypatch.setattr(
        preparing, "make_vocabulary", lambda name, text: Characters(tuple(path.read_text()))
    )
    folders = []
    for words in ("ab", "ba", "ab"):
        path.write_text(words)
        folders.append(prepare(str(tmp_path / "a.txt"), tokenizer=str(path)))
        assert read_folder(folders[-1]).vocabulary.characters == tuple(words)
    assert folders[0] == folders[2] != folders[1]


# Other files that begin with a mark -----------------------------------------------------------------


def test_a_mark_before_a_configuration_meta_data_or_a_tokenizer_does_no_harm(tmp_path):
    from corpora import nanogpt_folder
    from difftrain.config.sources import read_toml
    from difftrain.data.vocabulary import read_tokenizer

    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfn_layer = 3\r\n")
    assert read_toml(tmp_path / "c.toml") == {"n_layer": 3}
    folder = nanogpt_folder(tmp_path / "d")
    (folder / "meta.json").write_bytes(b'\xef\xbb\xbf{"vocab_size": 3}')
    assert read_folder(folder).vocabulary.n_words == 3
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_tokenizer(str(tmp_path / "tokenizer.json")) == "{}"
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"tokenizer\.json is not UTF-8 text"):
        read_tokenizer(str(tmp_path / "tokenizer.json"))
