"""The command line: exit codes, messages, and nothing heavy before it is needed."""

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

import fastft
from fastft import cli


def test_doctor_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fastft", "doctor"], capture_output=True, text=True, check=True
    )
    assert "rms_norm" in done.stdout and fastft.__version__ in done.stdout


def test_a_reader_that_leaves_is_no_traceback():
    code = "import sys; from fastft import cli; sys.exit(cli.main(['doctor']))"
    # Unbuffered, and nobody reads: the first line already fails.
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("buffered", [[], ["-u"]])
def test_a_full_disk_is_no_traceback(buffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *buffered, "-m", "fastft", "doctor"], stdout=full, stderr=PIPE
        )
    assert done.stderr == b"fastft: No space left on device\n" and done.returncode == 2


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "doctor" in shown and "demo" in shown


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["demo", "--steps", "0"], ["demo", "--steps", "x"]]
)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_interruption_is_one_line_and_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err.strip() == "fastft: stopped"


def test_what_a_user_can_put_right_has_no_traceback(tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text("{}")
    arguments = ["demo", "--data", str(data), "--model", str(tmp_path), "--output", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("fastft demo: ")
