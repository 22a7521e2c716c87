import subprocess

from lightning_fedfisher._utils.environment import provenance, versions


def test_a_folder_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance()["git"] is None
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    monkeypatch.setenv("PATH", "")
    assert provenance()["git"] is None


def test_a_repository_has_a_commit_and_says_if_it_was_changed(tmp_path, monkeypatch):
    def git(*command):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(["git", *identity, *command], cwd=tmp_path, capture_output=True)
        return done.stdout.decode().strip()

    git("init")
    git("commit", "--allow-empty", "-m", "m")
    monkeypatch.chdir(tmp_path)
    assert provenance()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/file").touch()
    monkeypatch.chdir(tmp_path / "sub")
    assert provenance()["git"]["dirty"]


def test_versions_are_those_of_the_installed_packages():
    import lightning
    import torch

    found = versions()
    assert list(found) == ["python", "lightning-fedfisher", "lightning", "torch"]
    assert found["lightning"] == lightning.__version__
    assert torch.__version__.startswith(found["torch"])  # which may have a build's name more
