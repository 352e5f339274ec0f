"""A soft cap on the logits: cap tanh(logits / cap), so that none is ever far from the others (Gemma 2,
2408.00118).

    torchrun train.py config/babylm.py config/softcap.py

Large logits get no gradient to grow further, so the loss cannot be bought with them. Gemma 2 caps its head at
30; modded-nanogpt (2024) at 15. It counts wherever logits do: in training, in bits per byte and in samples.
On a GPU it is made in the pass that makes the loss (loss_kernels.py) and costs nothing. Expected: no change
in half an hour. Not measured yet.
"""
from config import loss_kernels
from config.loss_kernels import Run, kernel_cases

logit_softcap: float = 30.0     # the cap; 0 is none


class GPT(loss_kernels.GPT):
    page = '''
        Model.prototype.logits = (logits => function (x, n) {
            const z = logits.call(this, x, n), cap = this.config.logit_softcap;
            for (let i = 0; cap && i < z.length; i++) z[i] = cap * Math.tanh(z[i] / cap);
            return z;
        })(Model.prototype.logits);'''

    def cross_entropy(self, x, targets, reduction, **extras):
        return super().cross_entropy(x, targets, reduction, cap=self.config.logit_softcap, **extras)

    def logits(self, x):
        return loss_kernels.softcap(super().logits(x), self.config.logit_softcap)
