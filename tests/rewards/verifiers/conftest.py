"""A tiny random LLaVA folder, of the shipped verifier's architecture."""

import pathlib

import pytest
import torch

from alphagrpo_jax.shapes.pretraining import verifier_model

WORDS = ("is", "there", "a", "red", "blue", "circle", "square", "in", "the", "image", "it", "flat")


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory) -> pathlib.Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    model, processor = verifier_model.build_verifier(WORDS)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)  # answers that differ
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
