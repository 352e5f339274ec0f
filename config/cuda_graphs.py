"""CUDA graphs: the kernels of a micro-step are recorded once, and one call starts them all (PyTorch since 1.10).

    python train.py config/quickstart.py config/cuda_graphs.py

A small model's step has a thousand kernels that take microseconds each, and to start one takes a CPU as long:
there the card waits for its host. Expected: nothing for config/babylm.py, whose kernels are long; a multiple for the
quickstart on a card. Not measured: no card has run it. Gradients alone are recorded, the optimizer is started
kernel by kernel. On a CPU, where nothing can be recorded, it computes what the base does, to the bit. What is
recorded is the same at every step, so an idea that changes the loss of a micro-batch is refused.
"""
import torch

import train
from train import UserError, refuse


def record(work, device):
    """(a function that does the same again on the same tensors, what work returned): on a GPU three goes, and
    one that is recorded instead of done."""
    if device != 'cuda':
        result = work()
        return lambda: result.copy_(work()), result
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, capture_error_mode='thread_local'):      # a thread pins what is read next
        result = work()
    return graph.replay, result


class Recorded:
    """The gradients of a micro-batch as one call, on tensors that stay where they are; the first of a step."""

    def __init__(self, run, batch):
        self.of, self.batch = (run.step_model, run.flops_per_token), {name: t.clone() for name, t in batch.items()}
        self.parts = torch.ones((), device=run.device)
        if run.together:
            run.together.hearing = False         # no other rank is told of the gradients of a recording

        def work():
            loss = run.batch_loss(**self.batch) / self.parts
            loss.backward()
            return loss.detach()
        try:
            self.replay, self.loss = record(work, run.device)
        except RuntimeError as e:
            raise UserError(f'cuda_graphs cannot record this step ({str(e).splitlines()[0][:120]}): leave it out') from e
        self.grads = {p: p.grad for p in run.model.parameters() if p.grad is not None}
        run.model.zero_grad()
        run.make_noise()                         # as if this had not been

    def __call__(self, batch, n_micro):
        for p, grad in self.grads.items():
            if p.grad is not grad:
                p.grad = grad.zero_()
        for name, t in batch.items():
            self.batch[name].copy_(t, non_blocking=True)
        self.parts.fill_(n_micro)
        self.replay()
        return self.loss.clone()


class Run(train.Run):
    recorded = None

    def get_going(self):
        for name in ('loss', 'batch_loss', 'add_gradients'):
            changed = next(kind for kind in type(self).__mro__ if name in vars(kind)).__module__.rpartition('.')[2]
            refuse(changed not in ('train', '__main__', 'cuda_graphs'),
                   f'cuda_graphs.py repeats one recorded step, and {changed}.py may compute each otherwise: leave one out')
        super().get_going()

    def add_gradients(self, batch, n_micro):
        if self.recorded is None or self.recorded.of != (self.step_model, self.flops_per_token):      # it loops from now on
            self.recorded = Recorded(self, batch)
        return self.recorded(batch, n_micro)
