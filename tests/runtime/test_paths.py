"""Names of assets, folders and models of the hub; no test speaks to a network."""

import pathlib

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from alphagrpo_jax import config_checks
from alphagrpo_jax.runtime.paths import model_folder, resolve
from alphagrpo_jax.training import verifiers as verifiers_lib
from configs import grpo

ID = "some-org/Some-VL-2B.v1"


@pytest.fixture
def fetched(monkeypatch, tmp_path: pathlib.Path) -> list[str]:
    """What was asked of the hub, which gives one folder."""
    repo_ids = []

    def snapshot(repo_id: str, **options) -> str:
        assert "*.safetensors" not in options["ignore_patterns"]
        repo_ids.append(repo_id)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return repo_ids


def test_a_hub_id_is_fetched(fetched, tmp_path: pathlib.Path):
    assert model_folder(ID) == tmp_path / "snapshot"
    assert fetched == [ID]


def test_what_exists_is_never_fetched(fetched, tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ID).mkdir(parents=True)
    assert model_folder(ID) == pathlib.Path(ID)
    assert model_folder(tmp_path) == tmp_path
    assert model_folder("package:verifier") == resolve("package:verifier")
    assert fetched == []


@pytest.mark.parametrize("path", ["nowhere", "./some/model", "../some/model", "/a/b", "a/b/c"])
def test_other_names_are_paths(fetched, path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        model_folder(path)
    assert fetched == []


def test_without_network_the_error_says_what_to_do(monkeypatch):
    def offline(*_args, **_options):
        raise LocalEntryNotFoundError("Please check your internet connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError) as caught:
        model_folder(ID)
    message = str(caught.value)
    for phrase in (repr(ID), "is no folder here", "check your internet connection", "hf download"):
        assert phrase in message


def test_the_parent_fetches_once_and_workers_get_the_folder(fetched, tmp_path: pathlib.Path):
    fields = grpo.get_config()
    fields.verifier.path, fields.verifier.workers = ID, 3
    factories = verifiers_lib.verifier_factories(config_checks.from_config_dict(fields))
    assert fetched == [ID]
    assert [options["path"] for _, options in factories] == [str(tmp_path / "snapshot")] * 3
