"""What every reference model must do, whatever it computes."""

import copy

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


def check_compiles(function, *args):
    """torch.compile takes the function whole, and it computes the same."""
    torch._dynamo.reset()
    expected = function(*args)
    found = torch.compile(function, fullgraph=True, backend="eager")(*args)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def check_half_precision(model, loss):
    """Under autocast, and with bfloat16 parameters, the loss is that of float32 but for rounding."""
    model.eval()
    expected = loss(model, torch.float32).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(loss(model, torch.float32).item() - expected) < 0.05 * abs(expected) + 0.02
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = loss(half, torch.bfloat16)
    assert abs(found.item() - expected) < 0.1 * abs(expected) + 0.05
    found.backward()


def check_round_trip(model, call, folder):
    """Saved and loaded, by its own class and by `Model`, it computes the same bits with the same attention."""
    model.eval()
    model.save_pretrained(folder)
    expected = call(model)
    for cls in (type(model), Model):
        loaded = cls.from_pretrained(folder)
        assert type(loaded) is type(model) and loaded.config == model.config
        assert torch.equal(call(loaded), expected)
