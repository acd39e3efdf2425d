"""The torch.library operators: one schema, one fake, one autograd formula and one vmap rule for each primitive."""

from . import flops as flops
