"""Processes that exchange tensors, played one after the other."""

import copy

import torch


class NotYetKnown(Exception):  # noqa: N818 - it is no error
    """Raised in a process that has come to an exchange before the others."""


class Exchange:
    """The averages of one process: those that are known, and what it brings to the next."""

    def __init__(self, known):
        self.known = list(known)
        self.brought = None

    def __call__(self, tensors):
        if not self.known:
            self.brought = [tensor.clone() for tensor in tensors]
            raise NotYetKnown
        for tensor, mean in zip(tensors, self.known.pop(0), strict=True):
            tensor.copy_(mean)


def together(methods, calls):
    """What `calls[rank](method, average)` return for every rank, as if all ran at once and met in every average.

    A process that comes to an average that is not known yet is stopped; when all have come there, each begins anew with
    the memory that it had, and is given the mean. The methods are replaced by what they have become.
    """
    known = []
    while True:
        attempts, results, brought = copy.deepcopy(methods), [], []
        for attempt, call in zip(attempts, calls, strict=True):
            average = Exchange(known)
            try:
                results.append(call(attempt, average))
            except NotYetKnown:
                brought.append(average.brought)
        if not brought:
            methods[:] = attempts
            return results
        assert not results, "processes do not meet in the same exchanges"
        known.append([torch.stack(tensors).mean(0) for tensors in zip(*brought, strict=True)])
