"""The programs in examples/, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import show_order

ORDER = """\
order: cat, [SEP], the; to be predicted: the, cat

          place  content stream  query stream: x = sees, . = must not see
                 0 1 2 3 4 5 6   0 1 2 3 4 5 6
0  the    3      x x x x x x x   . x x x x x x
1  cat    1      . x x x x x .   . . x x x x .
2  sat    given  . . x x x x .
3  on     given  . . x x x x .
4  the    given  . . x x x x .
5  mat    given  . . x x x x .
6  [SEP]  2      . x x x x x x
"""


@pytest.mark.slow
def test_the_order_is_shown(tmp_path):
    """Order, targets and masks of a sentence, byte for byte, from any folder; nothing on stderr."""
    program = [sys.executable, show_order.__file__]
    flags = ["--text", "the cat sat on the mat", "--seed", "0"]
    done = subprocess.run(program + flags, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", ORDER)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--tokenizer nonesuch", ["--tokenizer nonesuch", "give bert-base-uncased"]),
        ("--tokenizer pieces.txt", ["--tokenizer pieces.txt", "no [SEP] and no [CLS]"]),
        ("--seed -1", ["--seed", "'-1'", "at least 0"]),
        ("--seed one", ["--seed", "one"]),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, monkeypatch, capsys, flags, words):
    """The line names the flag and the value; exit status 2, no traceback, nothing on stdout."""
    (tmp_path / "pieces.txt").write_text("[UNK]\nthe\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        show_order.main(flags.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert all(word in err for word in words)
