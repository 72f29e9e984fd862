"""Files of models and predictions: plain safetensors, the same bytes for the same content."""

from pathlib import Path

import torch
from safetensors import safe_open

from polyclinic.studies.run.run_directory import read_tensors, write_tensors


def test_equal_model_files_have_equal_bytes(tmp_path: Path) -> None:
    """The library of safetensors writes the metadata in another order at every call."""
    meta = {f"key {i}": f"vålue {i}" for i in range(9)}
    tensors = {"b": torch.ones(3), "a": torch.arange(5), "empty": torch.zeros(0)}
    for i in range(8):
        write_tensors(tmp_path / f"{i}", tensors, dict(reversed(meta.items())) if i % 2 else meta)
    assert len({(tmp_path / f"{i}").read_bytes() for i in range(8)}) == 1
    read = read_tensors(tmp_path / "0")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "0", "pt") as opened:
        assert opened.metadata() == meta
