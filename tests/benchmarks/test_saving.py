"""The benchmark of saves measures saves."""

from benchmarks import saving


def test_every_save_is_measured(tmp_path, capsys):
    seconds = saving.measure(str(tmp_path / "run"), 1)
    assert len(seconds) == saving.SAVES
    assert all(0 < save.blocked <= save.total for save in seconds)
    assert saving.main(["--megabytes=1", f"--folder={tmp_path}"]) == 0
    assert capsys.readouterr().out.count("the run stops for") == saving.SAVES
