"""A stand-in for CUDA graphs that needs no CUDA."""

import torch


class Again:
    """A recorder whose replay runs the function again and moves its results to where they were before."""

    recorded = replayed = 0

    def __init__(self, parameters):
        self.parameters = parameters

    def record(self, run):
        Again.recorded += 1
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        results = run()
        for p, grad in zip(self.parameters, before, strict=True):  # as CUDA computes nothing while it records
            if grad is not None:
                p.grad.copy_(grad)

        def replay():
            Again.replayed += 1
            again = run()
            for one, new in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (results, again)), strict=True):
                if one is not None and one is not new:
                    one.copy_(new)

        return results, replay
