"""Tensors between processes: always from the device that the others expect them on."""

import pytest
import torch
import torch.distributed as dist

from tinier.ranks import Ranks

META = torch.device("meta")
# as a packed layer has them: codes on the GPU, and what was made from sizes on the host
MIXED = {"codes": torch.empty(4, 6, device=META).T, "shape": torch.tensor([4, 6])}


def test_what_lies_on_the_host_is_spread_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "broadcast_object_list", lambda described: None)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: sent.append(tensor))
    found = Ranks(0, 2).spread(MIXED, META)
    assert [tensor.device for tensor in sent] == [META, META]
    assert [(t.device, t.shape) for t in found.values()] == [(META, (6, 4)), (META, (2,))]


def test_what_lies_on_the_host_is_merged_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "gather_object", lambda value, parts: None)
    monkeypatch.setattr(dist, "send", lambda tensor, to: sent.append(tensor))
    assert Ranks(1, 2).merge(MIXED, META) == {}
    assert [tensor.device for tensor in sent] == [META, META]
