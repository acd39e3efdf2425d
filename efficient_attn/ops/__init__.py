"""The torch.library operators: one schema, one fake, one autograd formula and one vmap rule for each primitive."""

from ..imports import when_imported

# PyTorch's counter takes 0.2 s to import, Triton with it: our formulas join it where it is asked for.
when_imported("torch.utils.flop_counter", f"{__name__}.flops")
