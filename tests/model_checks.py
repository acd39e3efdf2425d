"""What every reference model must do, whatever it computes."""

import torch

from efficient_attn.models import Model


def check_trains(model, loss, *, steps=8, lr=3e-3):
    """A few steps on one batch lower the loss, and every trained parameter gets a finite gradient."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        assert value.shape == () and torch.isfinite(value)
        value.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


def check_round_trip(model, call, folder):
    """Saved and loaded, by its own class and by `Model`, it computes the same bits with the same attention."""
    model.eval()
    model.save_pretrained(folder)
    expected = call(model)
    for cls in (type(model), Model):
        loaded = cls.from_pretrained(folder)
        assert type(loaded) is type(model) and loaded.config == model.config
        assert torch.equal(call(loaded), expected)
